"""Instructions that move data: loads, stores, atomics, shuffles, reductions of a warp."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from ptx_memory import GpuError
from ptx_parse import Instruction, address, members
from ptx_registers import TYPES, Lanes, Reader, Slots, Values
from ptx_shared import WARP

if TYPE_CHECKING:
    from ptx_machine import Batch

Step = Callable[["Batch", "Lanes | None"], None]
_VECTORS = {"v2": 2, "v4": 4, "v8": 8}
_STATES = {"global", "shared", "shared::cta", "param"}
_REDUCE = {"add": np.add, "max": np.maximum, "min": np.minimum, "and": np.bitwise_and}
_REDUCE |= {"or": np.bitwise_or}


def _plan(i: Instruction, slots: Slots, place: str) -> tuple[str, Any, int, Reader]:
    """State space, element type, elements and reader of the addresses of an access."""
    space = next((part for part in i.op if part in _STATES), None)
    if space is None:
        raise ValueError(f"state space of {i.text!r} is not known")
    base, offset = address(place)
    width = TYPES["u64"] if space == "global" else TYPES["u32"]
    read = slots.reader(base, width)
    shift = width.type(offset & (1 << 8 * width.itemsize) - 1)
    count = next((n for part, n in _VECTORS.items() if part in i.op), 1)
    return space, TYPES[i.op[-1]], count, lambda r, g: read(r, g) + shift


def _all(b: Batch, g: Lanes | None) -> Lanes:
    return b.every if g is None else g


def load(i: Instruction, slots: Slots) -> Step:
    if i.op[1] == "param":
        return _load_param(i, slots)
    space, dtype, count, at = _plan(i, slots, i.operands[1])
    writers = [slots.writer(name) for name in members(i.operands[0])]
    size = dtype.itemsize
    if len(writers) != count:
        raise ValueError(f"{i.text!r} loads {count} values")

    def step(b: Batch, g: Lanes | None) -> None:
        if space == "global":
            found = b.memory.load(at(b.r, g), size, count)
        else:
            found = b.shared.load(_all(b, g), at(b.r, g).astype(np.int64), size, count)
        for write, value in zip(writers, found, strict=True):
            write(b.r, g, value.view(dtype))

    return step


def _matrix(i: Instruction, slots: Slots, place: str) -> tuple[Reader, int, Any]:
    """Addresses of the rows, matrices, and address of each thread's part of a matrix.

    A matrix has eight rows of 16 bytes, whose addresses the threads 8k ... 8k + 7 of a warp give;
    thread t has the 4 bytes t % 4 of row t / 4.
    """
    if "m8n8" not in i.op or "trans" in i.op or not _STATES & set(i.op):
        raise ValueError(f"only rows of 8x8 matrices are known, got {i.text!r}")
    _, _, _, at = _plan(i, slots, place)
    count = next(int(part[1:]) for part in i.op if part in ("x1", "x2", "x4"))
    lane = np.arange(WARP)

    def part(rows: Values, matrix: int) -> Values:
        if (rows % 16).any():
            raise GpuError("a matrix's row is not aligned to 16 bytes")
        picked = rows.astype(np.int64).reshape(-1, WARP)[:, 8 * matrix + lane // 4]
        return (picked + 4 * (lane % 4)).reshape(-1)

    return at, count, part


def load_matrix(i: Instruction, slots: Slots) -> Step:
    at, count, part = _matrix(i, slots, i.operands[1])
    writers = [slots.writer(name) for name in members(i.operands[0])]

    def step(b: Batch, g: Lanes | None) -> None:
        lanes, rows = _whole_warps(i, b, g), at(b.r, g)
        for k, write in zip(range(count), writers, strict=True):
            (found,) = b.shared.load(lanes, part(rows, k), 4, 1)
            write(b.r, g, found)

    return step


def store_matrix(i: Instruction, slots: Slots) -> Step:
    at, count, part = _matrix(i, slots, i.operands[0])
    readers = [slots.reader(name, TYPES["u32"]) for name in members(i.operands[1])]

    def step(b: Batch, g: Lanes | None) -> None:
        lanes, rows = _whole_warps(i, b, g), at(b.r, g)
        for k, read in zip(range(count), readers, strict=True):
            b.shared.store(lanes, part(rows, k), 4, [read(b.r, g)])

    return step


def _load_param(i: Instruction, slots: Slots) -> Step:
    name, offset = address(i.operands[1])
    if offset:
        raise ValueError(f"parameters are scalars, got {i.text!r}")
    dtype = TYPES[i.op[-1]]
    slot, write = slots.named(name), slots.writer(i.operands[0])
    unsigned = np.dtype(f"u{dtype.itemsize}")

    def step(b: Batch, g: Lanes | None) -> None:
        value = b.r[slot] if g is None else b.r[slot][g]
        write(b.r, g, value.astype(unsigned).view(dtype))

    return step


def store(i: Instruction, slots: Slots) -> Step:
    space, dtype, count, at = _plan(i, slots, i.operands[0])
    unsigned = np.dtype(f"u{dtype.itemsize}")
    readers = [slots.reader(name, unsigned) for name in members(i.operands[1])]
    size = dtype.itemsize
    if len(readers) != count:
        raise ValueError(f"{i.text!r} stores {count} values")

    def step(b: Batch, g: Lanes | None) -> None:
        values = [read(b.r, g) for read in readers]
        if space == "global":
            b.shared.note_global_store(_all(b, g))
            b.memory.store(at(b.r, g), size, values)
        else:
            b.shared.store(_all(b, g), at(b.r, g).astype(np.int64), size, values)

    return step


def atomic(i: Instruction, slots: Slots) -> Step:
    """atom.add of integers: lanes in random order, each sees what those before it left.

    One that releases must find the other warps' stores behind a barrier, or their order is open.
    """
    space, dtype, _, at = _plan(i, slots, i.operands[1])
    if "add" not in i.op or space != "global" or dtype.kind not in "iu":
        raise ValueError(f"only integers are added in global memory, got {i.text!r}")
    write, read = slots.writer(i.operands[0]), slots.reader(i.operands[2], dtype)

    def step(b: Batch, g: Lanes | None) -> None:
        places, values = at(b.r, g), read(b.r, g)
        if {"acq_rel", "release"} & set(i.op):
            b.shared.check_release(_all(b, g))
        old = np.empty_like(values)
        for k in b.random.sample(range(len(values)), len(values)):
            place = places[k : k + 1]
            (found,) = b.memory.load(place, dtype.itemsize, 1)
            old[k] = found.view(dtype)[0]
            b.memory.store(place, dtype.itemsize, [found + values[k : k + 1].view(found.dtype)])
        write(b.r, g, old)

    return step


def _whole_warps(i: Instruction, b: Batch, g: Lanes | None) -> Lanes:
    """The lanes, of which each warp's must be all here."""
    if g is None:
        return b.every
    if len(g) % WARP or (g.reshape(-1, WARP)[:, -1] - g.reshape(-1, WARP)[:, 0] != WARP - 1).any():
        raise GpuError(f"a part of a warp reaches {i.text!r}")
    return g


def shuffle(i: Instruction, slots: Slots) -> Step:
    mode, (target, *rest) = i.op[2], i.operands
    if int(rest[3], 0) not in (-1, 0xFFFFFFFF) or "|" in target:
        raise ValueError(f"only shuffles of whole warps are known, got {i.text!r}")
    write, read = slots.writer(target), slots.reader(rest[0], TYPES["u32"])
    distance, bound = slots.reader(rest[1], TYPES["s32"]), int(rest[2], 0) & 31
    lane = np.arange(WARP)

    def source(by: Values) -> Values:
        if mode == "idx":
            found = by & 31
        else:
            found = {"bfly": lane ^ by, "up": lane - by, "down": lane + by}[mode]
        inside = found >= bound if mode == "up" else found <= bound
        return np.where(inside, found, lane)

    def step(b: Batch, g: Lanes | None) -> None:
        _whole_warps(i, b, g)
        values = read(b.r, g).reshape(-1, WARP)
        pick = source(distance(b.r, g).reshape(-1, WARP).astype(np.int64))
        write(b.r, g, np.take_along_axis(values, pick, axis=1).reshape(-1))

    return step


def reduction(i: Instruction, slots: Slots) -> Step:
    dtype, f = TYPES[i.op[-1]], _REDUCE[i.op[2]]
    write, read = slots.writer(i.operands[0]), slots.reader(i.operands[1], dtype)

    def step(b: Batch, g: Lanes | None) -> None:
        _whole_warps(i, b, g)
        values = f.reduce(read(b.r, g).reshape(-1, WARP), axis=1, dtype=dtype)
        write(b.r, g, np.repeat(values, WARP))

    return step


def move(i: Instruction, slots: Slots) -> Step:
    """mov: a copy, or the halves of a register taken apart or put together."""
    dtype = TYPES[i.op[-1]]
    target, value = i.operands
    if target.startswith("{"):
        return _unpack(members(target), value, dtype, slots)
    write = slots.writer(target)
    if value.startswith("{"):
        return _pack(write, members(value), dtype, slots)
    read = slots.reader(value, dtype)
    return lambda b, g: write(b.r, g, read(b.r, g).copy())


def _unpack(names: list[str], value: str, dtype: Any, slots: Slots) -> Step:
    writers, read = [slots.writer(name) for name in names], slots.reader(value, dtype)
    part = np.dtype(f"u{dtype.itemsize // len(names)}")

    def step(b: Batch, g: Lanes | None) -> None:
        parts = np.ascontiguousarray(read(b.r, g)).view(part).reshape(-1, len(names))
        for k, write in enumerate(writers):
            write(b.r, g, parts[:, k].copy())

    return step


def _pack(write: Any, names: list[str], dtype: Any, slots: Slots) -> Step:
    part = np.dtype(f"u{dtype.itemsize // len(names)}")
    readers = [slots.reader(name, part) for name in names]

    def step(b: Batch, g: Lanes | None) -> None:
        parts = np.stack([read(b.r, g) for read in readers], axis=1)
        write(b.r, g, np.ascontiguousarray(parts).view(dtype).reshape(-1))

    return step


MOVES: dict[str, Callable[[Instruction, Slots], Step]] = {
    "ld": load,
    "st": store,
    "atom": atomic,
    "ldmatrix": load_matrix,
    "stmatrix": store_matrix,
    "shfl": shuffle,
    "redux": reduction,
    "mov": move,
}
