"""Scoring pass: old and reference log-probability, value and teacher of every response token."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_fast.loop.data.experience import Scored
from ppo_fast.loop.data.sequences import Sequences
from ppo_fast.loop.model.agent import Agent
from ppo_fast.loop.model.teacher import require_context
from ppo_fast.loop.model.tower import Tower
from ppo_fast.loop.update import Ahead, forward, logprobs


def score(
    agent: Agent, seqs: Sequences, parts: list[Tensor], backend: str, ahead: Ahead | None = None
) -> Scored:
    """Score finished sequences with policy, reference, critic and teacher.

    `parts` are the micro-batches of the coming first epoch: the old log-probs come from the
    training forward on exactly these rows, with gradients recorded (kernels may be chosen by
    that), so that the first ratio is 1 to the last bit. The first of them comes last, and its
    forward is left in `ahead`. Ranks score their share, and add up.

    The teacher runs here, once for all epochs: what is kept of it for whole distributions, its
    last hidden states, is as large as the frozen layers' output, while its forward, of a model
    that is mostly larger than the policy, would be made again in every epoch.
    """
    scored = agent.memory.run(lambda: _score(agent, seqs, agent.pieces(parts), backend, ahead))
    agent.ranks.sum_([scored.old, scored.ref, scored.values])
    for held in (scored.frozen_out, scored.teacher):
        agent.ranks.sum_([] if held is None else [held])
    return scored


@torch.no_grad()
def _score(
    agent: Agent, seqs: Sequences, parts: list[Tensor], backend: str, ahead: Ahead | None
) -> Scored:
    zeros = torch.zeros(seqs.mask.shape, dtype=agent.dtype, device=seqs.mask.device)
    old, ref, values = zeros, zeros.clone(), zeros.clone()
    frozen_out: Tensor | None = None
    teacher: Tensor | None = None
    for part in reversed(parts):
        rows = seqs.rows(part)
        scored, output = _reference(agent, rows, backend)
        ref[part] = rows.unflatten(scored)
        if output is not None:
            if frozen_out is None:
                frozen_out = output.new_zeros(len(seqs.tokens), *output.shape[1:])
            frozen_out[part] = output
        if (told := _teacher(agent, rows, backend)) is not None:
            if teacher is None:
                teacher = told.new_zeros(*seqs.mask.shape, *told.shape[1:])
            teacher[part] = rows.unflatten(told)
        with torch.enable_grad():
            out = forward(agent, rows, output)
        own = logprobs(agent, agent.policy, out.hidden, out.logits, rows, backend)
        old[part] = rows.unflatten(own)
        if out.values is not None:
            values[part] = rows.unflatten(out.values.detach())
        if ahead is not None and part is parts[0]:
            ahead.keep(part, out)
        del out  # or its graph would stay beside the next one's
    return Scored(old, ref, values, frozen_out, teacher)


def _reference(agent: Agent, rows: Sequences, backend: str) -> tuple[Tensor, Tensor | None]:
    """Log-probs of the frozen reference, (n,), and the output of its frozen layers."""
    tower = agent.reference
    return tower.with_frozen_out(lambda: _logprobs(agent, tower, rows, backend))


def _teacher(agent: Agent, rows: Sequences, backend: str) -> Tensor | None:
    """The teacher's log-probs, (n,), or last hidden states, (n, H), for whole distributions."""
    if agent.teacher is None:
        return None
    require_context(agent.teacher, rows)
    if agent.config.distill == "pg":
        return _logprobs(agent, agent.teacher, rows, backend)
    return agent.teacher.hidden(rows)


def _logprobs(agent: Agent, tower: Tower, rows: Sequences, backend: str) -> Tensor:
    """Log-probs of a frozen tower, (n,)."""
    if agent.config.head == "logits":
        logits, hidden = tower.logits(rows)
        return logprobs(agent, tower, hidden, logits, rows, backend)
    return logprobs(agent, tower, tower.hidden(rows), None, rows, backend)
