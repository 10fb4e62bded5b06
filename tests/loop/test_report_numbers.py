"""The report's numbers at the ends of the floats, and a note of each that is left out."""

from __future__ import annotations

import json
import math
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from report_helpers import HOSTILE, bare, record, write

from ppo_fast.loop.log.history import mean
from ppo_fast.report import charts
from ppo_fast.report.page import number, page, phase_seconds, summary
from ppo_fast.report.runs import differing, grouped, load_run, load_runs

LARGEST = sys.float_info.max


def numbers_of(html: str) -> list[dict[str, Any]]:
    """The data of the page's script, parsed as a browser does: NaN and Infinity are no JSON."""

    def no_constant(token: str) -> float:
        raise AssertionError(f"{token} is no JSON")

    found = re.findall(r'<script type="application/json">(.*?)</script>', html, re.DOTALL)
    return [json.loads(text, parse_constant=no_constant) for text in found]


def test_numbers_that_are_not_finite_are_left_out_and_said(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", [record(u, reward=0.5) for u in range(4)])
    log = folder / "log.jsonl"
    lines = log.read_text().splitlines()
    for i, value in enumerate(("NaN", "1e400", "-Infinity")):
        lines[i] = lines[i].replace('"reward": 0.5', f'"reward": {value}')
    lines[3] = lines[3].replace('"ess": 0.9', '"ess": ' + "9" * 400)
    log.write_text("\n".join(lines) + "\n")
    run = load_run(folder, "a")
    assert [r["reward"] for r in run.records.values()] == [None, None, None, 0.5]
    assert run.notes == [
        "not finite in the log, and left out of curves and means: reward in 3, ess in 1 of 4"
    ]
    html = page([run])
    assert run.notes[0] in html
    assert numbers_of(html)[0]["curves"][0]["mean"] == [None, None, None, 0.5]


def test_a_run_without_such_numbers_has_no_note(tmp_path: Path) -> None:
    run = load_run(write(tmp_path / "a", [record(u) for u in range(3)]), "a")
    assert run.notes == []
    assert load_run(write(tmp_path / "b", [bare(0)]), "b").notes == [
        "not finite in the log, and left out of curves and means: reward in 1 of 1"
    ]


@pytest.mark.parametrize("value", [1e308, LARGEST, 5e-324, 1e-300])
def test_numbers_at_the_ends_of_the_floats(tmp_path: Path, value: float) -> None:
    for seed in (0, 1):
        rewards = [value * (-1) ** (u // 3) for u in range(12)]
        log = [record(u, reward=r, value_loss=r, kl=value) for u, r in enumerate(rewards)]
        write(tmp_path / str(seed), log, seed=seed)
    runs = load_runs([tmp_path / "0", tmp_path / "1"])
    row = summary(runs[0])
    assert (row["first"], row["kl"]) == (value, value) and row["last"] == -value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        html = page(runs)
        drawn = {c.plotted.key: c for c in charts.charts(grouped(runs))}
    reward = numbers_of(html)[0]["curves"][0]
    assert reward["mean"] == pytest.approx(rewards, rel=1e-4)
    assert reward["low"] == reward["high"] == reward["mean"]
    for key in ("reward", "kl"):
        places = re.findall(r"[-+.\w]+", drawn[key].curves[0].line.replace("M", " "))
        assert len(places) > 4 and not any(word in drawn[key].curves[0].line for word in "ni")
        for tick in drawn[key].y:
            assert charts.TOP <= tick.at <= charts.HEIGHT - charts.BOTTOM
    if value > 1:
        assert len(drawn["reward"].y) >= 3 and len(reward_heights(drawn["reward"])) == 2


def reward_heights(chart: charts.Chart) -> set[str]:
    return {point.split(",")[1] for point in chart.curves[0].line[1:].split("L")}


def test_a_mean_of_large_numbers_is_one_of_them() -> None:
    assert mean([1e308] * 7) == 1e308 and mean([LARGEST] * 3) == LARGEST
    assert mean([1e308, -1e308] * 50 + [math.nan]) == 0.0
    assert mean([1e308, 1e308, -1e308, -1e308]) == 0.0
    assert mean([0.25, math.inf, 0.75]) == 0.5 and math.isnan(mean([math.nan]))


def test_a_gain_beyond_the_floats_is_infinite_not_missing() -> None:
    assert number(math.inf, "{:+.3f}") == "+∞" and number(-math.inf) == "\N{MINUS SIGN}∞"
    assert number(1e308, "{:+.3f}") == "+1.000e+308" and number(1e14) == "100000000000000.000"


def test_a_curve_far_outside_its_axes_keeps_a_place(tmp_path: Path) -> None:
    log = [record(u, explained_variance=-1e308 if u == 1 else 0.5) for u in range(3)]
    drawn = {
        c.plotted.key: c for c in charts.charts(grouped(load_runs([write(tmp_path / "a", log)])))
    }
    curve = drawn["explained_variance"].curves[0]
    assert "inf" not in curve.line and "nan" not in curve.line and curve.mean[1] == -1e308


def test_updates_that_were_made_again_are_said(tmp_path: Path) -> None:
    log = [record(0), record(1, reward=9.0), record(1, reward=0.5)]
    run = load_run(write(tmp_path / "a", log), "a")
    assert run.records[1]["reward"] == 0.5
    assert run.notes == ["log.jsonl has 1 updates again: the last counts"]


def test_a_run_that_is_given_twice_counts_once(tmp_path: Path) -> None:
    folders = [write(tmp_path / str(s), [record(0, reward=float(s))], seed=s) for s in (0, 3)]
    (tmp_path / "latest").symlink_to(folders[1])
    runs = load_runs([*folders, tmp_path / "latest"])
    assert charts.charts(grouped(runs))[0].curves[0].mean == [1.5]
    assert [r.name for r in runs] == ["0", "3"]
    assert runs[1].notes == ["given 2 times, counted once"]


def test_options_differ_where_their_groups_do() -> None:
    assert differing([{"lr": math.nan}, {"lr": math.nan}]) == set()
    assert differing([{"chat": True}, {"chat": 1}]) == {"chat"}
    assert differing([{"a": [1, {"b": 2}]}, {"a": [1, {"b": 2}]}]) == set()


def test_seconds_that_no_float_rounds(tmp_path: Path) -> None:
    log = [record(u, seconds={"update": 1e12, HOSTILE: 0}) for u in range(3)]
    run = load_run(write(tmp_path / "a", log), "a")
    assert summary(run)["seconds"] == 3e12
    assert phase_seconds(grouped([run])[0])["update"] == 1e12
    assert "<img" not in page([run])
