"""Tests of the checks' disk space: looked at first, with one trainer's environment at a time."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from free_space import main, shortage

ROOT = Path(__file__).parents[2]
# Stands for an environment's interpreter: makes environments of stubs, installs nothing, and its
# pytest notes which environments there are and fails where it is told to.
STUB = """#!/bin/sh
case "$1 $2" in
"-m venv") for last; do :; done; mkdir -p "$last/bin"; cp "$0" "$last/bin/python";;
"-m pip") ;;
"-m pytest")
    (cd "$STUBS/trainers"; echo * >> "$STUBS/tested")
    case "$*" in *"$FAILS"*) exit 3;; esac;;
*) echo "$STUBS";;
esac
"""


def test_what_is_missing_is_said_with_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "not" / "yet"
    assert not shortage(0, place)
    free = shutil.disk_usage(tmp_path).free / 2**30
    assert shortage(free + 1000.5, place).startswith(f"too little disk space for {place}: ")
    assert main(["0", str(tmp_path), "1e9", str(place)]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.endswith("GiB are free, 1e+09 GiB are wanted\n")
    assert main(["0", str(tmp_path)]) == 0


def trainers(folder: Path, *options: str, fails: str = "nothing") -> tuple[int, list[str], str]:
    """`make test-trainers` on stubs: its status, what stood at each test, and what it said."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").write_text(STUB)
    (folder / "bin" / "python").chmod(0o755)
    (folder / "trainers" / "stale").mkdir(parents=True)
    (folder / ".installed").touch()
    done = subprocess.run(
        ["make", "test-trainers", f"VENV={folder}", f"PYTHON={sys.executable}", *options],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
        env=os.environ | {"STUBS": str(folder), "FAILS": fails, "MAKEFLAGS": ""},
    )
    file = folder / "tested"
    # Some are tested twice, with the lowest version and the highest.
    tested = [*dict.fromkeys(file.read_text().splitlines())] if file.exists() else []
    return done.returncode, tested, done.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_environments_of_trainers(tmp_path: Path) -> None:
    every = ["trl-ppo", "trl-grpo", "verl", "openrlhf", "ms-swift", "skyrl", "areal"]
    every += ["control", "compat"]
    status, tested, said = trainers(tmp_path / "ci", "KEEP=", "ROOM=0")
    assert (status, tested) == (0, every), said
    assert not list((tmp_path / "ci" / "trainers").iterdir())
    status, tested, said = trainers(tmp_path / "together", "KEEP=", "ROOM=0", "--jobs=4")
    assert (status, tested) == (0, every), said
    status, tested, _ = trainers(tmp_path / "kept", "ROOM=0")
    assert status == 0 and set(tested[-1].split()) == {"stale", *every}


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_a_failing_trainer_and_a_full_disk_fail(tmp_path: Path) -> None:
    status, tested, said = trainers(tmp_path / "fails", "KEEP=", "ROOM=0", fails="test_trl_grpo")
    assert (status, tested) == (2, ["trl-ppo", "trl-grpo"]) and "Error 3" in said
    assert not list((tmp_path / "fails" / "trainers").iterdir())
    status, tested, said = trainers(tmp_path / "full", "KEEP=", "ROOM=1e9")
    assert (status, tested) == (2, [])
    assert f"too little disk space for {tmp_path}/full/trainers/trl-ppo: " in said


def test_ci_looks_first_and_runs_both() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert lines[1:] and "set -euo pipefail" in lines
    looks = [i for i, line in enumerate(lines) if "tests/scripts/free_space.py" in line]
    both = [lines.index("make test-trainers KEEP="), lines.index("make test")]
    assert looks[0] < both[0] < looks[1] < both[1] == len(lines) - 1
