"""Lines of the pages of trainers that take a loss by path or name, and the comparison with fp64.

These trainers cannot be installed without a GPU: the modules that the lines import are stand-ins
with the interfaces of their public sources of August 2026, which the formulas in the tests follow.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pages
import pytest
import torch
from torch import Tensor

# fp64 sums of some hundred terms of order 1 to 10, each of a few exponentials.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def lines(
    monkeypatch: pytest.MonkeyPatch, page: str, holding: str, **modules: dict[str, Any]
) -> dict[str, Any]:
    """The names of a page's block, run with these modules (`a__b` is a.b) to import."""
    for path, members in modules.items():
        *parents, _ = parts = path.split("__")
        for depth in range(len(parts)):
            name = ".".join(parts[: depth + 1])
            module = sys.modules.get(name) or ModuleType(name)
            monkeypatch.setitem(sys.modules, name, module)
            if depth:
                setattr(sys.modules[".".join(parts[:depth])], parts[depth], module)
        vars(sys.modules[".".join([*parents, parts[-1]])]).update(members)
    scope: dict[str, Any] = {}
    exec(pages.block(f"integrations/{page}.md", holding), scope)
    return scope


def normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=g, dtype=torch.float64)


def compared(
    ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], x: Tensor
) -> None:
    """Both values, and both gradients by x."""
    found = []
    for loss in (ours, theirs):
        leaf = x.detach().clone().requires_grad_()
        value = loss(leaf)
        (grad,) = torch.autograd.grad(value, leaf)
        found.append((value.detach(), grad))
    (a, da), (b, db) = found
    torch.testing.assert_close(a.double(), b, **CLOSE)
    torch.testing.assert_close(da.double(), db, **CLOSE)
