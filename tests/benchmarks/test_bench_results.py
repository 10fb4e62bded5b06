"""Tests of results files: merging, replacing, refusing, comparing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from bench_rows import FACTS, lines_with, row

from benchmarks.harness import machine
from benchmarks.ops.gae import GAE
from benchmarks.ops.ppo_loss import PPO_LOSS_BOTH
from benchmarks.report import __main__ as report
from benchmarks.report import results
from benchmarks.report.diff import diff
from benchmarks.report.judge import verdicts
from benchmarks.report.results import Results


def test_another_format_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "some-cpu-avx2-2026-01-02.json"
    path.write_text('{"format": 1, "rows": []}')
    text = f"{path} has format 1, this suite reads {results.FORMAT}"
    with pytest.raises(ValueError, match=text):
        results.save(tmp_path, [row(GAE, "loop", 1.0)], FACTS)
    monkeypatch.setattr(sys, "argv", ["report", "--compare", str(path), str(path)])
    with pytest.raises(SystemExit):
        report.main()
    assert text in capsys.readouterr().err


def test_cases_merge_and_each_row_keeps_its_run(tmp_path: Path) -> None:
    """A case measured again replaces the former one whole; a run without rows is dropped."""
    later, last = FACTS | {"commit": "bbbbbbbbbbbb"}, FACTS | {"commit": "cccccccccccc"}
    results.save(tmp_path, [row(GAE, "loop", 9.0), row(GAE, "copy", 1.0)], FACTS)
    results.save(tmp_path, [row(PPO_LOSS_BOTH, "eager", 3.0)], later)
    path = results.save(tmp_path, [row(GAE, "loop", 8.0)], last)
    held = results.load(path)
    found = [(r["op"], r["provider"], r["median_ms"], held.runs[r["run"]]) for r in held.rows]
    assert found == [("ppo_loss", "eager", 3.0, later), ("gae", "loop", 8.0, last)]
    assert held.runs == [later, last]
    assert [path.name for path in tmp_path.iterdir()] == ["some-cpu-avx2-2026-01-02.json"]


def test_saving_a_part_keeps_the_other_goals(tmp_path: Path) -> None:
    """Verdicts are computed from rows, not stored with them."""
    gae = [row(GAE, "loop", 80.0), row(GAE, "ppo_fast-cpu", 0.1)]
    loss = [row(PPO_LOSS_BOTH, "eager", 3.0), row(PPO_LOSS_BOTH, "ppo_fast-cpu", 1.0)]
    results.save(tmp_path, gae, FACTS)
    path = results.save(tmp_path, loss, FACTS)
    of = {(v.goal.case, v.goal.against): v for v in verdicts(results.load(path).rows)}
    assert of[GAE, "loop"].value == pytest.approx(800)
    assert (of[GAE, "loop"].must_met, of[GAE, "loop"].aim_met) == (True, False)
    assert of[PPO_LOSS_BOTH, "eager"].must_met is False
    assert of[PPO_LOSS_BOTH, "compile"].value is None


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = results.save(tmp_path, [row(GAE, "loop", 9.0)], FACTS)
    before = path.read_text()

    def full(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        results.save(tmp_path, [row(GAE, "loop", 1.0)], FACTS)
    assert path.read_text() == before


def test_results_and_pages_do_not_make_a_commit_dirty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    generated = ("README.md", "benchmarks/README.md", "benchmarks/results/a.json")
    for name in (*generated, "kernels/gae.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before")
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    for args in (("init", "-q"), ("add", "."), (*identity, "commit", "-qm", "all")):
        subprocess.run(["git", *args], cwd=tmp_path, check=True)
    for name in generated:
        (tmp_path / name).write_text("after")
    head = machine.commit()
    assert head is not None and len(head) == 12
    (tmp_path / "kernels/gae.py").write_text("after")
    assert machine.commit() == f"{head}-dirty"


def test_diff_says_what_moved() -> None:
    case, other = GAE, PPO_LOSS_BOTH
    before = Results(
        [FACTS],
        [
            row(case, "ppo_fast-cpu", 1.0),
            row(case, "loop", 80.0),
            row(case, "copy", 1.0),
            row(case, "tianshou", 1.0),
            row(other, "eager", 3.0),
        ],
    )
    after = Results(
        [FACTS],
        [
            row(case, "ppo_fast-cpu", 0.5),
            row(case, "loop", 88.0),
            row(case, "torchrl", 2.0),
            row(case, "copy", 1.0),
            row(case, "tianshou", None, status="red", detail="off"),
        ],
    )
    text = "\n".join(diff(before, after))
    (moved,) = lines_with(text, case.name, "ppo_fast-cpu")
    assert moved.split()[-4:] == ["1.000", "0.5000", "0.500", "moved"]
    (same,) = lines_with(text, case.name, "loop")
    assert same.split()[-3:] == ["80.00", "88.00", "1.10"]
    assert f"status: {case.name} tianshou: ok -> red" in text
    assert f"only after: {case.name} torchrl (ok)" in text
    assert f"only before: {other.name} eager (ok)" in text
