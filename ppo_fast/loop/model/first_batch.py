"""Checks of a run's first batch, before anything is trained on it."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_fast.loop.data.sequences import Sequences
from ppo_fast.loop.model.agent import Agent
from ppo_fast.loop.model.head import check_distributions
from ppo_fast.loop.model.layers import UnsupportedModelError
from ppo_fast.loop.model.rounding import excess_gap, has_routed_experts

_ROWS = 8  # whose logits are formed beside a linear head


class FirstBatch:
    """The checks of one run, a resumed one's again; each is made once."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self._head = agent.config.head == "linear"
        self._gap = True
        # True once an update has shown, by ratios of exactly 1, that a forward repeats its bits.
        self.repeats = False

    def check_head(self, seqs: Sequences, parts: list[Tensor]) -> None:
        """Compare the linear head with the model's own logits on a few rows.

        `parts` are micro-batches, as in `score`. Raises UnsupportedModelError, which names
        the output head.
        """
        if self._head:
            self._head = False
            agent = self.agent
            agent.memory.run(lambda: self._compare(seqs, agent.pieces(parts)))

    @torch.no_grad()
    def _compare(self, seqs: Sequences, parts: list[Tensor]) -> None:
        rows = seqs.rows(next((p for p in parts if seqs.mask[p].any()), parts[0]))
        kept = rows.mask.flatten().nonzero().squeeze(1)
        some = kept[torch.linspace(0, len(kept) - 1, min(_ROWS, len(kept))).long()]
        mask = torch.zeros_like(rows.mask).flatten().index_fill(0, some, True)
        few = rows._replace(mask=mask.view_as(rows.mask))
        agent = self.agent
        for tower in filter(None, (agent.policy, agent.reference, agent.teacher)):
            logits, hidden = tower.logits(few)
            with tower.inside():
                check_distributions(tower.model, tower.product(), hidden, logits)

    def check_gap(self, gaps: Tensor) -> None:
        """Compare the sampler's log-probs with the training forward's.

        `gaps` (n,) are the differences in nats. Raises UnsupportedModelError where they are beyond
        rounding: PPO would start from a policy that did not sample.
        """
        if not self._gap:
            return
        self._gap, model = False, self.agent.policy.model
        found = excess_gap(gaps, self.agent.precision, has_routed_experts(model))
        if found is not None:
            raise UnsupportedModelError(
                f"{type(model).__name__} samples from another distribution than it is trained on:"
                f" of the rollout gaps |sampler's - training forward's log-prob| {found}. Nothing"
                " was trained. Its cache, its mask or its positions in generation differ from"
                " those of a whole forward: update transformers, or sample elsewhere and train on"
                " the --transitions"
            )
