"""Poisoned allocations: an output that a kernel leaves unwritten is NaN."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.utils.deterministic


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Every `empty` inside is filled with NaN (integers: their maximum), Python's and C++'s.

    PyTorch does it under deterministic algorithms; warn_only, because nothing else of that mode
    is wanted here.
    """
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    mode = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(mode, warn_only=warn)
