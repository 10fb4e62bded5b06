"""Calls of verl's losses on verl and on ppo_fast, compared."""

from __future__ import annotations

import importlib.metadata
import inspect
from functools import partial
from typing import Any

import both_sides
import torch
from both_sides import B, T
from torch import Tensor
from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig

from ppo_fast.integrations import verl

assert_all_alike = partial(both_sides.assert_all_alike, verl.patched)

VERSION = f"verl {importlib.metadata.version('verl')}"


def _sums() -> bool:
    try:
        core_algos.agg_loss(torch.ones(1, 1), torch.ones(1, 1), "token-sum")
    except ValueError:
        return False
    return True


# What 0.8.0 has not: a mode of `agg_loss`, and the batch's counts in `compute_value_loss`.
SUMS = _sums()
COUNTS = "dp_size" in inspect.signature(core_algos.compute_value_loss).parameters
MODES = (
    "token-mean",
    *(["token-sum"] if SUMS else []),
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)


def config(info: dict[str, Any], **options: Any) -> ActorConfig:
    return ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        global_batch_info=info,
        **options,
    )


def assert_alike(op: str, call: Any, *leaves: Tensor, size: float, terms: int = B * T) -> None:
    """The call's results and gradients, on verl and on ppo_fast."""
    assert_all_alike(op, [call], *leaves, size=size, terms=terms)
