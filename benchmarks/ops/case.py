"""The case: one op at one size, direction and dtype, scaled to what fits the machine.

A size too large for the machine's memory is halved until it fits, under a name that says so:
`qwen-r1/16` is a sixteenth of the rows of `qwen-r1`.
"""

from __future__ import annotations

import functools
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

FORWARD = "forward"
BACKWARD = "backward"  # the forward pass before it is not timed
BOTH = "forward+backward"
# One call on tiny tensors, without and with a gradient to be recorded: the cost of calling.
CALL = "call"
CALL_GRAD = "call-with-grad"
DIRECTIONS = (FORWARD, BACKWARD, BOTH, CALL, CALL_GRAD)

BATCH_MAJOR = "batch-major"
TIME_MAJOR = "time-major"  # tokens × sequences in memory
PACKED = "packed"  # sequences of uneven length end to end
LAYOUTS = (BATCH_MAJOR, TIME_MAJOR, PACKED)

# Transparent huge pages for large blocks; torch's CPU allocator reads it when the process starts.
THP = (("THP_MEM_ALLOC_ENABLE", "1"),)


@dataclass(frozen=True)
class Shape:
    """A problem size: rows × vocabulary (× hidden size), or sequences × tokens in some layout.

    Packed sequences have that many tokens on average.
    """

    name: str
    dims: tuple[int, ...]
    layout: str = BATCH_MAJOR

    @property
    def numel(self) -> int:
        """Logits, or tokens."""
        return self.dims[0] * self.dims[1]

    def part(self, divisor: int) -> Shape:
        """The same with a part of the rows, or sequences; its name says which."""
        rows = self.dims[0] // divisor
        return Shape(f"{self.name}/{divisor}", (rows, *self.dims[1:]), self.layout)

    def __str__(self) -> str:
        dims = "x".join(map(str, self.dims))
        return dims if self.layout == BATCH_MAJOR else f"{dims}:{self.layout}"


# A case holds its inputs, a copy of them for each provider that takes gradients, and the
# temporaries of the largest peer: about this many times its main tensor.
_COPIES = 56


@functools.cache
def memory(device: str) -> int:
    """Bytes this process may use: the GPU's, or the machine's within the container's limit."""
    if device == "cuda":
        # Under a dry run there is no GPU, and nothing to scale down for.
        there = torch.cuda.is_available()
        return torch.cuda.get_device_properties(0).total_memory if there else 2**60
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return total if text == "max" else min(total, int(text))


def fitted(shape: Shape, dtype: str, budget: int) -> Shape:
    """The shape, or the largest 1/2, 1/4, 1/8, ... of it that runs in `budget` bytes."""
    need, divisor = shape.numel * DTYPES[dtype].itemsize * _COPIES, 1
    while need > budget * divisor and shape.dims[0] >= 2 * divisor:
        divisor *= 2
    return shape if divisor == 1 else shape.part(divisor)


@dataclass(frozen=True)
class Case:
    """One op at one size, direction and dtype; its providers are timed together."""

    op: str
    direction: str
    shape: Shape
    dtype: str = "fp32"
    env: tuple[tuple[str, str], ...] = ()
    device: str = "cpu"

    @property
    def name(self) -> str:
        parts = [self.op, self.direction, f"{self.shape.name}:{self.shape}", self.dtype]
        parts += [] if self.device == "cpu" else [self.device]
        return " ".join(parts + [f"{key}={value}" for key, value in self.env])

    @property
    def is_call(self) -> bool:
        """True if the cost of a call is measured."""
        return self.direction in (CALL, CALL_GRAD)

    @property
    def grad(self) -> bool:
        """True if gradients are requested (in a call: recorded, not taken)."""
        return self.differentiates or self.direction == CALL_GRAD

    @property
    def differentiates(self) -> bool:
        """True if gradients are taken."""
        return self.direction in (BACKWARD, BOTH)

    @property
    def missing_env(self) -> dict[str, str]:
        """Environment variables that the case needs and this process was not started with."""
        return {key: value for key, value in self.env if os.environ.get(key) != value}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Case:
        shape = Shape(**{**fields["shape"], "dims": tuple(fields["shape"]["dims"])})
        env = tuple((key, value) for key, value in fields["env"])
        return cls(**{**fields, "shape": shape, "env": env})


def here(case: Case) -> Case:
    """The case scaled to this machine."""
    return replace(case, shape=fitted(case.shape, case.dtype, memory(case.device)))
