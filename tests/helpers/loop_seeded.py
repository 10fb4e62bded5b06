"""A short run with a stateful reward, the same in every process that builds it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loop_helpers import trainer

from ppo_fast.loop import Trainer
from ppo_fast.loop.rewards import letters


class Learned:
    """A reward with numbers and a tensor of its own, which moves with every global stream."""

    def __init__(self) -> None:
        self.bias = torch.zeros(1)
        self.calls = 0

    def __call__(self, prompts: list[str], texts: list[str]) -> list[float]:
        self.calls += 1
        noise = torch.rand(1) + random.random() + np.random.random()
        self.bias = self.bias + 0.01 * noise
        return [r + float(self.bias) for r in letters(prompts, texts)]

    def state_dict(self) -> dict[str, Any]:
        return {"bias": self.bias, "counters": {"calls": self.calls}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.bias, self.calls = state["bias"], state["counters"]["calls"]


def seeded(out: Path, **options: Any) -> Trainer:
    """A run of 4 updates with both adaptive coefficients, a separate critic and `Learned`."""
    random.seed(0)
    np.random.seed(0)
    defaults = {
        "updates": 4,
        "variant": "penalty",
        "kl_target": 0.5,
        "kl_horizon": 50.0,
        "warmup": 3,
        "critic": "separate",
        "save_every": 1,
        "keep_checkpoints": 3,
        "batch": 6,
        "minibatches": 2,
    }
    return trainer(out, Learned(), **(defaults | options))
