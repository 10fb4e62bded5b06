"""Batches of prompts in a seeded order."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from typing import Any

from ppo_fast.loop.values import require_text, shown


class PromptStream:
    """Endless batches of prompts in an order drawn from `seed`, each prompt once per pass."""

    def __init__(self, prompts: list[str], seed: int) -> None:
        if isinstance(prompts, (str, bytes, Mapping)):  # it would be read letter by letter
            raise ValueError(f"prompts must be a list of texts, got {shown(prompts)}")
        self._prompts = [require_text(f"prompts[{i}]", text) for i, text in enumerate(prompts)]
        if not self._prompts:
            raise ValueError("prompts must not be empty, got 0 prompts")
        self._random = random.Random(seed)
        self._order: list[int] = []

    def next(self, n: int) -> list[str]:
        """The next `n` prompts."""
        while len(self._order) < n:
            again = list(range(len(self._prompts)))
            self._random.shuffle(again)
            self._order += again
        taken, self._order = self._order[:n], self._order[n:]
        return [self._prompts[i] for i in taken]

    def digest(self) -> str:
        """The sha256 of all prompts."""
        return hashlib.sha256(json.dumps(self._prompts).encode()).hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """Position in the stream: prompts left of this pass, and the generator of later ones."""
        return {"order": self._order, "random": self._random.getstate()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, of the same prompts."""
        version, internal, gauss = state["random"]
        self._order = state["order"]
        self._random.setstate((version, tuple(internal), gauss))
