"""Adapters: the functions of a trainer that are run, its configuration, and their formulas.

An adapter is a module with `PACKAGE` (what must be installed, None for none), `OPTIONS` (the
trainer's own option names and their defaults) and `probes(options)`. It calls functions of the
installed trainer and patches none.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppo_fast.referee.cases import Tokens
from ppo_fast.referee.judge import Given

TRAINERS = {
    "plain": "functions of your own with plain arguments (docs/verify.md)",
    "ppo_fast": "the ops of this package",
    "trl": "TRL's GRPOTrainer",
    "trl_ppo": "TRL's PPOTrainer, up to 1.12",
    "verl": "verl's losses, KL and advantages",
    "openrlhf": "OpenRLHF's losses, KL and advantages",
    "sb3": "Stable-Baselines3's PPO",
    "torchrl": "torchrl's GAE and ClipPPOLoss",
    "tianshou": "tianshou's GAE and PPO",
    "skrl": "skrl's GAE",
    "cleanrl": "CleanRL's ppo.py",
}

Function = Callable[..., Any]


class Missing(NamedTuple):
    """A part that is not run, and why."""

    name: str
    why: str


@dataclass(frozen=True)
class Probe:
    """One function of a trainer beside a formula.

    `call(function, batch)` gives its outputs by the formula's names. `kind` names the batches (of
    `cases.NAMES`), `case` their options, `left_out` cases that cannot be put to this function, and
    why. `documented`: the trainer's own words for a change, by the change's key. `taken`: what is
    taken as the trainer gives it, because no paper fixes it.
    """

    name: str
    function: Function
    call: Callable[[Function, Any], Given]
    formula: Any
    kind: str = "tokens"
    case: Mapping[str, Any] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    documented: Mapping[str, str] = field(default_factory=dict)
    taken: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32

    def by(self, function: Function) -> Probe:
        """The same probe of another function; no words of the trainer's hold for it."""
        return replace(self, function=function, documented={})


class Window(NamedTuple):
    """The optimiser step that a micro-batch belongs to: counts over all of its ranks.

    `masks` are those of every micro-batch of every rank.
    """

    ranks: int
    micro_batches: int
    tokens: int
    sequences: int
    rank_tokens: int
    masks: tuple[Tensor, ...]


def adapter(name: str) -> ModuleType:
    """The adapter of a trainer; ValueError for an unknown one."""
    if name not in TRAINERS:
        raise ValueError(f"verify: trainer must be one of {', '.join(TRAINERS)}, got {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


def over_step(
    loss: Callable[[Function, Tokens, Window], Tensor],
    leaf: str = "logprobs",
    entropies: bool = False,
) -> Callable[[Function, Tokens], Given]:
    """A call that sums a loss over micro-batches, averages it over ranks, and differentiates it.

    As gradients are accumulated within a rank and averaged by DDP: what a trainer's own loop
    divides by is the adapter's to divide by.
    """

    def call(function: Function, batch: Tokens) -> Given:
        batch = batch.to(torch.float32)
        names = [leaf, "entropies"] if entropies else [leaf]
        leaves = {name: getattr(batch, name).clone().requires_grad_() for name in names}
        batch = replace(batch, **leaves)
        masks = tuple(batch.mask[list(rows)] for rank in batch.cut for rows in rank)
        total = torch.zeros(())
        for rank in batch.cut:
            for rows in rank:
                own = batch.mask[[i for part in rank for i in part]].sum()
                window = Window(
                    len(batch.cut),
                    len(rank),
                    int(batch.mask.sum()),
                    len(batch.mask),
                    int(own),
                    masks,
                )
                total = total + loss(function, batch.rows(rows), window) / len(batch.cut)
        grads = torch.autograd.grad(
            total, list(leaves.values()), allow_unused=True, materialize_grads=True
        )
        found = {"loss": total.detach(), "gradient": grads[0]}
        return found | {"entropy gradient": grads[1]} if entropies else found

    return call


def values_and_gradient(
    values: Callable[[Function, Tensor, Any], Tensor], leaf: str, masked: bool = False
) -> Callable[[Function, Any], Given]:
    """A call for a value per row or token: the values, and the gradient of their sum."""

    def call(function: Function, batch: Any) -> Given:
        x = getattr(batch, leaf).float().clone().requires_grad_()
        found = values(function, x, batch)
        total = found[batch.mask].sum() if masked else found.sum()
        (gradient,) = torch.autograd.grad(total, x, allow_unused=True, materialize_grads=True)
        return {"value": found.detach(), "gradient": gradient}

    return call


def place(function: Function) -> str:
    """Qualified name, file and first line of a function, or of what a wrapper wraps."""
    plain: Any = inspect.unwrap(getattr(function, "__func__", function))
    if inspect.isclass(plain):
        plain = vars(plain)["forward"]
    code = getattr(plain, "py_func", plain).__code__
    line = getattr(plain, "line", code.co_firstlineno)
    file = Path(code.co_filename)
    name = plain.__module__ or file.stem  # None where it was defined by exec
    path = f"{name.replace('.', '/')}.py" if "." in name else file.name
    return f"{name}.{plain.__qualname__} ({path}:{line})"
