"""Command for a part of the suite: `ppo-fast bench --op gae --shape 64x4096 --peers all`.

Cases are those of the files in `ops`. A shape that has no case there makes one: the op's
directions at that size. Options that are not listed go on to pytest.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.harness.selection import choose, is_peer, runs_here, taking_part
from benchmarks.ops.case import BATCH_MAJOR, DIRECTIONS, DTYPES, LAYOUTS, Case, Shape, here
from benchmarks.ops.registry import CASES, OPS, SHAPES
from benchmarks.peers import providers_of

_FREE = re.compile(r"(?P<dims>\d+(x\d+){1,2})(:(?P<layout>[a-z-]+))?")


class UnknownNameError(ValueError):
    """A name that nothing here has; the message lists those that there are."""

    def __init__(self, what: str, name: str, known: Iterable[str]) -> None:
        super().__init__(f"unknown {what} {name!r}; known: {', '.join(known)}")


def shape_of(text: str) -> Shape:
    """A named shape, or dimensions with a layout: `64x4096`, `4096x128:time-major`."""
    if text in SHAPES:
        return SHAPES[text]
    match = _FREE.fullmatch(text)
    layout = match["layout"] or BATCH_MAJOR if match else ""
    dims = tuple(map(int, match["dims"].split("x"))) if match else (0,)
    if layout not in LAYOUTS or 0 in dims:
        known = [f"{name} ({shape})" for name, shape in SHAPES.items()]
        layouts = "|".join(LAYOUTS)
        raise UnknownNameError("shape", text, [*known, f"ROWSxCOLUMNS[:{layouts}]"])
    named = (s for s in SHAPES.values() if (s.dims, s.layout) == (dims, layout))
    return next(named, Shape("free", dims, layout))


def cases_of(
    op: str | None, shape: str | None, direction: str | None, dtype: str | None, device: str | None
) -> tuple[Case, ...]:
    """The cases that the options ask for, on the devices of this machine."""
    if op is not None and op not in OPS:
        raise UnknownNameError("op", op, OPS)
    collected = [c for c in CASES if runs_here(c)]
    found = [c for c in collected if op in (None, c.op) and device in (None, c.device)]
    if not found:
        raise UnknownNameError("device here", device or "", {c.device for c in collected})
    if shape is not None:
        found = _at(found, shape)
    if direction is not None:
        known = dict.fromkeys(c.direction for c in found)
        found = [c for c in found if c.direction == direction]
        if not found:
            raise UnknownNameError("direction here", direction, known)
    if dtype is not None:
        found = [replace(c, dtype=dtype) for c in found]
    return tuple(dict.fromkeys(found))


def _at(cases: list[Case], text: str) -> list[Case]:
    """Those at a shape; if there is none, each op's at that shape."""
    exact = [c for c in cases if c.shape.name == text]
    if exact:
        return exact
    shape = shape_of(text)
    found = [c for c in cases if (c.shape.dims, c.shape.layout) == (shape.dims, shape.layout)]
    made = (
        here(replace(c, shape=_own(c.op, shape))) for c in cases if not c.is_call and not c.env
    )
    fitting = [c for c in made if _has(c.op, shape)]
    if not found and not fitting:
        raise UnknownNameError(
            "shape for the op", text, dict.fromkeys(c.shape.name for c in cases)
        )
    return found or fitting


def _own(op: str, shape: Shape) -> Shape:
    """The shape, by its name where the op has it: another op's may say more than dimensions."""
    known = {c.shape for c in CASES if c.op == op}
    return shape if shape in known else Shape("free", shape.dims, shape.layout)


def _has(op: str, shape: Shape) -> bool:
    """True if the op's cases have as many dimensions, and that layout."""
    alike = [c.shape for c in CASES if c.op == op]
    return len(shape.dims) == len(alike[0].dims) and shape.layout in {s.layout for s in alike}


def peers_of(text: str, cases: Iterable[Case]) -> frozenset[str] | None:
    """The peers that take part; None for all."""
    if text == "all":
        return None
    asked = frozenset(text.split(",")) - {"none", ""}
    known = dict.fromkeys(p.name for c in cases for p in providers_of(c) if is_peer(p))
    for name in sorted(asked - known.keys()):
        raise UnknownNameError("peer", name, ["all", "none", *known])
    return asked


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ppo-fast bench",
        description="Measure the ops and their peers. Further options go to pytest"
        " (--save-results writes benchmarks/results/<machine>-<date>.json).",
        allow_abbrev=False,
    )
    parser.add_argument("--op", help="one op")
    parser.add_argument("--shape", help="a named shape, or 64x4096, or 4096x128:time-major")
    parser.add_argument("--peers", default="all", help="all, none, or names with commas")
    parser.add_argument("--dtype", choices=DTYPES, help="instead of the cases' own")
    parser.add_argument("--direction", choices=DIRECTIONS)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default each that is here")
    parser.add_argument("--list", action="store_true", help="list cases and providers, and stop")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit status: pytest's, or 2 for an unknown name."""
    parser = _parser()
    given, rest = parser.parse_known_args(argv)
    try:
        cases = cases_of(given.op, given.shape, given.direction, given.dtype, given.device)
        peers = peers_of(given.peers, cases)
    except UnknownNameError as error:
        parser.error(str(error))
    choose(cases, peers)
    if given.list:
        for case in cases:
            print(f"{case.name}: {', '.join(p.name for p in taking_part(case))}")
        return 0
    folder = Path(__file__).parent
    whole = cases == tuple(c for c in CASES if runs_here(c))
    others = [] if whole else [f"--ignore={folder / 'loop'}"]
    return int(pytest.main([str(folder), "--benchmark-only", *others, *rest]))


if __name__ == "__main__":
    sys.exit(main())
