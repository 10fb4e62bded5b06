"""Tests of style: first lines name the thing, and the formatter is obeyed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("benchmarks", "csrc", "docs", "examples", "kernels", "ppo_fast", "tests")
OPENINGS = re.compile(r"(What|How|Who|Whose|Which|Whether|Where|When|That|Told)\b")
# Python docstrings, and the first comment of another source file.
DOCSTRING = re.compile(r'^\s*[rR]?"""(.*)', re.MULTILINE)
COMMENT = re.compile(r"^(?://+|#+(?!!|include|pragma|if|define))\s*(.*)", re.MULTILINE)
SUFFIXES = {".py", ".h", ".cpp", ".cu", ".cuh", ".sh"}
# Escapes from the formatter, around true tables.
MOST_UNFORMATTED = 40


def sources(folder: Path) -> list[Path]:
    """Source files of a folder; links to other folders are not followed."""
    found = sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES)
    return [p for p in found if p.resolve().is_relative_to(folder.resolve())]


def first_lines(path: Path) -> list[str]:
    """First lines of a Python file's docstrings, or of another file's first comment."""
    text = path.read_text(encoding="utf-8")
    return DOCSTRING.findall(text) if path.suffix == ".py" else COMMENT.findall(text)[:1]


@pytest.mark.parametrize("folder", FOLDERS)
def test_first_lines_name_the_thing(folder: str) -> None:
    found = sources(ROOT / folder)
    assert found
    bad = [
        f"{path.relative_to(ROOT)}: {line}"
        for path in found
        for line in first_lines(path)
        if OPENINGS.match(line)
    ]
    assert not bad


def test_the_rule_reads_docstrings_and_comments(tmp_path: Path) -> None:
    for name, text in (
        ("a.py", '"""Name."""\n\n\ndef f() -> None:\n    """What it does."""\n'),
        ("a.cuh", "#pragma once\n// Which rows.\n// More.\n"),
        ("a.sh", "#!/usr/bin/env bash\n# How it runs.\n"),
    ):
        (tmp_path / name).write_text(text)
        lines = [line for line in first_lines(tmp_path / name) if OPENINGS.match(line)]
        assert len(lines) == 1, name


def test_the_formatter_is_obeyed() -> None:
    escape = re.compile("fmt: " + "(skip|off)|clang-format " + "off")
    counts = {
        str(path.relative_to(ROOT)): len(escape.findall(path.read_text(encoding="utf-8")))
        for part in FOLDERS
        for path in sources(ROOT / part)
    }
    total = sum(counts.values())
    assert total <= MOST_UNFORMATTED, {name: n for name, n in counts.items() if n}
