"""Watching the head at work: short chunks, rows that reach each product, tensors it allocates."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ppo_fast.ops import gemm, head

# What the products are called, and which argument's rows they take.
_PRODUCTS = {"logits_into": 1, "hidden_gradient": 0, "add_weight_gradient": 1}


def shape_for(backend: str, device: str) -> tuple[int, int]:
    """Several chunks of `short_chunks`, few where the kernels are interpreted."""
    return (2, 3) if backend == "triton" and device == "cpu" else (5, 12)


def short_chunks(monkeypatch: pytest.MonkeyPatch, backend: str = "cpu") -> None:
    """Chunks of one tile, so that a small call has several; a tiny tile when interpreted."""
    tile = {"cpu": 4 if backend == "triton" else 16, "cuda": 16}
    monkeypatch.setattr(head, "_TILE", tile)
    monkeypatch.setattr(head, "_TALLEST", tile)


def products(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Rows that go through each of the three products from here on; a missing key is none."""
    rows: Counter[str] = Counter()

    def counted(name: str, operand: int) -> Any:
        product = getattr(gemm, name)

        def call(*args: Any, **options: Any) -> Any:
            rows[name] += args[operand].shape[0]
            return product(*args, **options)

        return call

    for name, operand in _PRODUCTS.items():
        monkeypatch.setattr(gemm, name, counted(name, operand))
    return rows


class Allocations(TorchDispatchMode):
    """Shapes and dtypes of all tensors that ops make for themselves, views apart."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []
        self.dtypes: defaultdict[torch.Size, Counter[torch.dtype]] = defaultdict(Counter)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {x.data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            for x in tree_leaves(out):
                if isinstance(x, torch.Tensor) and x.data_ptr() not in known:
                    self.shapes.append(x.shape)
                    self.dtypes[x.shape][x.dtype] += 1
        return out

    def largest(self) -> int:
        """Elements of the largest one."""
        return max((shape.numel() for shape in self.shapes), default=0)
