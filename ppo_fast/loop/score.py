"""Scoring pass: old and reference log-probability and value of every response token."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_fast.loop.data.experience import Scored
from ppo_fast.loop.data.sequences import Sequences
from ppo_fast.loop.model.agent import Agent
from ppo_fast.loop.update import forward, logprobs


def score(agent: Agent, seqs: Sequences, parts: list[Tensor], backend: str) -> Scored:
    """Score finished sequences with policy, reference and critic.

    `parts` are the micro-batches of the coming first epoch: the old log-probs come from the
    training forward on exactly these rows, with gradients recorded (kernels may be chosen by
    that), so that the first ratio is 1 to the last bit. Ranks score their share, and add up.
    """
    scored = agent.memory.run(lambda: _score(agent, seqs, agent.pieces(parts), backend))
    agent.ranks.sum_([scored.old, scored.ref, scored.values])
    agent.ranks.sum_([] if scored.trunk is None else [scored.trunk])
    return scored


@torch.no_grad()
def _score(agent: Agent, seqs: Sequences, parts: list[Tensor], backend: str) -> Scored:
    zeros = torch.zeros(seqs.mask.shape, dtype=agent.dtype, device=seqs.mask.device)
    old, ref, values = zeros, zeros.clone(), zeros.clone()
    trunk: Tensor | None = None
    for part in parts:
        rows = seqs.rows(part)
        scored, bottom = _reference(agent, rows, backend)
        ref[part] = rows.unflatten(scored)
        if bottom is not None:
            if trunk is None:
                trunk = bottom.new_zeros(len(seqs.tokens), *bottom.shape[1:])
            trunk[part] = bottom
        with torch.enable_grad():
            out = forward(agent, rows, bottom)
        own = logprobs(agent, agent.policy, out.hidden, out.logits, rows, backend)
        old[part], values[part] = rows.unflatten(own), rows.unflatten(out.values.detach())
    return Scored(old, ref, values, trunk)


def _reference(agent: Agent, rows: Sequences, backend: str) -> tuple[Tensor, Tensor | None]:
    """Log-probs of the frozen reference, (n,), and the output of its frozen layers."""
    tower = agent.reference
    if agent.config.head == "logits":
        (logits, hidden), bottom = tower.with_trunk(lambda: tower.logits(rows))
        return logprobs(agent, tower, hidden, logits, rows, backend), bottom
    hidden, bottom = tower.with_trunk(lambda: tower.hidden(rows))
    return logprobs(agent, tower, hidden, None, rows, backend), bottom
