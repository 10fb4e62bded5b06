"""PPO's optimisation phase: epochs of minibatches, and the objective of a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ppo_fast
from ppo_fast.loop.config import TrainConfig
from ppo_fast.loop.data.experience import Batch, Plan, make_plan
from ppo_fast.loop.data.sequences import Sequences
from ppo_fast.loop.losses import loss_options
from ppo_fast.loop.model.agent import Agent
from ppo_fast.loop.model.tower import Tower

_OF_CRITIC = ("value_loss", "vf_clip_frac", "explained_variance")


@dataclass
class Updated:
    """Outcome of an update: merged statistics, those of the last minibatch, and its norm."""

    stats: ppo_fast.Stats | None = None
    last: ppo_fast.Stats | None = None
    grad_norm: float = 0.0
    steps: int = 0
    skipped: int = 0
    stopped_by_kl: bool = False

    def record(self) -> dict[str, float]:
        """The numbers of the optimiser steps, for the log."""
        return {
            "grad_norm": self.grad_norm,
            "steps": self.steps,
            "skipped": self.skipped,
            "stopped_by_kl": self.stopped_by_kl,
        }

    def add(self, stats: ppo_fast.Stats) -> None:
        """Merge one more minibatch's statistics."""
        self.last = stats
        self.stats = stats if self.stats is None else self.stats + stats


def update(
    agent: Agent,
    batch: Batch,
    plan: Plan,
    loss_kl_coef: float,
    generator: torch.Generator,
    backend: str,
    ahead: Ahead | None = None,
) -> Updated:
    """Run `epochs` passes over the batch; `plan` orders the first, each later one is drawn anew.

    The first micro-batch goes on from the forward that scoring left in `ahead`, if there is one.
    A minibatch with no token left is skipped, as is one whose gradient is not finite. Before the
    first optimiser step every ratio must be exactly 1. An update ends early once a minibatch's
    KL(old, new) exceeds 1.5 times `kl_stop`; its gradient is thrown away.
    """
    config, done, halved = agent.config, Updated(), agent.memory.halved
    forward = config.micro_batch * agent.ranks.size
    for epoch in range(config.epochs):
        if epoch:
            plan = make_plan(len(batch.seqs.mask), config.minibatches, forward, generator)
        for minibatch in plan:
            agent.discard()

            def run(minibatch: list[Tensor] = minibatch) -> ppo_fast.Stats | None:
                # Rows that memory has cut anew round differently from those that were scored.
                unchanged = done.steps == 0 and agent.memory.halved == halved
                return accumulate(agent, batch, minibatch, loss_kl_coef, backend, unchanged, ahead)

            stats = agent.memory.run(run)
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
    ahead: Ahead | None = None,
) -> ppo_fast.Stats | None:
    """Add one minibatch's gradient to the parameters, and return its statistics.

    Every micro-batch divides by the tokens of the whole minibatch, so the gradient, once summed
    over the ranks, does not depend on the split. `unchanged` says that the weights are still those
    the old log-probs came from. Returns None, and adds nothing, when no token is left.
    """
    taken = torch.cat(minibatch)
    mask = batch.seqs.mask[taken]
    counted = mask if batch.counted is None else batch.counted[taken]
    divisors = _divisors(agent.config, mask, counted)
    if divisors.tokens == 0:
        return None
    total: ppo_fast.Stats | None = None
    for rows in agent.pieces(minibatch):
        part = batch.rows(rows)
        out = None if ahead is None or not unchanged else ahead.take(rows)
        if out is None:
            out = forward(agent, part.seqs, part.scored.frozen_out)
        policy, loss, stats = _loss(agent, part, out, divisors, loss_kl_coef, backend)
        del out
        if unchanged:
            part.require_ratio_one(policy.logprobs)
        loss.backward()
        total = stats if total is None else total + stats
    return total


def numbers(agent: Agent, stats: ppo_fast.Stats) -> dict[str, float]:
    """The statistics for the log: without those of terms that the loss does not have.

    The op knows no width of packed sequences, so the divisor of "seq-mean-token-sum-norm" is put
    in here.
    """
    out, config = stats.compute(), agent.config
    if config.reduction == "seq-mean-token-sum-norm":
        divisor = (out["n_seqs"] or 1.0) * config.max_new_tokens
        for name in ("loss", "policy_loss"):
            out[name] = float(stats.field(name)) / divisor
    absent = set() if agent.critic is not None else set(_OF_CRITIC)
    if config.distill in (None, "pg"):
        absent.add("divergence")  # that of "pg" is logged from its scores
    if config.z_loss_coef == 0:
        absent.add("z_loss")
    return {
        name: value
        for name, value in out.items()
        if name not in absent and not name.startswith("rollout_")  # the update logs its own
    }


class _Divisors(NamedTuple):
    """Divisors of a minibatch's policy loss and of its value loss, which is its tokens."""

    policy: Tensor
    tokens: Tensor


def _divisors(config: TrainConfig, mask: Tensor, counted: Tensor) -> _Divisors:
    tokens = mask.sum()
    if config.reduction == "token-mean":
        return _Divisors(counted.sum(), tokens)
    norm = config.reduction == "seq-mean-token-sum-norm"
    return _Divisors(counted.any(1).sum() * (config.max_new_tokens if norm else 1), tokens)


def _loss(
    agent: Agent,
    part: Batch,
    out: Forward,
    divisors: _Divisors,
    loss_kl_coef: float,
    backend: str,
) -> tuple[ppo_fast.HeadLoss, Tensor, ppo_fast.Stats]:
    """Policy loss, plus `vf_coef` times value loss, of one micro-batch, over the divisors."""
    config, seqs, scored = agent.config, part.seqs, part.scored
    tokens, old, advantages = (seqs.flat(x) for x in (seqs.response, scored.old, part.advantages))
    options: dict[str, Any] = {
        **loss_options(config, tokens),
        "advantage_moments": part.moments,
        "rollout_logprobs": None if part.sampled is None else seqs.flat(part.sampled),
        "correction": part.correction,
        "entropy_coef": config.entropy_coef,
        "ref_logprobs": None if config.variant == "penalty" else seqs.flat(scored.ref),
        "kl_coef": loss_kl_coef,
        "kl_estimator": config.loss_kl_estimator,
        "reduction": config.reduction,
        "denom": divisors.policy,
        "cu_seqlens": seqs.cu_seqlens(),
        "support": seqs.flat_support(),
        "backend": backend,
    }
    if out.logits is None:
        head = _head(agent, agent.policy, out.hidden)
        weight = head.pop("weight")
        # What only the head's own loss forms.
        options |= {"teacher": _teacher(agent, part), "z_loss_coef": config.z_loss_coef}
        with agent.autocast():
            policy = ppo_fast.linear_ppo_loss(
                out.hidden, weight, tokens, old, advantages, **head, **options
            )
    else:
        # The logits are this call's own: their gradient may overwrite them.
        policy = ppo_fast.logits_ppo_loss(
            out.logits,
            tokens,
            old,
            advantages,
            temperature=config.temperature,
            inplace=backend != "reference",
            **options,
        )
    if out.values is None:
        return policy, policy.loss, policy.stats
    value = ppo_fast.value_loss(
        out.values,
        seqs.flat(scored.values),
        seqs.flat(part.returns),
        clip=config.vf_clip,
        denom=divisors.tokens,
        backend=backend,
    )
    loss = policy.loss + config.vf_coef * value.loss
    return policy, loss, policy.stats + value.stats


def _teacher(agent: Agent, part: Batch) -> ppo_fast.Teacher | None:
    """The teacher's distributions of the n kept tokens, where the loss takes them whole."""
    config, tower, hidden = agent.config, agent.teacher, part.scored.teacher
    if tower is None or hidden is None or config.distill in (None, "pg"):
        return None
    return ppo_fast.Teacher(
        part.seqs.flat(hidden),
        kind=config.distill,
        beta=config.distill_beta,
        coef=config.distill_coef,
        **_head(agent, tower),
    )


class Forward(NamedTuple):
    """Last hidden states (n, H), logits (n, V) where they are formed, values (n,) of a critic."""

    hidden: Tensor
    logits: Tensor | None
    values: Tensor | None


class Ahead:
    """Training forward that scoring made last, with its graph, for the first loss to go on from.

    It holds what any micro-batch holds between its forward and its backward, and nothing runs in
    between that needs as much, so the peak of memory stays where it was. It is taken once, and
    only for the rows that it was made of, in their order.
    """

    def __init__(self) -> None:
        self._kept: tuple[Tensor, Forward] | None = None

    def keep(self, rows: Tensor, out: Forward) -> None:
        """Hold the forward of the sequences `rows`."""
        self._kept = rows, out

    def take(self, rows: Tensor) -> Forward | None:
        """The forward, if it is of `rows`; either way it is no longer held."""
        kept, self._kept = self._kept, None
        return kept[1] if kept is not None and torch.equal(kept[0], rows) else None


def forward(agent: Agent, seqs: Sequences, frozen_out: Tensor | None) -> Forward:
    """The training forward over the n kept tokens."""
    logits: Tensor | None = None
    if agent.config.head == "logits":
        logits, hidden = agent.policy.logits(seqs, frozen_out)
    else:
        hidden = agent.policy.hidden(seqs, frozen_out)
    values = None if agent.critic is None else agent.critic(hidden, seqs, frozen_out)
    return Forward(hidden, logits, values)


def logprobs(
    agent: Agent,
    tower: Tower,
    hidden: Tensor,
    logits: Tensor | None,
    seqs: Sequences,
    backend: str,
) -> Tensor:
    """Log-probability of each kept token, (n,), from the logits or else the hidden states.

    It is over the ids that the token was drawn from.
    """
    tokens, support = seqs.flat(seqs.response), seqs.flat_support()
    if logits is not None:
        return ppo_fast.token_logprobs(
            logits,
            tokens,
            temperature=agent.temperature(tower),
            support=support,
            backend=backend,
        ).logprobs
    with agent.autocast():
        return ppo_fast.linear_token_logprobs(
            hidden, tokens=tokens, support=support, backend=backend, **_head(agent, tower, hidden)
        ).logprobs


def _head(agent: Agent, tower: Tower, hidden: Tensor | None = None) -> dict[str, Any]:
    """The output head as the linear ops take it, at the temperature of the tower."""
    head = tower.head(hidden)
    head["temperature"] = agent.temperature(tower)
    return head
