"""Comparison of two backends on one batch: seconds and memory per phase, loss and gradients."""

from __future__ import annotations

import gc
import statistics
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor

from ppo_fast.loop.data.experience import Batch, Experience, Plan, advantages, corrected
from ppo_fast.loop.log.meter import Measurement, measured
from ppo_fast.loop.ppo import PPO
from ppo_fast.loop.score import score
from ppo_fast.loop.update import accumulate, update

PHASES = ("rollout", "scoring", "advantages", "update")
Phases = dict[str, list[Measurement]]


@dataclass
class Comparison:
    """Medians over the repeats, by backend and phase, and the largest differences."""

    runs: dict[str, Phases]
    loss: float
    loss_difference: float
    gradient: float
    gradient_difference: float

    def median(self, backend: str, phase: str, field: str) -> float:
        """The median of "seconds" or "peak_mb"."""
        return statistics.median(getattr(m, field) for m in self.runs[backend][phase])

    def table(self, title: str) -> Table:
        """Seconds and peak MB per phase, the two backends side by side."""
        fused, plain = self.runs
        table = Table(title=title)
        table.add_column("phase")
        for unit in ("s", "peak MB"):
            for name in (fused, plain):
                table.add_column(f"{name}\n{unit}", justify="right")
        for phase in PHASES:
            seconds = [f"{self.median(b, phase, 'seconds'):.4f}" for b in (fused, plain)]
            peaks = [f"{self.median(b, phase, 'peak_mb'):.1f}" for b in (fused, plain)]
            table.add_row(phase, *seconds, *peaks)
        return table


class State:
    """A copy of everything that a step changes, put back before each repeat."""

    def __init__(self, trainer: PPO) -> None:
        self.trainer = trainer
        optimizer = trainer.agent.optimizer
        self.weights = [p.detach().clone() for p in trainer.agent.parameters]
        self.moments = [
            {k: v.clone() for k, v in optimizer.state[p].items()} for p in trainer.agent.parameters
        ]
        self.random = (trainer.sampler.generator.get_state(), trainer.shuffling.get_state())

    @torch.no_grad()
    def restore(self) -> None:
        agent = self.trainer.agent
        for p, weight, moments in zip(agent.parameters, self.weights, self.moments, strict=True):
            p.copy_(weight)
            for name, value in moments.items():
                agent.optimizer.state[p][name].copy_(value)
        self.trainer.sampler.generator.set_state(self.random[0])
        self.trainer.shuffling.set_state(self.random[1])


def compare(trainer: PPO, repeats: int) -> Comparison:
    """Replay the last batch of a trained run on its backend and on the reference, in turn.

    Every repeat starts from the same weights, optimiser state and random numbers. The first turn
    of each backend only warms up.
    """
    if trainer.backend == "reference":
        raise ValueError("compare: the run must use another backend, got 'reference'")
    if trainer.last_batch is None:
        raise ValueError("compare: the run must have learnt from a batch, got none")
    backends = (trainer.backend, "reference")
    gc.collect()
    state = State(trainer)
    runs: dict[str, Phases] = {backend: {phase: [] for phase in PHASES} for backend in backends}
    for repeat in range(repeats + 1):
        for backend in backends:
            state.restore()
            batch, plan, took = replay(trainer, trainer.last_batch, backend)
            if repeat:
                for phase, measurement in took.items():
                    runs[backend][phase].append(measurement)
    state.restore()
    (loss, gradients), (other, others) = (_gradients(trainer, batch, plan, b) for b in backends)
    pairs = list(zip(gradients, others, strict=True))
    return Comparison(
        runs,
        other,
        abs(loss - other),
        largest([b for _, b in pairs]),
        largest([a - b for a, b in pairs]),
    )


def largest(tensors: list[Tensor]) -> float:
    """The largest magnitude in all of them, NaN where there is one: `max` would pass over it."""
    return float(torch.stack([x.abs().max().double() for x in tensors]).max())


def replay(
    trainer: PPO, sample: Experience, backend: str
) -> tuple[Batch, Plan, dict[str, Measurement]]:
    """One whole step with the prompts and rewards of a sample, in completions made anew."""
    took: dict[str, Measurement] = {}
    with measured(trainer.device) as took["rollout"]:
        rollout = trainer.sampler.rollout(sample.prompts, backend)
    seqs = sample._replace(rollout=rollout).learnt(trainer.config)
    plan, scores = trainer.plan(), sample.scores
    with measured(trainer.device) as took["scoring"]:
        scored = score(trainer.agent, seqs, [rows for part in plan for rows in part], backend)
    with measured(trainer.device) as took["advantages"]:
        batch, _ = advantages(trainer.config, trainer.kl_coef, seqs, scored, scores, backend)
        batch, _ = corrected(batch, rollout, trainer.correction, backend)
    with measured(trainer.device) as took["update"]:
        update(trainer.agent, batch, plan, trainer.loss_kl_coef, trainer.shuffling, backend)
    return batch, plan, took


def _gradients(trainer: PPO, batch: Batch, plan: Plan, backend: str) -> tuple[float, list[Tensor]]:
    """Loss and gradient of the batch's first minibatch with a token in it, nothing changed."""
    agent = trainer.agent
    agent.optimizer.zero_grad(set_to_none=True)
    loss = float("nan")
    for minibatch in plan:
        stats = accumulate(agent, batch, minibatch, trainer.loss_kl_coef, backend)
        if stats is not None:
            computed = stats.compute()
            critic = 0.0 if agent.critic is None else computed["value_loss"]
            loss = computed["loss"] + agent.config.vf_coef * critic
            break
    gradients = [p.grad for p in agent.parameters if p.grad is not None]
    agent.optimizer.zero_grad(set_to_none=True)
    return loss, gradients
