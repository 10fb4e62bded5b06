"""Calls of verl's losses on verl and on ppo_fast, compared."""

from __future__ import annotations

import importlib.metadata
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig

from ppo_fast import testing
from ppo_fast.integrations import verl

B, T = 5, 11
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


def mask_of(kind: str) -> Tensor:
    """Holes (tool tokens), a whole sequence left out, padding on the right."""
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, 3:6], mask[1, 7:], mask[3] = False, False, False
    return mask if kind == "bool" else mask.double()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def near(ours: Any, theirs: Any, size: float, terms: int = B * T) -> None:
    """fp32's budget for fp64 inputs: verl adds 1e-8 to counts and variances."""
    assert type(ours) is type(theirs)
    if isinstance(ours, Tensor):
        testing.assert_within_budget(
            ours.detach().double(),
            theirs.detach().double(),
            condition=size,
            ops=8 + terms,
            compute=torch.float32,
        )
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            near(ours[key], theirs[key], size, terms)
    else:
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-7)


def assert_alike(op: str, call: Any, *leaves: Tensor, size: float, terms: int = B * T) -> None:
    """The call's results and gradients, on verl and on ppo_fast."""
    assert_all_alike(op, [call], *leaves, size=size, terms=terms)


def assert_all_alike(
    op: str, calls: list[Any], *leaves: Tensor, size: float, terms: int = B * T
) -> None:
    """The same of several calls under one patch: none may be left to verl."""
    theirs = [_results(call, leaves) for call in calls]
    with verl.patched((op,)) as counts:
        ours = [_results(call, leaves) for call in calls]
    assert (counts[op].fused, counts[op].left) == (len(calls), 0)
    for a, b in zip(ours, theirs, strict=True):
        for x, y in zip(a, b, strict=True):
            near(x, y, size, terms)


def _results(call: Any, leaves: tuple[Tensor, ...]) -> list[Any]:
    found = call()
    results = list(found) if isinstance(found, tuple) else [found]
    total = sum(x.sum() for x in results if isinstance(x, Tensor) and x.requires_grad)
    return [*results, *(torch.autograd.grad(total, leaves) if leaves else ())]
