"""Calls of a trainer's functions on the trainer and on ppo_fast, compared; their inputs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

from ppo_fast import testing

B, T = 5, 11


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mask_of(kind: str) -> Tensor:
    """Holes (tool tokens), a whole sequence left out, padding on the right."""
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, 3:6], mask[1, 7:], mask[3] = False, False, False
    return mask.to({"bool": torch.bool, "int": torch.int64, "float": torch.float64}[kind])


def assert_near(ours: Any, theirs: Any, size: float, terms: int = B * T) -> None:
    """fp32's budget for fp64 inputs: trainers have ratios of fp32, or 1e-8 in a divisor."""
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
            assert_near(ours[key], theirs[key], size, terms)
    else:
        assert ours is theirs is None or ours == pytest.approx(
            theirs, rel=1e-6, abs=1e-7, nan_ok=True
        )


def assert_all_alike(
    patched: Callable[[tuple[str, ...]], AbstractContextManager[dict[str, Any]]],
    op: str,
    calls: list[Any],
    *leaves: Tensor,
    size: float,
    terms: int = B * T,
) -> None:
    """Results and gradients on the trainer and `patched`, under one patch: none may be left."""
    theirs = [_results(call, leaves) for call in calls]
    with patched((op,)) as counts:
        ours = [_results(call, leaves) for call in calls]
    assert (counts[op].fused, counts[op].left) == (len(calls), 0)
    for a, b in zip(ours, theirs, strict=True):
        for x, y in zip(a, b, strict=True):
            assert_near(x, y, size, terms)


def _results(call: Any, leaves: tuple[Tensor, ...]) -> list[Any]:
    found = call()
    results = list(found) if isinstance(found, tuple) else [found]
    total = sum(x.sum() for x in results if isinstance(x, Tensor) and x.requires_grad)
    return [*results, *(torch.autograd.grad(total, leaves) if leaves else ())]
