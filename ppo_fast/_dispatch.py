"""Measurements that decide the automatic choice of kernels on a GPU, as data.

Triton is the default. An entry says that the op's CUDA C++ kernels were faster at every measured
shape on that architecture and dtype, and names the committed results that show it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Case(NamedTuple):
    """Op, GPU and dtype of an entry; `capability` is the GPU's, as torch gives it."""

    op: str
    capability: tuple[int, int]
    dtype: torch.dtype


# case -> the file in benchmarks/results. Empty: nothing has been measured yet.
CUDA_IS_FASTER: dict[Case, str] = {}
