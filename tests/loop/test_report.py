"""The report: what it reads, what it computes, and what it writes of runs that did not go well."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from loop_helpers import trainer
from report_helpers import HOSTILE, bare, record, write
from rich.console import Console

from ppo_fast.__main__ import main
from ppo_fast.loop.log.history import NUMBERS
from ppo_fast.report import RunError, charts, runs, write_report
from ppo_fast.report.page import (
    Shots,
    folded,
    number,
    page,
    phase_seconds,
    samples,
    shown,
    summary,
    table,
)
from ppo_fast.report.runs import grouped, load_run, load_runs

USUAL = [plotted for plotted in charts.CURVES if plotted.when == "usual"]


def html_of(*folders: Path) -> str:
    return page(load_runs(list(folders)))


def test_mean_and_band_over_the_runs_of_a_configuration(tmp_path: Path) -> None:
    for seed, factor in enumerate((1.0, 2.0, 6.0)):
        records = [record(u, reward=factor * u) for u in range(3)]
        write(tmp_path / str(seed), records, seed=seed, resume=seed == 2)
    write(tmp_path / "other", [record(u) for u in range(2)], lr=0.1)
    groups = grouped(load_runs([tmp_path / n for n in ("0", "1", "2", "other")]))
    assert [(g.label, [r.name for r in g.runs]) for g in groups] == [
        ("lr 0.01", ["0", "1", "2"]),
        ("lr 0.1", ["other"]),
    ]
    reward = charts.charts(groups)[0]
    first, second = reward.curves
    assert reward.updates == [0, 1, 2]
    assert (first.mean, first.low, first.high) == ([0, 3, 6], [0, 1, 2], [0, 6, 12])
    assert second.mean == [0, 0.1, None]  # a shorter run ends earlier


def test_a_curve_lies_where_its_numbers_are(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", [record(u, reward=float(u)) for u in (0, 1, 2, 3, 4)])
    chart = charts.charts(grouped(load_runs([folder])))[0]
    points = [tuple(map(float, p.split(","))) for p in chart.curves[0].line[1:].split("L")]
    left, right = charts.LEFT, charts.WIDTH - charts.RIGHT
    assert [x for x, _ in points] == pytest.approx(
        [left + i * (right - left) / 4 for i in range(5)]
    )
    ticks = {float(t.text): t.at for t in chart.y}
    assert len(ticks) >= 3
    for value, at in ticks.items():  # reward u stands at update u
        assert dict(zip(range(5), (y for _, y in points), strict=True))[int(value)] == at
    assert points[0][1] > points[4][1]  # SVG's y grows downwards


def test_gaps_interrupt_a_curve_and_lone_points_are_seen(tmp_path: Path) -> None:
    rewards = [0.1, None, 0.3, 0.4, None]
    records = [record(u, reward=r) for u, r in enumerate(rewards)]
    curve = charts.charts(grouped(load_runs([write(tmp_path / "a", records)])))[0].curves[0]
    assert curve.line.count("M") == 2 and curve.line.count("L") == 1
    assert [x for x, _ in curve.points] == [charts.LEFT]
    assert curve.mean == rewards


def test_outliers_of_explained_variance_do_not_flatten_the_rest(tmp_path: Path) -> None:
    records = [record(u, explained_variance=-500.0 if u == 1 else 0.5) for u in range(4)]
    drawn = {
        c.plotted.key: c
        for c in charts.charts(grouped(load_runs([write(tmp_path / "a", records)])))
    }
    ticks = [t.text for t in drawn["explained_variance"].y]
    assert ticks == ["\N{MINUS SIGN}1", "\N{MINUS SIGN}0.5", "0", "0.5"]
    assert drawn["explained_variance"].curves[0].mean[1] == -500.0


def test_a_long_run_is_drawn_in_fewer_points(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", [record(u, reward=float(u % 3)) for u in range(1500)], [])
    chart = charts.charts(grouped(load_runs([folder])))[0]
    assert chart.updates == list(range(0, 1500, 3))
    curve = chart.curves[0]
    assert set(curve.mean) == {1.0} and set(curve.low) == {0.0} and set(curve.high) == {2.0}


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.5, 1]),
        (-0.1, 0.93, [0, 0.5]),
        (1200.0, 5900.0, [2000, 4000]),
        (0.0, 29.0, [0, 10, 20]),
        (3e-5, 7e-5, [3e-5, 4e-5, 5e-5, 6e-5, 7e-5]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert charts.ticks(low, high) == pytest.approx(expected)


def test_a_range_of_one_number_gets_a_width() -> None:
    assert charts.widened(2.0, 2.0) == (1.0, 3.0)
    assert charts.widened(0.0, 0.0) == (-0.5, 0.5)
    assert charts.widened(0.0, 1.0) == pytest.approx((-0.04, 1.04))


def test_numbers_of_the_summary(tmp_path: Path) -> None:
    records = [record(u) for u in range(9)] + [bare(9)]
    run = load_run(write(tmp_path / "a", records), "a")
    row = summary(run)
    assert (row["updates"], row["dropped"]) == (10, 4)
    assert (row["first"], row["last"]) == pytest.approx((0.05, 0.8))
    assert row["seconds"] == pytest.approx(9 * 0.5 + 0.25) and row["speed"] == 100.0
    assert phase_seconds(grouped([run])[0]) == pytest.approx(
        {"rollout": 0.2, "reward": 0.05, "update": 0.225}
    )


def test_differing_options_come_first(tmp_path: Path) -> None:
    rows = table([{"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}])
    assert rows == [("b", [2, 3], True), ("c", [None, 4], True), ("a", [1], False)]
    assert table([{"a": 1}]) == [("a", [1], False)]


def test_options_at_their_default_are_folded_away(tmp_path: Path) -> None:
    options = {"lr": 3e-4, "batch": 4, "epochs": 2, "out": "runs/default", "gone": 1}
    first, rest = folded(table([options, options | {"epochs": 3}]))
    assert [(key, differs) for key, _, differs in first] == [
        ("epochs", True),
        ("batch", False),
        ("gone", False),
    ]
    assert [key for key, *_ in rest] == ["lr", "out"]
    html = html_of(write(tmp_path / "a", [record(0)], lr=3e-4, epochs=2, batch=4))
    opened, inside = html.split("<details><summary>3 options at the default</summary>")
    assert ">batch</th>" in opened and ">batch</th>" not in inside
    assert inside.index(">lr</th>") < inside.index("</details>")  # with epochs and seed


def test_curves_of_what_a_log_has(tmp_path: Path) -> None:
    """Evaluations are joined over the updates between; a coefficient of 0 is not in use."""
    log = [
        record(u, response_length=8.0 - u, ended=u / 8, loss_kl_coef=0.0, critic_lr=1e-5)
        | ({"eval_reward": 0.1 * u, "eval_best": 0.0} if u % 3 == 2 else {})
        for u in range(8)
    ]
    found = charts.charts(grouped(load_runs([write(tmp_path / "a", log)])))
    drawn = {c.plotted.key: c.curves[0] for c in found if c.curves}
    assert {"response_length", "ended", "critic_lr", "eval_reward", "eval_best"} < set(drawn)
    assert not {"loss_kl_coef", "reward_std", "lr"} & set(drawn)
    evaluated = drawn["eval_reward"]
    assert evaluated.mean == [None, None, 0.2, None, None, 0.5, None, None]
    assert evaluated.line.count("M") == evaluated.line.count("L") == 1
    assert [f"{x:g},{y:g}" for x, y in evaluated.points] == evaluated.line[1:].split("L")
    log[3]["loss_kl_coef"] = 0.05
    (used,) = [
        c
        for c in charts.charts(grouped(load_runs([write(tmp_path / "b", log)])))
        if c.plotted.key == "loss_kl_coef"
    ]
    assert used.curves[0].mean[3] == 0.05


def test_every_axis_has_a_name(tmp_path: Path) -> None:
    html = html_of(write(tmp_path / "a", [record(u) for u in range(3)]))
    names = re.findall(r'<text class="axis"[^>]*>([^<]+)</text>', html)
    assert names[::2] == ["update"] * len(USUAL)
    assert names[1::2] == [plotted.unit for plotted in USUAL]


def test_every_number_that_is_drawn_is_checked_as_it_is_read() -> None:
    assert {plotted.key for plotted in charts.CURVES} <= {*NUMBERS, *runs._DRAWN}


@pytest.mark.parametrize(
    ("value", "said"),
    [(3e-4, "3e−4"), (-2.5e-5, "−2.5e−5"), (0.001, "0.001"), (0, "0"), (20_000, "20k")],
)
def test_ticks_are_short(value: float, said: str) -> None:
    assert charts.text(value) == said


def shots_of(folder: Path, rows: list[dict], room: int = 10**6) -> Shots:
    last = max(row["update"] for row in rows)
    run = load_run(write(folder, [record(u) for u in range(last + 1)], rows), "a")
    return samples(run, room)


def test_samples_of_every_update_are_in_the_page(tmp_path: Path) -> None:
    rows = [
        {"update": u, "prompt": f"p{u}", "completion": f"c{u}.{k}", "reward": k / 4}
        for u in range(40)
        for k in range(4)
    ]
    rows[5] = {"update": 1, "prompt": "p1", "completion": "\x1b", "fault": "late"}
    shots = shots_of(tmp_path / "a", rows)
    assert shots.updates == list(range(40)) and shots.note == "" and shots.ends == [0, 39]
    assert shots.cards[7][2] == ("p7", "c7.2", "+0.500", False)
    assert shots.cards[1][1] == ("p1", "␛", "late", True)
    html = html_of(tmp_path / "a")
    (data,) = re.findall(r'<script type="application/json">(\{"cards.*?)</script>', html)
    assert json.loads(data) == {
        "updates": shots.updates,
        "cards": [[list(card) for card in cards] for cards in shots.cards],
    }
    assert html.count("c0.0") == html.count("c39.3") == 2 and html.count("c20.0") == 1


def test_what_is_capped_of_samples_is_said(tmp_path: Path) -> None:
    rows = [
        {"update": u, "prompt": "x" * 100, "completion": "y" * 100, "reward": 0.0}
        for u in range(100)
    ]
    rows[50]["completion"] = "z" * 5000
    shots = shots_of(tmp_path / "a", rows, room=12_000)
    assert shots.updates == list(range(0, 100, 3))
    assert shots.note == (
        "The page has 34 of the 100 updates with samples, evenly spaced, and the first 4000"
        " characters of longer texts (samples: 1); samples.jsonl has all."
    )
    assert len(shots_of(tmp_path / "b", rows).cards[50][0].completion) == 4001


def test_the_samples_of_each_run_are_there_without_a_script(tmp_path: Path) -> None:
    folders = [
        write(
            tmp_path / f"seed{s}",
            [record(u) for u in range(3)],
            [
                {"update": u, "prompt": "p", "completion": f"of {s} at {u}", "reward": 0.0}
                for u in range(3)
            ],
            seed=s,
        )
        for s in range(2)
    ]
    static = re.sub("<script.*?</script>", "", html_of(*folders), flags=re.DOTALL)
    for s in range(2):
        assert f"<h3>seed{s}</h3>" in static
        assert [f"of {s} at {u}" in static for u in range(3)] == [True, False, True]
    assert static.count('<div class="pager" hidden>') == 4


def test_alarms_that_return_are_one_entry(tmp_path: Path) -> None:
    bad = {*range(10, 20), *range(60, 80)}
    log = [record(u, clip_frac=0.9 if u in bad else 0.0) for u in range(100)]
    html = html_of(write(tmp_path / "a", log))
    assert html.count("ratios saturate") == 1 and "Again at update 62." in html


def test_numbers_and_text_as_the_page_writes_them() -> None:
    assert number(-0.25, "{:+.2f}") == "\N{MINUS SIGN}0.25" and number(float("nan")) == "–"
    assert shown("a\tb\n\x00\x1b") == "a\tb\n␀␛"


@pytest.mark.parametrize("records", [[record(0)], [bare(0)], [bare(0), bare(1)]])
def test_short_and_bare_runs(tmp_path: Path, records: list[dict]) -> None:
    html = html_of(write(tmp_path / "a", records, updates=4))
    assert f">{len(records)} of 4<" in html.replace(" class", "")
    whole = records[0]["reward"] is not None
    assert html.count("<figure") == (len(USUAL) if whole else 1)  # tokens per second
    assert ("No number in the log: Reward, KL to the reference, Clip" in html) == (not whole)
    assert "nan" not in re.sub(
        "<(style|script).*?</(style|script)>|returned nan", "", html, flags=re.S
    )


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    sample = {"update": 0, "prompt": HOSTILE, "completion": HOSTILE, "fault": HOSTILE}
    log = [record(u, dropped={str(i): HOSTILE for i in range(4)}) for u in range(6)]
    folder = write(tmp_path / "<b>a", log, [sample, sample | {"update": 3}], model=HOSTILE)
    html = write_report([folder], tmp_path / "out" / "page.html").read_text()
    # The page's own, the data of each chart, and the samples'.
    assert html.count("<script") == 2 + len(USUAL)
    assert "<img" not in html and "<b>a" not in html
    assert html.count("&lt;/script&gt;&lt;script&gt;window.hit = 1") >= 5
    assert "samples dropped: 100% of the samples" in html
    assert "\x00" not in html and "␀" in html


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    html = html_of(write(tmp_path / "a", [record(u) for u in range(3)]))
    assert "://" not in html and not re.search(r"(src|href)=(?!\"data:,\")", html)
    assert "default-src 'none'" in html


def test_a_resumed_run_counts_each_update_once(tmp_path: Path) -> None:
    records = [record(0), record(1, reward=9.0), record(2), record(1, reward=0.5), record(2)]
    run = load_run(write(tmp_path / "a", records), "a")
    assert list(run.records) == [0, 1, 2] and run.records[1]["reward"] == 0.5


def test_a_run_that_was_killed_in_a_line(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", [record(0), record(1)])
    log = folder / "log.jsonl"
    whole = log.read_text()
    log.write_text(whole + whole[:30])
    assert list(load_run(folder, "a").records) == [0, 1]
    log.write_text(whole[:30] + "\n" + whole)
    with pytest.raises(RunError, match=r"log.jsonl, line 1: not JSON"):
        load_run(folder, "a")


def test_only_the_log_is_needed(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", [record(0)])
    for name in ("config.json", "versions.json", "samples.jsonl"):
        (folder / name).unlink()
    html = html_of(folder)
    assert html.count("not recorded") == 2 and "The run kept none." in html


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [write(tmp_path / n / "run", [record(0)], lr=i) for i, n in enumerate("ab")]
    assert [r.name for r in load_runs(folders)] == list(map(str, folders))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    trainer(run, updates=2).run(Console(quiet=True))
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == f"page: {run / 'report.html'}"
    html = (run / "report.html").read_text()
    assert "<h4>Update <span>0</span>" in html and "<h4>Update <span>1</span>" in html
    assert html.count("<blockquote>") == 9 and "backend" in html  # one is the script's template
    absent = {"eval_reward", "eval_best", "critic_lr", "loss_kl_coef"}
    absent |= {"support_size", "support_cut", "divergence"}
    drawn = set(re.findall('data-chart="(.*?)"', html))
    assert drawn == {plotted.key for plotted in charts.CURVES} - absent
    assert html.count('<path class="line') == len(drawn)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "is no folder of a run: it has no log.jsonl"), ("", "has no finished update")],
)
def test_a_folder_without_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "log.jsonl").write_text(text)
    assert main(["report", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
