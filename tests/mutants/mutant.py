"""A seeded mistake: mutant_list.py and its parts list them, __main__.py plants them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Mutant(NamedTuple):
    """`before` in `path` becomes `after`; `tests` are stems of test files, separated by blanks."""

    name: str
    path: str
    before: str
    after: str
    tests: str
    select: str = ""


def mutated(text: str, mutant: Mutant) -> str:
    """The file with the mistake in it; ValueError where its text is not there once."""
    found = text.count(mutant.before)
    if found != 1:
        raise ValueError(
            f"mutant {mutant.name!r}: {mutant.path} must hold {mutant.before!r} once, got {found}"
        )
    return text.replace(mutant.before, mutant.after)


def files_of_tests(root: Path, mutant: Mutant) -> list[Path]:
    """The files of `root`/tests that a mutant's stems name; each must be there once."""
    found = [list((root / "tests").rglob(f"test_{stem}.py")) for stem in mutant.tests.split()]
    assert all(len(paths) == 1 for paths in found), (mutant.tests, found)
    return [paths[0] for paths in found]
