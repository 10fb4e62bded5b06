"""Tallies of machine code: what instructions take of each unit, and how often they wait."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.gpu.machine_code import Instruction, Resources, width

# Of a multiprocessor of compute capability 9.0: CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability".
REGISTERS, WARPS, BLOCKS, SHARED = 65536, 64, 32, 228 * 1024
_OWN_SHARED = 1024  # what the system keeps of every block's, in what cuobjdump reports

_LOADS, _STORES = ("LDG", "LD"), ("STG", "ST")
_FP64 = ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX")
_CONVERSIONS = ("F2F", "I2F", "F2I")  # on the unit of MUFU where one side has 64 bits
_ATOMICS = ("ATOM", "ATOMG", "ATOMS")
_TO_MEMORY = (*_STORES, "STS", "RED", "REDG", "BAR", "MEMBAR", "BRA", "EXIT", "CCTL", "ERRBAR")


def tally(code: Sequence[Instruction]) -> dict[str, Any]:
    """Counts by unit: those that are 0 are left out."""
    kinds = Counter(x.kind for x in code)
    found: dict[str, Any] = {"instructions": len(code)}
    found["mufu"] = kinds["MUFU"] + sum(x.kind in _CONVERSIONS and "64" in x.name for x in code)
    found["fp64"] = sum(kinds[name] for name in _FP64)
    found["barriers"] = kinds["BAR"]
    found["shuffles"] = kinds["SHFL"]
    found["atomics"] = sum(kinds[name] for name in _ATOMICS)
    found["bulk_copies"] = kinds["UBLKCP"]
    found["loads"] = _widths(code, _LOADS)
    found["stores"] = _widths(code, _STORES)
    found["shared_loads"] = _widths(code, ("LDS",))
    found["shared_stores"] = _widths(code, ("STS",))
    found["rounds"] = rounds(code)
    return {name: value for name, value in found.items() if value}


def _widths(code: Iterable[Instruction], kinds: tuple[str, ...]) -> dict[str, int]:
    """Accesses by their bytes a thread, the widest first."""
    found = Counter(width(x) for x in code if x.kind in kinds)
    return {str(bytes_): found[bytes_] for bytes_ in sorted(found, reverse=True)}


def moved(widths: dict[str, int]) -> int:
    """Bytes of a thread's accesses."""
    return sum(int(bytes_) * count for bytes_, count in widths.items())


def rounds(code: Iterable[Instruction]) -> int:
    """The longest chain of global loads, each waiting for the one before, that anything waits for.

    Values are followed through registers, predicates and shared memory as one cell. What is behind
    a branch waits for the branch's predicate, and what is behind a barrier for what was stored.
    """
    depth: dict[str, int] = {}
    shared = control = longest = 0
    for x in code:
        to, sources = _operands(x)
        waits = max([control, *(depth.get(name, 0) for name in sources)])
        if x.kind == "LDS":
            waits = max(waits, shared)
        longest = max(longest, waits)
        if x.kind == "STS":
            shared = max(shared, waits)
        elif x.kind in ("BRA", "EXIT", "BSYNC"):
            control = waits
        elif x.kind == "BAR":
            control = max(control, shared)
        gives = waits + (x.kind in (*_LOADS, "ATOM", "ATOMG"))
        for name in to:
            depth[name] = gives
    return longest


def _operands(x: Instruction) -> tuple[list[str], list[str]]:
    """Registers and predicates that an instruction writes, and those that it reads."""
    parts = [part.strip() for part in x.operands.split(",")]
    names = [re.findall(r"\b(U?[RP]\d+)(\.64)?", part) for part in parts]
    count = 0 if x.kind in _TO_MEMORY else 1
    # Comparisons and carries write one or two predicates first, or behind the register.
    while 0 < count < len(parts) and re.fullmatch(r"!?U?P[T\d]+", parts[count]) and count < 3:
        count += 1
    written = [name for part in names[:count] for name, _ in part]
    if count and written and written[0].lstrip("U").startswith("R"):
        prefix, first = re.fullmatch(r"(U?R)(\d+)", written[0]).groups()
        words = width(x) // 4 if x.kind in (*_LOADS, "LDS") else _words(x)
        written += [f"{prefix}{int(first) + i}" for i in range(1, words)]
    read = [name for part in names[count:] for name, _ in part]
    wide = [name for part in names[count:] for name, pair in part if pair and name[0] == "R"]
    read += [f"R{int(name[1:]) + 1}" for name in wide]
    return written, [*read, *re.findall(r"U?P\d", x.guard)]


def _words(x: Instruction) -> int:
    """Registers of a result that is no load's."""
    wide = x.kind in _FP64 or ".WIDE" in x.name or ".F64" in x.name or x.name.endswith(".64")
    return 2 if wide else 1


def residency(resources: Resources, threads: int, shared: int) -> int:
    """Blocks that a multiprocessor holds at once: registers go to warps by 8 a thread."""
    warps = -(-threads // 32)
    registers = -(-resources.registers // 8) * 8 * 32
    by_registers = REGISTERS // registers // 4 * 4 // warps
    by_shared = SHARED // (max(resources.shared, _OWN_SHARED) + shared)
    return min(by_registers, by_shared, WARPS // warps, BLOCKS)


def until_arrival(path: list[Instruction]) -> list[Instruction]:
    """A path as far as to a block's arrival; what the last block does comes after it."""
    arrivals = [i for i, x in enumerate(path) if x.kind in ("ATOM", "ATOMG")]
    return path[: arrivals[-1] + 1] if arrivals else path
