"""Global memory of the interpreted GPU: known buffers, bounds and alignment."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Lanes = NDArray[np.uint64]


class GpuError(Exception):
    """An access or a barrier that a GPU would refuse, or that it would not order."""


class GlobalMemory:
    """Buffers of CPU memory at their own addresses; nothing else exists."""

    def __init__(self, buffers: Iterable[tuple[int, NDArray[np.uint8], str]]) -> None:
        found = {base: (data, name) for base, data, name in buffers if data.size}
        self.bases = sorted(found)
        self.data = [found[base][0] for base in self.bases]
        self.names = [found[base][1] for base in self.bases]
        self.typed: dict[tuple[int, int], NDArray[np.generic]] = {}
        self.accesses: Counter[int] = Counter()  # of threads, by their bytes

    def buffer_of(self, low: int, high: int) -> int:
        """Index of the buffer that holds the bytes [low, high)."""
        i = bisect.bisect_right(self.bases, low) - 1
        if i < 0 or high > self.bases[i] + self.data[i].size:
            known = ", ".join(
                f"{name} [{base:#x}, {base + data.size:#x})"
                for base, data, name in zip(self.bases, self.data, self.names, strict=True)
            )
            raise GpuError(
                f"global access to [{low:#x}, {high:#x}), outside of every tensor: {known}"
            )
        return i

    def _places(self, at: Lanes, size: int, count: int) -> tuple[int, NDArray[np.int64]]:
        """Buffer of all the addresses, and each one's index in units of `size` bytes."""
        width = size * count
        if (at & np.uint64(width - 1)).any():
            bad = int(at[(at & np.uint64(width - 1)) != 0][0])
            raise GpuError(f"global access to {bad:#x}, which is not aligned to {width} bytes")
        i = self.buffer_of(int(at.min()), int(at.max()) + width)
        self.accesses[width] += len(at)
        offset = (at - np.uint64(self.bases[i])).astype(np.int64)
        return i, offset // size

    def _view(self, i: int, size: int) -> NDArray[np.generic]:
        """A buffer as unsigned integers of `size` bytes."""
        view = self.typed.get((i, size))
        if view is None:
            data = self.data[i]
            view = data[: data.size // size * size].view(f"u{size}")
            self.typed[i, size] = view
        return view

    def load(self, at: Lanes, size: int, count: int) -> list[NDArray[np.generic]]:
        """`count` neighbours of `size` bytes at each address, as unsigned integers."""
        i, place = self._places(at, size, count)
        view = self._view(i, size)
        return [view[place + k] for k in range(count)]

    def store(self, at: Lanes, size: int, values: list[NDArray[np.generic]]) -> None:
        """Neighbours of `size` bytes written to each address; of equal ones the last lane's."""
        i, place = self._places(at, size, len(values))
        view = self._view(i, size)
        for k, value in enumerate(values):
            view[place + k] = value
