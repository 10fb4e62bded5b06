"""Tests of the mutants' list: every mistake can be planted, and names tests that exist."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutant import Mutant, files_of_tests, mutated
from mutant_list import MUTANTS

ROOT = Path(__file__).parents[2]
ALL = [mutant for group in MUTANTS.values() for mutant in group]


@pytest.mark.parametrize("mutant", ALL, ids=lambda m: f"{m.path}: {m.name}")
def test_the_mistake_can_be_planted(mutant: Mutant) -> None:
    text = (ROOT / mutant.path).read_text()
    assert mutated(text, mutant) != text
    assert files_of_tests(ROOT, mutant)


def test_a_text_that_is_gone_is_named() -> None:
    with pytest.raises(ValueError, match="must hold 'done' once, got 2"):
        mutated("done done", Mutant("m", "f.py", "done", "d", "gae"))


def test_there_are_enough_of_them() -> None:
    assert len(ALL) >= 20 and len({(m.path, m.before) for m in ALL}) == len(ALL)


def test_a_mistake_in_a_cpu_kernel_is_compiled() -> None:
    """But for one that test_csrc.py reads as text: NEON's file is not compiled here."""
    in_kernels = {m for m in ALL if m.path.startswith("csrc/cpu/") and m.tests != "csrc"}
    assert in_kernels and in_kernels <= {*MUTANTS["cpu"]}
