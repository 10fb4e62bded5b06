"""Tests of the pages made from results: the committed ones, and the text of others."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from bench_rows import FACTS, GPU_FACTS, lines_with, row

from benchmarks.ops.case import Case, Shape
from benchmarks.ops.gae import GAE
from benchmarks.ops.registry import GOALS
from benchmarks.ops.token_logprobs import GPU_LOGPROBS_FORWARD
from benchmarks.report import __main__ as report
from benchmarks.report import pages, plots, predicted, readme, results, tables
from benchmarks.report.results import Results

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The committed pages and results in a folder of their own."""
    shutil.copytree(ROOT / "benchmarks/results", tmp_path / "benchmarks/results")
    shutil.copytree(ROOT / "benchmarks/plots", tmp_path / "benchmarks/plots")
    (tmp_path / "benchmarks/gpu").mkdir()
    kept = ("benchmarks/README.md", "benchmarks/gpu/predictions.json", *report.FRONTS)
    for name in kept:
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_the_committed_pages_are_made_from_committed_results() -> None:
    assert report.stale(ROOT) == []
    files = report.newest(ROOT / "benchmarks/results")
    for path in files:
        assert f"](results/{path.name})" in (ROOT / "benchmarks/README.md").read_text()
    for front in report.FRONTS:
        for path in readme.latest(files):
            assert f"](benchmarks/results/{path.name})" in (ROOT / front).read_text()


def test_a_figure_that_changed_makes_every_page_stale(copied: Path) -> None:
    assert report.stale(copied) == []
    files = readme.latest(report.newest(copied / "benchmarks/results"))
    path, held = next(iter(files.items()))
    for changed in held.rows:
        if "median_ms" in changed:
            changed["median_ms"] *= 2 if changed["provider"].startswith("ppo_fast-cpu") else 1
    path.write_text(results.to_text(held))
    pages_of = ("benchmarks/README.md", "README.md", "README.zh-CN.md")
    assert report.stale(copied) == [copied / name for name in pages_of]


def test_a_plot_that_no_page_shows_is_stale(copied: Path) -> None:
    (copied / "benchmarks/plots/left-over.svg").touch()
    assert report.stale(copied) == [copied / "benchmarks/plots/left-over.svg"]


def test_the_newest_file_of_each_machine_counts(tmp_path: Path) -> None:
    for facts in (FACTS, FACTS | {"date": "2026-02-01"}, GPU_FACTS):
        results.save(tmp_path, [row(GAE, "loop", 1.0)], facts)
    names = [path.name for path in report.newest(tmp_path)]
    assert names == ["nvidia-h200-2026-01-02.json", "some-cpu-avx2-2026-02-01.json"]


def test_losses_and_failures_are_on_the_page() -> None:
    held = Results(
        [FACTS],
        [
            row(GAE, "ppo_fast-cpu", 2.0, run=0),
            row(GAE, "tianshou", 0.5, run=0),
            row(GAE, "copy", 0.1, run=0),
            row(GAE, "torchrl", None, status="red", detail="returns:\n off by 3", run=0),
        ],
    )
    files = {Path("some-cpu-avx2-2026-01-02.json"): held}
    text = pages.page(files)
    assert lines_with(text, "- `gae`", "tianshou", "0.500 ms against 2.00 ms")
    assert not lines_with(text, "copy", " against 2.00 ms")
    assert "- torchrl: `red: returns: off by 3`" in text
    assert lines_with(text, "ppo_fast-cpu faster than tianshou", "0.250×", "≥ 3×", "SHORT")
    assert lines_with(text, "ppo_fast-cpu faster than loop", "not measured")
    assert lines_with(text, "| `gae`", "tianshou 0.250×", "5%")


def test_the_parts_of_a_training_step_make_one_table() -> None:
    step = Case("ppo_update", "step", Shape("some-model", (8, 16)))
    held = Results(
        [FACTS],
        [
            row(replace(step, direction=part), f"ppo_fast-{backend}", ms, share=ms / whole, run=0)
            for backend, whole in (("cpu", 1000.0), ("reference", 3000.0))
            for part, ms in (("step", whole), ("gae", 6.0))
        ],
    )
    files = {Path("some-cpu-avx2-2026-01-02.json"): held}
    text = pages.page(files)
    assert "### One PPO update: some-model 8x16 cpu" in text
    assert lines_with(text, "| gae | 6.000 | 0.6% | 1.500 | 6.000 | 0.2% | 1.500 |")
    assert plots.planned(held.rows, "some") == []
    assert "some-model 8x16 cpu takes 1000 ms with `ppo_fast-cpu`" in text


def test_a_gpu_file_makes_a_page_with_plots(copied: Path) -> None:
    """Two sizes give a plot against size; the machine is the GPU, with its driver."""
    pytest.importorskip("matplotlib", reason="the plots are drawn by matplotlib")
    large = GPU_LOGPROBS_FORWARD
    small = replace(large, shape=large.shape.part(128))
    rows = [
        made
        for case, scale in ((small, 0.01), (large, 1.0))
        for made in (
            row(case, "ppo_fast-triton", 0.6 * scale),
            row(case, "eager", 12.8 * scale),
            row(case, "copy", 0.58 * scale),
        )
    ]
    results.save(copied / "benchmarks/results", rows, GPU_FACTS)
    report.write(copied)
    assert report.stale(copied) == []
    page, front = ((copied / n).read_text() for n in ("benchmarks/README.md", "README.md"))
    assert "## NVIDIA H200" in page
    assert lines_with(page, "gpu NVIDIA H200", "driver 580.65.06", "cuda 13.0", "commit aaaa")
    assert lines_with(page, "| ppo_fast-triton |", "21.3", "97%")
    assert lines_with(
        page, "cuda ppo_fast-triton", "600 µs", "≤ 640 µs", "met", "≤ 580 µs", "SHORT"
    )
    assert lines_with(page, "| `token_logprobs` forward, qwen-r1 8192×151936, bf16, cuda", "21.3×")
    assert "NVIDIA H200, 2 threads" in front
    assert lines_with(front, "8,192 tokens, vocabulary of 151,936, bf16, GPU", "0.600 ms", "21.3×")
    assert readme.ENGLISH.no_gpu not in front
    drawn = sorted((copied / "benchmarks/plots").glob("nvidia-h200-*.svg"))
    assert [path.name for path in drawn] == [
        "nvidia-h200-ceiling.svg",
        "nvidia-h200-token-logprobs-forward-batch-major-bf16-cuda.svg",
    ]
    for path in drawn:
        assert f"](plots/{path.name})" in page
        assert ElementTree.fromstring(path.read_text()).tag.endswith("svg")


def test_a_measured_time_stands_beside_its_prediction(copied: Path) -> None:
    """The page says that predictions are no measurements; a results file adds times and ratios."""
    page = (copied / "benchmarks/README.md").read_text()
    assert "**Predictions, not measurements.**" in page
    case, provider = GPU_LOGPROBS_FORWARD, "ppo_fast-cuda"
    (found,) = (
        made
        for goal in json.loads((copied / "benchmarks/gpu/predictions.json").read_text())
        if Case.from_json(goal["goal"]) == case
        for made in goal["predicted"]
        if made["provider"] == provider
    )
    time = f"{tables.number(found['microseconds'])} µs"
    name = f"| `token_logprobs` {tables.label(case)}: cuda (nvcc"
    (line,) = lines_with(page, name)
    assert line.split(" | ")[1:4] == ["640 µs", "580 µs", time] and line.endswith("| - | - |")
    measured = 2 * found["microseconds"] / 1e3
    results.save(copied / "benchmarks/results", [row(case, provider, measured)], GPU_FACTS)
    report.write(copied)
    (line,) = lines_with((copied / "benchmarks/README.md").read_text(), name)
    assert line.endswith(f"| {tables.number(1e3 * measured)} µs | 2.00× |")


@pytest.mark.parametrize(
    ("microseconds", "words"), [(4, "meets the aim"), (5, "meets must"), (7, "SHORT")]
)
def test_a_prediction_is_judged_like_a_measurement(microseconds: float, words: str) -> None:
    found = {"provider": "ppo_fast-triton", "compiler": "triton 3.6.0", "limit": "DRAM"}
    found |= {"microseconds": microseconds, "launches": 1, "parts": {}, "counted": "-"}
    row = {"goal": GPU_LOGPROBS_FORWARD.to_json(), "must": 6, "aim": 4, "judged": "triton"}
    other = found | {"provider": "ppo_fast-cuda", "compiler": "nvcc 13.0", "microseconds": 1}
    text = "\n".join(predicted.section([row | {"predicted": [found, other]}], []))
    assert lines_with(text, "triton (triton 3.6.0), judged", f"| {words} | DRAM | 1 | - | - |")
    must, aim = int(microseconds <= 6), int(microseconds <= 4)
    assert lines_with(text, f"named, {must} of 1 goals are met on paper, {aim} of the aims")
    assert lines_with(text, "better of the two 1 of 1 goals are met on paper, 1 of the aims")
    assert predicted.section([], []) == []


def test_the_first_screen_has_four_figures_in_each_language() -> None:
    files = report.newest(ROOT / "benchmarks/results")
    sections = [readme.section(files, words) for words in report.FRONTS.values()]
    for text in sections:
        rows = lines_with(text, "| ", "×")
        assert len(rows) == 4 and all("fp32" in row for row in rows)
    figures = [re.findall(r"\d+(?:[.,]\d+)*", text) for text in sections]
    assert figures[0] == figures[1]


def test_the_first_screen_has_the_machine_measured_last() -> None:
    rows = [row(GAE, "ppo_fast-cpu", 2.0, run=0), row(GAE, "loop", 8.0, run=0)]
    names = ["a-cpu-avx2-2026-01-02", "b-cpu-avx2-2025-12-31", "c-gpu-2025-01-01"]
    runs = [FACTS, FACTS, FACTS | {"gpu": "a GPU"}]
    files = {
        Path(f"{name}.json"): Results([run], rows) for name, run in zip(names, runs, strict=True)
    }
    found = re.findall(r"\[(\S+)\.json\]", readme.section(files))
    assert found == ["c-gpu-2025-01-01", "a-cpu-avx2-2026-01-02"]


def test_a_figure_that_is_absent_leaves_its_row_out() -> None:
    rows = [row(GAE, "ppo_fast-cpu", 2.0, run=0), row(GAE, "loop", 8.0, run=0)]
    text = readme.section({Path("some-cpu-avx2-2026-01-02.json"): Results([FACTS], rows)})
    assert len(lines_with(text, "| ", "×")) == 1
    assert lines_with(text, "64 sequences of 4,096 tokens", "8.00 ms", "2.00 ms", "4.00×")
    rows = [row(GAE, "ppo_fast-cpu", None, status="red", run=0), row(GAE, "loop", 8.0, run=0)]
    text = readme.section({Path("some-cpu-avx2-2026-01-02.json"): Results([FACTS], rows)})
    assert text == readme.ENGLISH.no_gpu


def test_the_same_rows_draw_the_same_bytes() -> None:
    pytest.importorskip("matplotlib", reason="the plots are drawn by matplotlib")
    rows = [row(GAE, "ppo_fast-cpu", 2.0), row(GAE, "copy", 1.0)]
    plot = plots.of_ceilings(rows, "some")
    assert plot is not None
    first = plots.draw(plot)
    assert first == plots.draw(plot)
    assert "ppo_fast-cpu 50.0%" in first


def test_every_goal_for_the_device_is_listed() -> None:
    held = Results([FACTS], [row(GAE, "loop", 80.0, run=0)])
    found = pages.goals_of(held)
    assert [v.goal for v in found] == [goal for goal in GOALS if goal.case.device == "cpu"]
    assert all(verdict.value is None for verdict in found)
