"""Tests of CONTRACT.md and docs/trust.md: every promise and every case has a test that exists."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import make_trust
import pytest

ROOT = Path(__file__).parents[2]
PAGES = ("CONTRACT.md", "docs/trust.md")
COUNTS = {"N": 19, "X": 23, "L": 4, "D": 8, "I": 15, "P": 1, "R": 11}
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


def test_the_page_is_that_of_the_marks() -> None:
    tests = make_trust.marked(ROOT / "tests")
    assert make_trust.PAGE.read_text() == make_trust.page(tests), "python docs/make_trust.py"


def test_every_case_has_a_test_or_a_reason() -> None:
    cases = [case for test in make_trust.marked(ROOT / "tests") for case in test.cases]
    assert list(make_trust.CASES) == [f"{f}{i + 1}" for f, n in COUNTS.items() for i in range(n)]
    assert set(make_trust.BOUNDS) <= set(make_trust.CASES)
    assert set(cases) | set(make_trust.WITHOUT_TEST) == set(make_trust.CASES)
    assert not set(cases) & set(make_trust.WITHOUT_TEST)
