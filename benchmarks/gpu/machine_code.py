"""Machine code of NVIDIA GPUs as cuobjdump prints it: instructions, loops, the path that counts.

A kernel's instructions become basic blocks and a graph of them. Loops are the natural loops of
that graph (Aho, Lam, Sethi, Ullman, Compilers, 9.6.6). Where a branch chooses between ways to do
the same, the one that is counted moves the most bytes at a time: see `Code.path`.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(@!?U?P\w+ )?([A-Z][\w.]+)([^;]*);")
_BYTE, _SHARED_BYTE = 10**7, 10**4  # instructions that a byte moved is worth


class Instruction(NamedTuple):
    """One of a kernel's machine instructions."""

    address: int
    name: str
    operands: str
    guard: str = ""  # the predicate, "@P0" or "@!P0"

    @property
    def kind(self) -> str:
        """The name without its modifiers."""
        return self.name.split(".")[0]

    @property
    def target(self) -> int | None:
        """The address that it names, if any."""
        found = re.search(r"\b0x([0-9a-f]+)\s*$", self.operands.strip())
        return int(found[1], 16) if found else None


class Resources(NamedTuple):
    """Registers and stack of a thread, and static shared memory of a block."""

    registers: int
    stack: int
    shared: int


def disassembler() -> Path | None:
    """cuobjdump, from the PATH or as Triton's package bundles it."""
    if found := shutil.which("cuobjdump"):
        return Path(found)
    import triton

    bundled = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return bundled if bundled.is_file() else None


def _said(path: Path, *options: str) -> str:
    return subprocess.run(
        [str(disassembler()), *options, str(path)], capture_output=True, text=True, check=True
    ).stdout


def parse(text: str) -> dict[str, list[Instruction]]:
    """The instructions of every kernel of a listing, by mangled name."""
    return {
        part.split("\n", 1)[0].strip(): [
            Instruction(int(a, 16), name, rest, guard.strip())
            for a, guard, name, rest in _INSTRUCTION.findall(part)
        ]
        for part in text.split("Function : ")[1:]
    }


def _of(architecture: str | None) -> list[str]:
    return ["-arch", architecture] if architecture else []


@functools.cache
def machine_code(path: Path, architecture: str | None = None) -> dict[str, list[Instruction]]:
    """The same of an object file, or of a cubin, which has one architecture."""
    return parse(_said(path, "-sass", *_of(architecture)))


@functools.cache
def resources(path: Path, architecture: str | None = None) -> dict[str, Resources]:
    """Each kernel's registers, stack and static shared memory."""
    text = _said(path, "-res-usage", *_of(architecture))
    found = re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", text, flags=re.DOTALL
    )
    return {name: Resources(*map(int, numbers)) for name, *numbers in found}


class Loop(NamedTuple):
    """A natural loop: its first block, all of its blocks, and the loops right inside."""

    head: int
    blocks: frozenset[int]
    inner: tuple[Loop, ...]


class Code:
    """Blocks of a kernel's instructions, by number, and the edges between them."""

    def __init__(self, instructions: Iterable[Instruction]) -> None:
        self.blocks: list[list[Instruction]] = []
        self.after: list[list[int]] = []
        self._split(list(instructions))
        self.dominators = self._dominators()
        self.loops = self._loops()

    def _split(self, code: list[Instruction]) -> None:
        targets = {x.target for x in code if x.kind in ("BRA", "BSSY", "CALL", "BRX")}
        ends = ("BRA", "EXIT", "RET", "BSYNC", "CALL", "BRX", "BREAK")
        start_of: dict[int, int] = {}
        for i, x in enumerate(code):
            if i == 0 or x.address in targets or code[i - 1].kind in ends:
                start_of[x.address] = len(self.blocks)
                self.blocks.append([])
            self.blocks[-1].append(x)
        # Where BSYNC goes: to the target of the BSSY before it that names the same register.
        meets: dict[str, int | None] = {}
        for number, block in enumerate(self.blocks):
            for x in block:
                if x.kind == "BSSY":
                    meets[x.operands.split(",")[0].strip()] = x.target
            last = block[-1]
            onward = [number + 1] if number + 1 < len(self.blocks) else []
            self.after.append(
                [
                    *(start_of[a] for a in _jumps(last, meets) if a in start_of),
                    *(onward if _falls_through(last) else []),
                ]
            )

    def _dominators(self) -> dict[int, frozenset[int]]:
        """Of each block that is reached, the blocks on every way to it."""
        order, seen = [], set()
        stack = [(0, iter(self.after[0] if self.after else []))] if self.blocks else []
        seen.add(0)
        while stack:
            number, rest = stack[-1]
            for following in rest:
                if following not in seen:
                    seen.add(following)
                    stack.append((following, iter(self.after[following])))
                    break
            else:
                order.append(number)
                stack.pop()
        order.reverse()
        self.order = order
        before: dict[int, list[int]] = {n: [] for n in order}
        for n in order:
            for following in self.after[n]:
                before[following].append(n)
        self.before = before
        found = {n: frozenset(order) for n in order}
        if order:
            found[0] = frozenset([0])
        changed = True
        while changed:
            changed = False
            for n in order[1:]:
                new = frozenset.intersection(*(found[p] for p in before[n])) | {n}
                if new != found[n]:
                    found[n], changed = new, True
        return found

    def _loops(self) -> tuple[Loop, ...]:
        """The outermost loops, in the order of their first blocks."""
        bodies: dict[int, set[int]] = {}
        for n in self.order:
            for head in self.after[n]:
                if head in self.dominators[n]:
                    body = bodies.setdefault(head, {head})
                    stack = [n]
                    while stack:
                        block = stack.pop()
                        if block not in body:
                            body.add(block)
                            stack += self.before[block]

        def within(allowed: set[int], heads: list[int]) -> tuple[Loop, ...]:
            found = []
            for head in heads:
                if any(head in bodies[h] and h != head for h in heads):
                    continue  # inside another of these
                inner = [h for h in heads if h != head and h in bodies[head]]
                found.append(Loop(head, frozenset(bodies[head]), within(bodies[head], inner)))
            return tuple(found)

        return within(set(self.order), sorted(bodies))

    def every_loop(self) -> list[Loop]:
        """All loops, the outer ones before those inside."""

        def walk(loops: Iterable[Loop]) -> list[Loop]:
            return [x for loop in loops for x in (loop, *walk(loop.inner))]

        return walk(self.loops)

    def reached(self, start: Iterable[int], edges: Sequence[Sequence[int]]) -> set[int]:
        """The blocks that `edges` lead to from these, which are among them."""
        found, stack = set(start), list(start)
        while stack:
            new = set(edges[stack.pop()]) - found
            found |= new
            stack += new
        return found

    def behind(self, kinds: tuple[str, ...]) -> set[int]:
        """The blocks after the last instruction of these kinds: reached from one, and none from
        there.
        """
        at = {n for n in self.order if any(x.kind in kinds for x in self.blocks[n])}
        before = [self.before.get(n, []) for n in range(len(self.blocks))]
        return self.reached(at, self.after) - self.reached(at, before)

    def path(
        self, start: int, ends: set[int], blocks: frozenset[int], inner: tuple[Loop, ...]
    ) -> list[int]:
        """The blocks from `start` to one of `ends` within `blocks` that are worth most (`_Worth`).

        A loop inside is passed through once, and what it holds is left out.
        """
        home = {b: loop for loop in inner for b in loop.blocks}
        worth = _Worth(self.blocks[b] for b in blocks if b not in home)
        # A way past a loop is not taken for one through it.
        through = {
            loop.head: max(1, sum(worth.bytes_of(self.blocks[n]) for n in loop.blocks))
            for loop in inner
        }
        known: dict[int, tuple[int, tuple[int, ...]] | None] = {}

        def best(block: int, first: bool) -> tuple[int, tuple[int, ...]] | None:
            if block not in blocks or (block == start and not first):
                return None
            loop = home.get(block)
            key = loop.head if loop else block
            if key in known:
                return known[key]
            known[key] = None  # a cycle that is no natural loop ends here
            members = loop.blocks if loop else frozenset([block])
            own = through[loop.head] if loop else worth.of(self.blocks[block])
            found = (own, () if loop else (block,)) if members & ends else None
            for member in sorted(members):
                for following in self.after[member]:
                    rest = None if following in members else best(following, False)
                    if rest and (found is None or own + rest[0] > found[0]):
                        found = (own + rest[0], (() if loop else (block,)) + rest[1])
            known[key] = found
            return found

        answer = best(start, True)
        return list(answer[1]) if answer else []

    def turn(self, loop: Loop) -> list[Instruction]:
        """The instructions of one turn of a loop, without the loops inside."""
        ends = {n for n in loop.blocks if loop.head in self.after[n]}
        return self._of(self.path(loop.head, ends, loop.blocks, loop.inner))

    def once(self) -> list[Instruction]:
        """The instructions outside of all loops, from the entry to the end."""
        ends = {n for n in self.order if not self.after[n]}
        if not ends:  # the last thing is a loop, which is left by an EXIT under a condition
            ends = {n for n in self.order if self.blocks[n][-1].kind == "EXIT"}
        return self._of(self.path(0, ends, frozenset(self.order), self.loops))

    def _of(self, blocks: Iterable[int]) -> list[Instruction]:
        return [x for n in blocks for x in self.blocks[n]]


def innermost(instructions: Iterable[Instruction]) -> list[list[str]]:
    """The names of the instructions of each loop that holds no other."""
    code = Code(instructions)
    return [
        [x.name for n in sorted(loop.blocks) for x in code.blocks[n]]
        for loop in code.every_loop()
        if not loop.inner
    ]


def _jumps(last: Instruction, meets: dict[str, int | None]) -> list[int]:
    """Addresses that a block's last instruction may jump to."""
    if last.kind == "BSYNC":
        target = meets.get(last.operands.strip())
        return [] if target is None else [target]
    return [last.target] if last.kind in ("BRA", "CALL") and last.target is not None else []


def _falls_through(last: Instruction) -> bool:
    """True if the next instruction may follow."""
    if last.kind == "BRA":
        condition = last.operands.strip().startswith(("P", "!P", "U", "!U", "R"))
        return bool(last.guard) or condition or ".DIV" in last.name
    if last.kind in ("EXIT", "RET", "BRX", "BSYNC"):
        return bool(last.guard)
    return True


def width(x: Instruction) -> int:
    """Bytes that an access moves per thread."""
    for part in x.name.split(".")[1:]:
        if part in ("128", "64"):
            return int(part) // 8
        if part in ("U8", "S8"):
            return 1
        if part in ("U16", "S16", "16"):
            return 2
    return 4


class _Worth:
    """Worth of blocks, among those that a path chooses from.

    The bytes of global accesses come first, those of shared ones next, and then the fewest
    instructions: what is optional is not there, and what is there is moved. Where there is a
    16-byte load (or store), narrower ones are for rows that do not allow it: they count against a
    path. So does a byte, a flag of an optional mask, and a call, the slow way of a division.
    """

    def __init__(self, blocks: Iterable[list[Instruction]]) -> None:
        self.wide = {x.kind for block in blocks for x in block if width(x) == 16}

    def of(self, block: list[Instruction]) -> int:
        return self.bytes_of(block) - len(block)

    def bytes_of(self, block: list[Instruction]) -> int:
        """The same without the instructions."""
        worth = 0
        for x in block:
            if x.kind in ("LDG", "STG", "LD", "ST"):
                narrow = width(x) == 1 or (width(x) < 16 and x.kind in self.wide)
                worth += -_BYTE if narrow else _BYTE * width(x)
            elif x.kind in ("LDS", "STS"):
                worth += _SHARED_BYTE * width(x)
            elif x.kind in (
                "ATOM",
                "ATOMG",
            ):  # by one thread of a block, so there is a way past it
                worth += _BYTE
            elif x.kind == "CALL":
                worth -= _BYTE
        return worth
