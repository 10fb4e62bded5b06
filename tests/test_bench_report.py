"""Results files and the pages made from them: what is kept, what is refused, what is said."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import cases, machine, pages, plots, report, results, shapes
from benchmarks.compare import compare
from benchmarks.goals import GOALS
from benchmarks.results import Results

ROOT = Path(__file__).resolve().parent.parent
FACTS: dict[str, Any] = {
    "date": "2026-01-02", "machine": "Some CPU", "isa": "avx2", "threads": 2, "load": 0.1,
    "versions": {"torch": "2.13.0"}, "commit": "aaaaaaaaaaaa",
}  # fmt: skip
GPU_FACTS = FACTS | {"gpu": "NVIDIA H200", "driver": "580.65.06", "cuda": "13.0"}


def row(case: shapes.Case, provider: str, median_ms: float | None, **fields: Any) -> results.Row:
    """A row as a run leaves it, its spread a tenth to either side."""
    made: results.Row = case.to_json() | {
        "provider": provider, "ceiling": provider in ("read", "copy"), "computes": "",
        "status": "ok", "detail": "",
    }  # fmt: skip
    if median_ms is not None:
        made |= {
            "median_ms": median_ms, "p20_ms": 0.9 * median_ms, "p80_ms": 1.1 * median_ms,
            "samples": 25, "bytes": 4096, "flops": 4096, "gb_per_s": 4096e-6 / median_ms,
            "gflop_per_s": 4096e-6 / median_ms, "peak_mb": 1.5,
        }  # fmt: skip
    return json.loads(json.dumps(made | fields))


def lines_with(text: str, *parts: str) -> list[str]:
    return [line for line in text.splitlines() if all(part in line for part in parts)]


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The committed pages and results in a folder of their own."""
    shutil.copytree(ROOT / "benchmarks/results", tmp_path / "benchmarks/results")
    shutil.copytree(ROOT / "benchmarks/plots", tmp_path / "benchmarks/plots")
    for name in ("README.md", "benchmarks/README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_the_committed_pages_are_made_from_committed_results() -> None:
    assert report.stale(ROOT) == []
    readme = (ROOT / "README.md").read_text()
    for path in report.newest(ROOT / "benchmarks/results"):
        assert f"](benchmarks/results/{path.name})" in readme


def test_a_figure_that_changed_makes_both_pages_stale(copied: Path) -> None:
    assert report.stale(copied) == []
    path, held = next(iter(report.newest(copied / "benchmarks/results").items()))
    for changed in held.rows:
        if "median_ms" in changed:
            changed["median_ms"] *= 2 if changed["provider"].startswith("ppo_fast-cpu") else 1
    path.write_text(results.to_text(held))
    assert report.stale(copied) == [copied / "benchmarks/README.md", copied / "README.md"]


def test_a_plot_that_no_page_shows_is_stale(copied: Path) -> None:
    (copied / "benchmarks/plots/left-over.svg").touch()
    assert report.stale(copied) == [copied / "benchmarks/plots/left-over.svg"]


def test_the_newest_file_of_each_machine_counts(tmp_path: Path) -> None:
    for facts in (FACTS, FACTS | {"date": "2026-02-01"}, GPU_FACTS):
        results.save(tmp_path, [row(cases.GAE, "loop", 1.0)], facts)
    names = [path.name for path in report.newest(tmp_path)]
    assert names == ["nvidia-h200-2026-01-02.json", "some-cpu-avx2-2026-02-01.json"]


def test_another_format_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "some-cpu-avx2-2026-01-02.json"
    path.write_text('{"format": 1, "rows": []}')
    text = f"{path} has format 1, this suite reads {results.FORMAT}"
    with pytest.raises(ValueError, match=text):
        results.save(tmp_path, [row(cases.GAE, "loop", 1.0)], FACTS)
    monkeypatch.setattr(sys, "argv", ["report", "--compare", str(path), str(path)])
    with pytest.raises(SystemExit):
        report.main()
    assert text in capsys.readouterr().err


def test_cases_merge_and_each_row_keeps_its_run(tmp_path: Path) -> None:
    """What is measured again replaces its case whole; a run without rows is forgotten."""
    later, last = FACTS | {"commit": "bbbbbbbbbbbb"}, FACTS | {"commit": "cccccccccccc"}
    results.save(tmp_path, [row(cases.GAE, "loop", 9.0), row(cases.GAE, "copy", 1.0)], FACTS)
    results.save(tmp_path, [row(cases.PPO_LOSS_BOTH, "eager", 3.0)], later)
    path = results.save(tmp_path, [row(cases.GAE, "loop", 8.0)], last)
    held = results.load(path)
    found = [(r["op"], r["provider"], r["median_ms"], held.runs[r["run"]]) for r in held.rows]
    assert found == [("ppo_loss", "eager", 3.0, later), ("gae", "loop", 8.0, last)]
    assert held.runs == [later, last]
    assert [path.name for path in tmp_path.iterdir()] == ["some-cpu-avx2-2026-01-02.json"]


def test_saving_a_part_keeps_the_other_goals(tmp_path: Path) -> None:
    """Verdicts are made of rows, not kept beside them."""
    gae = [row(cases.GAE, "loop", 80.0), row(cases.GAE, "ppo_fast-cpu", 0.1)]
    loss = [row(cases.PPO_LOSS_BOTH, "eager", 3.0), row(cases.PPO_LOSS_BOTH, "ppo_fast-cpu", 1.0)]
    results.save(tmp_path, gae, FACTS)
    path = results.save(tmp_path, loss, FACTS)
    of = {(v.goal.case, v.goal.against): v for v in results.verdicts(results.load(path).rows)}
    assert of[cases.GAE, "loop"].value == pytest.approx(800)
    assert (of[cases.GAE, "loop"].must_met, of[cases.GAE, "loop"].aim_met) == (True, False)
    assert of[cases.PPO_LOSS_BOTH, "eager"].must_met is False
    assert of[cases.PPO_LOSS_BOTH, "compile"].value is None


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = results.save(tmp_path, [row(cases.GAE, "loop", 9.0)], FACTS)
    before = path.read_text()

    def full(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        results.save(tmp_path, [row(cases.GAE, "loop", 1.0)], FACTS)
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


def test_compare_says_what_moved() -> None:
    case, other = cases.GAE, cases.PPO_LOSS_BOTH
    before = Results([FACTS], [
        row(case, "ppo_fast-cpu", 1.0), row(case, "loop", 80.0), row(case, "copy", 1.0),
        row(case, "tianshou", 1.0), row(other, "eager", 3.0),
    ])  # fmt: skip
    after = Results([FACTS], [
        row(case, "ppo_fast-cpu", 0.5), row(case, "loop", 88.0), row(case, "torchrl", 2.0),
        row(case, "copy", 1.0), row(case, "tianshou", None, status="red", detail="off"),
    ])  # fmt: skip
    text = "\n".join(compare(before, after))
    (moved,) = lines_with(text, case.name, "ppo_fast-cpu")
    assert moved.split()[-4:] == ["1.000", "0.5000", "0.500", "moved"]
    (same,) = lines_with(text, case.name, "loop")
    assert same.split()[-3:] == ["80.00", "88.00", "1.10"]
    assert f"status: {case.name} tianshou: ok -> red" in text
    assert f"only after: {case.name} torchrl (ok)" in text
    assert f"only before: {other.name} eager (ok)" in text


def test_losses_and_failures_are_on_the_page() -> None:
    held = Results([FACTS], [
        row(cases.GAE, "ppo_fast-cpu", 2.0, run=0), row(cases.GAE, "tianshou", 0.5, run=0),
        row(cases.GAE, "copy", 0.1, run=0),
        row(cases.GAE, "torchrl", None, status="red", detail="returns:\n off by 3", run=0),
    ])  # fmt: skip
    files = {Path("some-cpu-avx2-2026-01-02.json"): held}
    text = pages.page(files)
    assert lines_with(text, "- `gae`", "tianshou", "0.500 ms against 2.00 ms")
    assert not lines_with(text, "copy", " against 2.00 ms")
    assert "- torchrl: `red: returns: off by 3`" in text
    assert lines_with(text, "ppo_fast-cpu faster than tianshou", "0.250×", "≥ 3×", "SHORT")
    assert lines_with(text, "ppo_fast-cpu faster than loop", "not measured")
    assert lines_with(pages.section(files), "| `gae`", "tianshou 0.250×", "5%")


def test_a_gpu_file_makes_a_page_with_plots(copied: Path) -> None:
    """Two sizes give a plot against size; the machine is the GPU, with its driver."""
    pytest.importorskip("matplotlib", reason="the plots are drawn by matplotlib")
    large = cases.GPU_LOGPROBS_FORWARD
    small = replace(large, shape=large.shape.part(128))
    rows = [
        made
        for case, scale in ((small, 0.01), (large, 1.0))
        for made in (row(case, "ppo_fast-triton", 0.6 * scale), row(case, "eager", 12.8 * scale),
                     row(case, "copy", 0.58 * scale))
    ]  # fmt: skip
    results.save(copied / "benchmarks/results", rows, GPU_FACTS)
    report.write(copied)
    assert report.stale(copied) == []
    page, readme = ((copied / n).read_text() for n in ("benchmarks/README.md", "README.md"))
    assert "## NVIDIA H200" in page
    assert lines_with(page, "gpu NVIDIA H200", "driver 580.65.06", "cuda 13.0", "commit aaaa")
    assert lines_with(page, "| ppo_fast-triton |", "21.3", "97%")
    assert lines_with(
        page, "cuda ppo_fast-triton", "600 µs", "≤ 640 µs", "met", "≤ 580 µs", "SHORT"
    )
    assert "**NVIDIA H200**" in readme
    assert lines_with(
        readme, "| `token_logprobs` forward, qwen-r1 8192×151936, bf16, cuda", "21.3×"
    )
    assert "No figure measured on a GPU" not in readme
    drawn = sorted((copied / "benchmarks/plots").glob("nvidia-h200-*.svg"))
    assert [path.name for path in drawn] == [
        "nvidia-h200-ceiling.svg", "nvidia-h200-token-logprobs-forward-batch-major-bf16-cuda.svg",
    ]  # fmt: skip
    for path in drawn:
        assert f"](plots/{path.name})" in page
        assert ElementTree.fromstring(path.read_text()).tag.endswith("svg")


def test_the_same_rows_draw_the_same_bytes() -> None:
    pytest.importorskip("matplotlib", reason="the plots are drawn by matplotlib")
    rows = [row(cases.GAE, "ppo_fast-cpu", 2.0), row(cases.GAE, "copy", 1.0)]
    plot = plots.of_ceilings(rows, "some")
    assert plot is not None
    first = plots.draw(plot)
    assert first == plots.draw(plot)
    assert "ppo_fast-cpu 50.0%" in first


def test_every_goal_for_the_device_is_listed() -> None:
    held = Results([FACTS], [row(cases.GAE, "loop", 80.0, run=0)])
    found = pages.goals_of(held)
    assert [v.goal for v in found] == [goal for goal in GOALS if goal.case.device == "cpu"]
    assert all(verdict.value is None for verdict in found)
