"""A seeded mistake: what mutant_list.py and its parts list, and mutants.py plants."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """`before` in `path` becomes `after`; `tests` are files of tests/, separated by blanks."""

    name: str
    path: str
    before: str
    after: str
    tests: str
    select: str = ""
