"""Shared memory of a batch of blocks, with a detector of races between warps.

Between two barriers of its block, what one warp has written no other may read or overwrite, and
what one has read no other may write; only equal values may be written twice. What was never
written may not be read.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from ptx_memory import GpuError

WARP = 32
_NEVER, _SEVERAL = -1, -2


class SharedMemory:
    """`size` bytes for each of `blocks` blocks of `threads` threads, in units of `unit` bytes."""

    def __init__(self, size: int, blocks: int, threads: int, unit: int) -> None:
        self.size, self.unit = -(-max(size, 16) // 16) * 16, unit
        self.block = np.repeat(np.arange(blocks), threads)  # of each lane
        self.warp = np.arange(blocks * threads) // WARP
        self.first = self.block * self.size
        self.bytes = np.full(blocks * self.size, 0xA5, np.uint8)
        self.views = {size: self.bytes.view(f"u{size}") for size in (1, 2, 4, 8)}
        self.epoch = np.zeros(blocks, np.int64)  # barriers that each block has passed
        units = blocks * self.size // unit
        # Epoch of each warp's last store to global memory.
        self.stored = np.full((blocks, -(-threads // WARP)), _NEVER, np.int64)
        self.written = np.full(units, _NEVER, np.int64)  # epoch of the last write, and its warp
        self.writer = np.full(units, _NEVER, np.int64)
        self.read = np.full(units, _NEVER, np.int64)
        self.reader = np.full(units, _NEVER, np.int64)

    def _places(
        self, lanes: NDArray[np.int64], at: NDArray[np.int64], width: int
    ) -> NDArray[np.int64]:
        """Places of the lanes' accesses in the memory of all blocks."""
        if (at % width).any():
            bad = at[at % width != 0][0]
            raise GpuError(f"shared access to {bad}, which is not aligned to {width} bytes")
        if at.min() < 0 or at.max() + width > self.size:
            raise GpuError(
                f"shared access to {at.min()} ... {at.max()} + {width} of {self.size} bytes"
            )
        return self.first[lanes] + at

    def _units(self, place: NDArray[np.int64], width: int) -> NDArray[np.int64]:
        first = place // self.unit
        return first[:, None] + np.arange(max(width // self.unit, 1))

    def load(
        self, lanes: NDArray[np.int64], at: NDArray[np.int64], size: int, count: int
    ) -> list[NDArray[np.generic]]:
        """`count` neighbours of `size` bytes at each lane's address."""
        place = self._places(lanes, at, size * count)
        units = self._units(place, size * count)
        epoch, warp = self.epoch[self.block[lanes]][:, None], self.warp[lanes][:, None]
        written = self.written[units]
        if (written == _NEVER).any():
            raise GpuError("read of shared memory that nothing has written")
        if ((written == epoch) & (self.writer[units] != warp)).any():
            raise GpuError("race: read of what another warp wrote since the last barrier")
        self._note_read(units, epoch, warp)
        view, place = self.views[size], place // size
        return [view[place + k] for k in range(count)]

    def _note_read(
        self, units: NDArray[np.int64], epoch: NDArray[np.int64], warp: NDArray[np.int64]
    ) -> None:
        before = (self.read[units] == epoch) & (self.reader[units] != warp)
        self.read[units] = np.broadcast_to(epoch, units.shape)
        self.reader[units] = np.broadcast_to(warp, units.shape)
        several = before | (self.reader[units] != warp)  # of equal units the last lane's is kept
        if several.any():
            self.reader[units[several]] = _SEVERAL

    def store(
        self,
        lanes: NDArray[np.int64],
        at: NDArray[np.int64],
        size: int,
        values: list[NDArray[np.generic]],
    ) -> None:
        """Neighbours of `size` bytes written to each lane's address."""
        width = size * len(values)
        place = self._places(lanes, at, width)
        units = self._units(place, width)
        epoch, warp = self.epoch[self.block[lanes]][:, None], self.warp[lanes][:, None]
        if ((self.read[units] == epoch) & (self.reader[units] != warp)).any():
            raise GpuError("race: write over what another warp read since the last barrier")
        view, place = self.views[size], place // size
        over = ((self.written[units] == epoch) & (self.writer[units] != warp)).any(axis=1)
        for k, value in enumerate(values):
            if (view[place[over] + k] != value[over]).any():
                raise GpuError("race: write over what another warp wrote since the last barrier")
        for k, value in enumerate(values):
            view[place + k] = value
        for k, value in enumerate(values):
            lost = view[place + k] != value
            if lost.any() and (self.warp[lanes] != self._last(place, lanes))[lost].any():
                raise GpuError("race: two warps write different values to one place")
        self.written[units] = np.broadcast_to(epoch, units.shape)
        self.writer[units] = np.broadcast_to(warp, units.shape)

    def note_global_store(self, lanes: NDArray[np.int64]) -> None:
        self.stored.reshape(-1)[self.warp[lanes]] = self.epoch[self.block[lanes]]

    def check_release(self, lanes: NDArray[np.int64]) -> None:
        """Every store of a block's other warps is behind a barrier where a thread releases."""
        block, warp = self.block[lanes], self.warp[lanes]
        late = self.stored[block] == self.epoch[block][:, None]
        late[np.arange(len(lanes)), warp - block * self.stored.shape[1]] = False
        if late.any():
            raise GpuError("race: a release that another warp's store does not precede")

    def _last(self, place: NDArray[np.int64], lanes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Warp whose value stands at each place after a store."""
        last = np.zeros(int(place.max()) + 1, np.int64)
        last[place] = self.warp[lanes]
        return last[place]
