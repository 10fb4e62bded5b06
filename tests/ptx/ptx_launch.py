"""Launches of Triton kernels on the interpreted GPU: compiled by Triton for sm_90, run as PTX.

    with ptx_launch.interpreted():
        ppo_fast.gae(rewards, values, backend="triton")   # tensors on the CPU

The process must be without TRITON_INTERPRET. Triton keeps what it compiles in its own cache.
"""

from __future__ import annotations

import contextlib
import ctypes
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import triton
from ptx_machine import Decoded
from ptx_memory import GlobalMemory
from ptx_parse import Program, parse

from benchmarks.gpu import fake_driver

Change = Callable[[str, Program], None]
Buffer = tuple[int, np.ndarray, str]


class Gpu:
    """Runner of launches; `change` may alter a kernel's program before it is decoded."""

    def __init__(self, seed: int = 0, change: Change | None = None) -> None:
        self.random = random.Random(seed)
        self.change = change
        self.decoded: dict[tuple[str, str], tuple[Decoded, int]] = {}
        self.launches = 0
        # By kernel: accesses of threads to global memory, by their bytes.
        self.accesses: defaultdict[str, Counter[int]] = defaultdict(Counter)

    def __call__(self, launch: fake_driver.Launch) -> None:
        decoded, shared = self._kernel(launch.variant)
        if launch.grid[1:] != (1, 1):
            raise ValueError(f"{launch.kernel}: grid must have one dimension, got {launch.grid}")
        values: dict[str, Any] = {"global_smem": 0}
        buffers: list[Buffer] = []
        given = [launch.arguments[name] for name in launch.variant.types]
        program = decoded.program
        for (kind, name), value in zip(program.params, given, strict=False):
            values[name] = _bits(value, kind)
            if isinstance(value, torch.Tensor):
                buffers += _storage(value, name)
        for _, name in program.params[len(given) :]:  # scratch memory, of which none is asked for
            values[name] = 0
        for name, content in program.constants.items():
            held = np.frombuffer(bytearray(content), np.uint8)
            values[name] = held.ctypes.data
            buffers.append((held.ctypes.data, held, name))
        memory = GlobalMemory(buffers)
        decoded.run(launch.grid[0], values, memory, shared, self.random)
        self.launches += 1
        self.accesses[launch.kernel].update(memory.accesses)

    def _kernel(self, variant: fake_driver.Variant) -> tuple[Decoded, int]:
        key = (variant.kernel, variant.key)
        if key not in self.decoded:
            compiled = triton.compile(
                variant.source(), target=fake_driver.TARGET, options=variant.options
            )
            program = parse(compiled.asm["ptx"])
            if self.change is not None:
                self.change(variant.kernel, program)
            self.decoded[key] = Decoded(program), compiled.metadata.shared
        return self.decoded[key]


def _bits(value: Any, kind: str) -> Any:
    """A parameter's bits as an unsigned integer."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if isinstance(value, float):
        exact = np.float32(value) if kind == "f32" else np.float64(value)
        return exact.view(f"u{exact.itemsize}")
    width = int(kind[1:])
    return int(value) & (1 << width) - 1


def _storage(x: torch.Tensor, name: str) -> list[Buffer]:
    storage = x.untyped_storage()
    if not storage.nbytes():
        return []
    held = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
    return [(storage.data_ptr(), np.frombuffer(held, np.uint8), name)]


@contextlib.contextmanager
def interpreted(seed: int = 0, change: Change | None = None) -> Iterator[Gpu]:
    """The GPU on which launches inside the block run."""
    gpu = Gpu(seed, change)
    with fake_driver.recording(gpu):
        yield gpu
