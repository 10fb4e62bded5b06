"""CONTRACT.md and docs/trust.md name tests that exist, and every case once."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ("CONTRACT.md", "docs/trust.md")
COUNTS = {"N": 17, "X": 23, "L": 4, "D": 8, "I": 15, "P": 1, "R": 11}
NAMED = re.compile(r"(test_\w+\.py)::(\w+(?:::\w+)?)")


@functools.cache
def names_in(file: str) -> frozenset[str]:
    """The names of a file's tests, those of classes after their class's."""
    (path,) = (ROOT / "tests").rglob(file)
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {
                f"{node.name}::{x.name}" for x in node.body if isinstance(x, ast.FunctionDef)
            }
    return frozenset(name for name in found if name.split("::")[-1].startswith("test_"))


@pytest.mark.parametrize("page", PAGES)
def test_every_test_named_exists(page: str) -> None:
    named = NAMED.findall((ROOT / page).read_text())
    assert len(named) > 30
    assert not [f"{file}::{name}" for file, name in named if name not in names_in(file)]


def test_every_promise_names_its_test() -> None:
    text = (ROOT / "CONTRACT.md").read_text()
    promises = re.findall(r"^- (.*?)(?=^- |^#|\Z)", text, re.MULTILINE | re.DOTALL)
    without = [x for x in promises if not NAMED.search(x) and not x.startswith("Not promised")]
    assert len(promises) > 25 and not without


def rows() -> list[tuple[str, str, str]]:
    """(id, case, tests) of each row."""
    lines = (ROOT / "docs/trust.md").read_text().splitlines()
    cells = [
        [c.strip() for c in line.strip("|").split(" | ")] for line in lines if line[:2] == "| "
    ]
    return [(a.strip("| "), b, c.strip("| ")) for a, b, c in cells if a.strip("| ") != "id"]


def test_every_case_is_there_once() -> None:
    want = [f"{family}{i}" for family, n in COUNTS.items() for i in range(1, n + 1)]
    assert [name for name, _, _ in rows()] == want


def test_a_case_without_a_test_says_why() -> None:
    for name, _, tests in rows():
        assert NAMED.search(tests) or re.match(r"None\b.*: .{10}", tests), name
