"""PPO's optimisation phase: epochs of minibatches, each accumulated over micro-batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import ppo_fast
from ppo_fast.loop.data.sequences import Sequences
from ppo_fast.loop.model.agent import Agent, Scored
from ppo_fast.loop.model.memory import with_room

Plan = list[list[Tensor]]


class Batch(NamedTuple):
    """Everything an update reads. Per-token tensors are (B, R) fp32 and constant."""

    seqs: Sequences
    scored: Scored
    advantages: Tensor
    returns: Tensor
    moments: ppo_fast.Moments
    is_weights: Tensor | None = None


@dataclass
class Updated:
    """What an update did: merged statistics, the last minibatch's own, and the norms."""

    stats: ppo_fast.Stats | None = None
    last: ppo_fast.Stats | None = None
    grad_norm: float = 0.0
    steps: int = 0
    skipped: int = 0
    stopped_by_kl: bool = False

    def add(self, stats: ppo_fast.Stats) -> None:
        """Merge one more minibatch's statistics."""
        self.last = stats
        self.stats = stats if self.stats is None else self.stats + stats


def make_plan(n: int, minibatches: int, micro_batch: int, generator: torch.Generator) -> Plan:
    """A fresh permutation of `n` sequences, cut into minibatches of micro-batches (rows)."""
    order = torch.randperm(n, generator=generator)
    return [list(part.split(micro_batch)) for part in order.tensor_split(minibatches)]


def update(
    agent: Agent,
    batch: Batch,
    plan: Plan,
    loss_kl_coef: float,
    generator: torch.Generator,
    backend: str,
) -> Updated:
    """Run `epochs` passes over the batch; `plan` orders the first, each later one is drawn anew.

    A minibatch with no token left is skipped, as is one whose gradient is not finite. Before the
    first optimiser step every ratio must be exactly 1. An update ends early once a minibatch's
    KL(old, new) exceeds 1.5 times `kl_stop`; its gradient is thrown away.
    """
    config, done, halved = agent.config, Updated(), agent.halved
    forward = config.micro_batch * agent.ranks.size
    for epoch in range(config.epochs):
        if epoch:
            plan = make_plan(len(batch.seqs.mask), config.minibatches, forward, generator)
        for minibatch in plan:
            agent.discard()

            def run(minibatch: list[Tensor] = minibatch) -> ppo_fast.Stats | None:
                # Rows that memory has cut anew round differently from those that were scored.
                unchanged = done.steps == 0 and agent.halved == halved
                return accumulate(agent, batch, minibatch, loss_kl_coef, backend, unchanged)

            stats = with_room(agent, run)
            if stats is None:
                continue
            stats = agent.ranks.merge(stats)
            if config.kl_stop and stats.compute()["kl_k3"] > 1.5 * config.kl_stop:
                agent.discard()
                done.add(stats)
                done.stopped_by_kl = True
                return done
            norm = agent.step()
            if norm is None:
                done.skipped += 1
                continue
            done.add(stats)
            done.grad_norm, done.steps = norm, done.steps + 1
    agent.discard()
    return done


def accumulate(
    agent: Agent,
    batch: Batch,
    minibatch: list[Tensor],
    loss_kl_coef: float,
    backend: str,
    unchanged: bool = False,
) -> ppo_fast.Stats | None:
    """Add one minibatch's gradient to the parameters, and return its statistics.

    Every micro-batch divides by the tokens of the whole minibatch, so the gradient, once summed
    over the ranks, does not depend on the split. `unchanged` says that the weights are still those
    the old log-probs came from. Returns None, and adds nothing, when no token is left.
    """
    tokens = sum(batch.seqs.mask[rows].sum() for rows in minibatch)
    if tokens == 0:
        return None
    total: ppo_fast.Stats | None = None
    for rows in agent.pieces(minibatch):
        part = _rows(batch, rows)
        policy, loss, stats = _loss(agent, part, tokens, loss_kl_coef, backend)
        if unchanged:
            _require_ratio_one(policy.logprobs, part)
        loss.backward()
        total = stats if total is None else total + stats
    return total


def _loss(
    agent: Agent, part: Batch, tokens: Tensor, loss_kl_coef: float, backend: str
) -> tuple[ppo_fast.HeadLoss, Tensor, ppo_fast.Stats]:
    """Policy loss, plus `vf_coef` times value loss, of one micro-batch, over `tokens`."""
    config, seqs, scored = agent.config, part.seqs, part.scored
    out = agent.forward(seqs, scored.trunk)
    weights = None if part.is_weights is None else seqs.flat(part.is_weights)
    policy = agent.policy_loss(
        out,
        seqs,
        seqs.flat(scored.old),
        seqs.flat(part.advantages),
        backend,
        variant=config.variant,
        clip_low=config.clip,
        clip_high=config.clip,
        advantage_moments=part.moments,
        is_weights=weights,
        entropy_coef=config.entropy_coef,
        ref_logprobs=None if config.variant == "penalty" else seqs.flat(scored.ref),
        kl_coef=loss_kl_coef,
        denom=tokens,
    )
    value = ppo_fast.value_loss(
        out.values,
        seqs.flat(scored.values),
        seqs.flat(part.returns),
        clip=config.vf_clip,
        denom=tokens,
        backend=backend,
    )
    loss = policy.loss + config.vf_coef * value.loss
    return policy, loss, policy.stats + value.stats


def _rows(batch: Batch, index: Tensor) -> Batch:
    """The batch at row indices `index`; the moments stay those of the whole."""
    old, ref, values, trunk = batch.scored
    trunk = None if trunk is None else trunk[index]
    scored = Scored(old[index], ref[index], values[index], trunk)
    advantages, returns = batch.advantages[index], batch.returns[index]
    weights = None if batch.is_weights is None else batch.is_weights[index]
    return Batch(batch.seqs.rows(index), scored, advantages, returns, batch.moments, weights)


def _require_ratio_one(logprobs: Tensor, part: Batch) -> None:
    old = part.seqs.flat(part.scored.old)
    if not torch.equal(logprobs, old):
        gap = (logprobs - old).abs().max().item()
        raise RuntimeError(
            "the policy's log-probs must equal the old ones before the first optimiser step,"
            f" got a difference of {gap}: the model's forward is not deterministic"
            " (dropout, or kernels that differ between runs)"
        )
