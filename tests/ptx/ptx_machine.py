"""Machine that runs a PTX program: blocks in random order, several of them in lockstep.

A batch is some blocks of a launch, drawn at random; its threads are the lanes of numpy arrays.
Lanes at one instruction are a group. The group that is furthest behind runs, until it reaches
another, which it joins: threads that a branch has parted meet again as soon as they can. An
instruction is decoded once, into a function of the batch and its lanes.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
from ptx_access import MOVES, Step
from ptx_arithmetic import arithmetic, comparison, conversion
from ptx_memory import GlobalMemory, GpuError
from ptx_parse import Instruction, Program
from ptx_registers import TYPES, Lanes, Slots, Values
from ptx_shared import WARP, SharedMemory

LANES = 4096  # of a batch, at most; one block has as many as it has threads
# What changes no value here: policies of the L2, order of memory (blocks run in lockstep).
_SILENT = {"createpolicy", "membar", "fence", "prefetch", "discard"}
_RUN, _BRANCH, _BARRIER, _RETURN = range(4)


class Decoded:
    """A program whose instructions are functions."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.slots = Slots()
        self.tid, self.cta, self.grid, self.lane = map(
            self.slots.register, ("%tid.x", "%ctaid.x", "%nctaid.x", "%laneid")
        )
        for _, name in program.params:
            self.slots.named(name)
        self.code = [self._decode(i) for i in program.code]
        self.reached = bytearray(len(self.code))  # 1 for an instruction that some thread has run
        accesses = [i for i in program.code if {"shared", "shared::cta"} & set(i.op)]
        sizes = [TYPES[i.op[-1]].itemsize for i in accesses]
        self.unit = min(sizes, default=4)

    def _decode(self, i: Instruction) -> tuple[int, Any, Any, bool, str]:
        """(kind, function or target, slot of the guard, its negation, text)."""
        guard = None if i.guard is None else self.slots.register(i.guard)
        kind, what = _RUN, None
        if i.name == "bra":
            kind, what = _BRANCH, self.program.labels[i.operands[0]]
        elif i.name in ("ret", "exit"):
            kind = _RETURN
        elif i.op[:2] in (("bar", "sync"), ("barrier", "sync")):
            kind = _BARRIER
            if i.operands != ("0",) or guard is not None:
                raise ValueError(f"only barrier 0 of all threads is known, got {i.text!r}")
        else:
            what = self._step(i)
        return kind, what, guard, i.negated, i.text

    def _step(self, i: Instruction) -> Step | None:
        if i.name in _SILENT or i.op == ("bar", "warp", "sync"):
            return None
        if i.name in MOVES:
            return MOVES[i.name](i, self.slots)
        if i.name == "selp":
            dtype = TYPES[i.op[-1]]
            return self._pure(
                i, (lambda a, b, p: np.where(p, a, b)), [dtype, dtype, TYPES["pred"]]
            )
        if i.name == "setp":
            return self._pure(i, *comparison(i))
        if i.name == "cvt":
            return self._pure(i, *conversion(i))
        found = arithmetic(i)
        if found is None:
            raise ValueError(f"instruction is not known: {i.text!r}")
        return self._pure(i, *found)

    def _pure(self, i: Instruction, f: Any, types: list[np.dtype[Any]]) -> Step:
        """A function of registers alone."""
        if len(types) != len(i.operands) - 1:
            raise ValueError(f"{i.text!r} takes {len(types)} operands")
        write = self.slots.writer(i.operands[0])
        readers = [
            self.slots.reader(text, dtype)
            for text, dtype in zip(i.operands[1:], types, strict=True)
        ]
        if len(readers) == 2:
            one, two = readers
            return lambda b, g: write(b.r, g, f(one(b.r, g), two(b.r, g)))
        if len(readers) == 1:
            (one,) = readers
            return lambda b, g: write(b.r, g, f(one(b.r, g)))
        return lambda b, g: write(b.r, g, f(*(read(b.r, g) for read in readers)))

    def run(
        self,
        grid: int,
        values: Mapping[str, Any],
        memory: GlobalMemory,
        shared: int,
        rng: random.Random,
    ) -> None:
        """A launch of `grid` blocks; `values`: bits of parameters, addresses of symbols."""
        order = rng.sample(range(grid), grid)
        most = max(1, LANES // self.program.threads)
        while order:
            taken = rng.randint(1, min(most, len(order)))
            batch = Batch(self, order[:taken], grid, values, memory, shared, rng)
            with np.errstate(all="ignore"):
                batch.run()
            del order[:taken]


class Batch:
    """Blocks of a launch that run in lockstep."""

    def __init__(
        self,
        decoded: Decoded,
        blocks: list[int],
        grid: int,
        values: Mapping[str, Any],
        memory: GlobalMemory,
        shared: int,
        rng: random.Random,
    ) -> None:
        self.decoded, self.memory, self.random = decoded, memory, rng
        self.threads = decoded.program.threads
        n = len(blocks) * self.threads
        self.every = np.arange(n)
        self.shared = SharedMemory(shared, len(blocks), self.threads, decoded.unit)
        self.r = decoded.slots.fresh(n)
        tid = np.tile(np.arange(self.threads, dtype=np.uint32), len(blocks))
        self.r[decoded.tid] = tid
        self.r[decoded.lane] = tid % np.uint32(WARP)
        self.r[decoded.cta] = np.repeat(np.array(blocks, np.uint32), self.threads)
        self.r[decoded.grid] = np.full(n, grid, np.uint32)
        for name, slot in decoded.slots.number.items():
            if name in values:
                self.r[slot] = np.full(n, values[name]).astype(decoded.slots.dtypes[slot])
        self.groups: dict[int, Lanes] = {0: self.every}  # instruction -> lanes that are to run it
        self.waiting: dict[int, Lanes] = {}  # barrier -> lanes
        self.arrived = np.zeros(len(blocks), np.int64)

    def run(self) -> None:
        """All blocks to their ends."""
        while self.groups:
            at = min(self.groups)
            lanes = self.groups.pop(at)
            try:
                self._advance(at, lanes)
            except GpuError as error:
                raise GpuError(f"{self.decoded.program.name}: {error}") from None
        if self.waiting:
            raise GpuError(
                f"{self.decoded.program.name}: some threads wait at a barrier for others that have"
                f" ended or wait at another"
            )

    def _join(self, at: int, lanes: Lanes) -> None:
        if len(lanes):
            here = self.groups.get(at)
            self.groups[at] = lanes if here is None else np.sort(np.concatenate([here, lanes]))

    def _advance(self, at: int, lanes: Lanes) -> None:
        """Run a group until it branches, waits, ends or meets another."""
        code, reached, r = self.decoded.code, self.decoded.reached, self.r
        meeting = min(self.groups, default=len(code))
        g = None if len(lanes) == len(self.every) else lanes
        while at < meeting:
            kind, what, guard, negated, text = code[at]
            active = g
            if guard is not None:
                taken = r[guard] if g is None else r[guard][g]
                taken = ~taken if negated else taken
                if kind != _RUN:
                    self._turn(kind, what, at, lanes, taken)
                    return
                if not taken.all():
                    active = lanes[taken]
            elif kind != _RUN:
                if kind == _BRANCH and what < meeting:
                    at = what
                    continue
                if kind == _BARRIER and g is None:
                    reached[at] = 1
                    self.shared.epoch += 1
                    at += 1
                    continue
                self._turn(kind, what, at, lanes, np.ones(len(lanes), bool))
                return
            if what is not None and (active is None or len(active)):
                reached[at] = 1
                try:
                    what(self, active)
                except GpuError as error:
                    raise GpuError(f"{error}, at {text!r}") from None
                except (TypeError, ValueError) as error:
                    raise RuntimeError(f"{text!r}: {error}") from error
            at += 1
        self._join(at, lanes)

    def _turn(self, kind: int, target: int, at: int, lanes: Lanes, taken: Values) -> None:
        """A branch, an end or a barrier; the lanes that go on join their groups."""
        self.decoded.reached[at] = 1
        if kind == _BARRIER:
            self._wait(at, lanes)
            return
        if kind == _BRANCH:
            self._join(target, lanes[taken])
        self._join(at + 1, lanes[~taken])

    def _wait(self, at: int, lanes: Lanes) -> None:
        """Lanes that reach a barrier; blocks of which all have reached this one go on."""
        block = self.shared.block
        self.arrived += np.bincount(block[lanes], minlength=len(self.arrived))
        here = self.waiting.pop(at, None)
        lanes = lanes if here is None else np.sort(np.concatenate([here, lanes]))
        if any(np.isin(block[lanes], block[other]).any() for other in self.waiting.values()):
            raise GpuError("threads of one block wait at different barriers")
        through = self.arrived == self.threads
        self.arrived[through] = 0
        self.shared.epoch[through] += 1
        goes = through[block[lanes]]
        self._join(at + 1, lanes[goes])
        if not goes.all():
            self.waiting[at] = lanes[~goes]
