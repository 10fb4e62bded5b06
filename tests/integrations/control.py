"""Helpers of the control libraries' tests: a patched run against an unpatched one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import ppo_fast
from ppo_fast.integrations._patch import Integration

Weights = dict[str, Tensor]
# What an update may add to the difference of two runs' weights, whose gradients differ in the
# last bits: Adam divides by their size, so those of no size at all go anywhere within a step.
BOUND = 1e-4


def weights(*modules: nn.Module) -> Weights:
    """Copies of all parameters."""
    return {
        f"{i}.{name}": x.detach().clone()
        for i, module in enumerate(modules)
        for name, x in module.state_dict().items()
    }


def assert_same_bits(ours: Weights, theirs: Weights) -> None:
    assert ours.keys() == theirs.keys()
    different = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    assert not different


def assert_near(ours: Weights, theirs: Weights) -> None:
    assert ours.keys() == theirs.keys()
    worst = {name: float((ours[name] - theirs[name]).abs().max()) for name in theirs}
    assert max(worst.values()) <= BOUND, worst


def assert_trains_alike(
    integration: Integration,
    train: Callable[[], Weights],
    updates: int,
    start: Weights,
    on_reference: Callable[[Weights, Weights], None] = assert_same_bits,
) -> None:
    """The same seeds: bit for bit with the reference's arithmetic, nearly with the kernels'.

    The reference rounds after every operation, as the libraries' loops do; the kernels fuse
    multiplication and addition. A run in which nothing was learned would show nothing.
    """
    theirs = train()
    assert any(not torch.equal(theirs[name], start[name]) for name in start)
    for backend, check in (("reference", on_reference), ("cpu", assert_near)):
        with ppo_fast.use_backend(backend), integration.patched() as calls:
            ours = train()
            assert {op: (n.fused, n.left) for op, n in calls.items()} == {"gae": (updates, 0)}
        check(ours, theirs)


def loop(**x: Any) -> tuple[list[float], list[float]]:
    """Advantages and returns of one environment, number by number in Python's doubles."""
    advantages, later = [], 0.0
    for t in reversed(range(len(x["rewards"]))):
        live = 1.0 - float(x["done"][t])
        delta = x["rewards"][t] + x["gamma"] * x["next_values"][t] - x["values"][t]
        later = delta + x["gamma"] * x["lam"] * live * later
        advantages.append(later)
    advantages.reverse()
    return advantages, [a + v for a, v in zip(advantages, x["values"], strict=True)]
