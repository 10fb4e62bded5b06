"""Rooms of csrc: one stem per op in every folder, and no device that includes the other."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
OPS = sorted(path.stem for path in (CSRC / "ops").glob("*.h"))
# Folder -> the folders that its files may include besides their own; "" is csrc itself.
ROOMS = {
    "": ("tensor", "cpu"),
    "tensor": (),
    "ops": ("", "tensor"),
    "cpu": ("", "tensor", "ops"),
    "cuda": ("", "tensor", "ops", "emulate"),
    "emulate": (),
}


def room_of(path: Path) -> str:
    """First folder below csrc; "" for csrc itself."""
    inside = path.relative_to(CSRC).parts
    return inside[0] if len(inside) > 1 else ""


def included(path: Path) -> list[Path]:
    """Own files that a file includes by a path."""
    names = re.findall(r'(?m)^#include "([^"]+)"', path.read_text())
    return [Path(os.path.normpath(path.parent / name)) for name in names]


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_one_stem(op: str) -> None:
    """ops/<op>.h, cpu/<family>/<op>.cpp and cuda/<family>/<op>.cu, in the same family."""
    (cpu,) = (CSRC / "cpu").rglob(f"{op}.cpp")
    (cuda,) = (CSRC / "cuda").rglob(f"{op}.cu")
    assert cpu.parent.name == cuda.parent.name
    assert CSRC / "ops" / f"{op}.h" in included(cpu)
    assert CSRC / "ops" / f"{op}.h" in included(cuda)


@pytest.mark.parametrize("room", ROOMS)
def test_includes_point_down(room: str) -> None:
    files = [p for e in ("*.h", "*.cpp", "*.cuh", "*.cu") for p in CSRC.rglob(e)]
    bad = {
        f"{path.relative_to(CSRC)}: {other.relative_to(CSRC)}"
        for path in files
        if room_of(path) == room
        for other in included(path)
        if not other.exists() or room_of(other) not in (room, *ROOMS[room])
    }
    assert not bad


def functions(text: str) -> set[str]:
    """Functions and operators that a header of lanes defines, those of a PPO_FOLD included."""
    names = re.findall(r"(?m)^PPO_(?:INLINE [^(]*?|FOLD\()(operator[^\w(]+|\w+)[(,]", text)
    return set(names)


def test_every_instruction_set_has_the_same_functions() -> None:
    """NEON beside the eight lanes of x86: no machine compiles both."""
    simd = CSRC / "cpu/simd"
    eight, sixteen = (simd / "x86.h").read_text().split("\n#else\nstruct F {")
    neon = functions((simd / "neon.h").read_text())
    assert {"operator!=", "reduce_max", "near_one", "or_later"} <= functions(eight)
    assert functions(eight) - neon == set()
    shared = functions(sixteen) & functions(eight)
    assert {"load_n_as", "store_mask_n", "select", "count", "vsqrt"} <= shared
    helpers = {"bf16_rounded", "earlier_of", "halves", "pow2_of"}
    assert neon - functions(eight) == helpers
