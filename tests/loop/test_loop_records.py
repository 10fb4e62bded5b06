"""Records of a run as it goes on: log, samples, versions, plot, progress."""

from __future__ import annotations

import io
import json
import math
import re
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from loop_helpers import trainer
from rich.console import Console

import ppo_fast
from ppo_fast.loop.data.sequences import Scores
from ppo_fast.loop.log.fields import FieldError
from ppo_fast.loop.log.history import NUMBERS, History
from ppo_fast.loop.log.plot import plot
from ppo_fast.loop.log.progress import example, progress_bar, say, summary
from ppo_fast.loop.log.versions import versions

QUIET = Console(quiet=True)


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_seconds_and_tokens_per_second(tmp_path: Path) -> None:
    t = trainer(tmp_path, updates=2)
    t.run(QUIET)
    for record in lines_of(tmp_path / "log.jsonl"):
        seconds = record["seconds"]
        assert set(seconds) == {"rollout", "reward", "scoring", "advantages", "update"}
        # every sample was kept, and the statistics count each token once an epoch
        tokens = record["n_tokens"] / t.config.epochs
        assert record["tokens_per_second"] * sum(seconds.values()) == pytest.approx(tokens)
        assert record["batch"] == 8 and record["lr"] == t.config.lr


def test_lengths_ends_and_spread_of_an_update(tmp_path: Path) -> None:
    """Counted again from the stored samples, of which those without a reward are left out."""

    def reward(prompts: list[str], texts: list[str]) -> list[float]:
        return [math.nan, *[float(i) for i in range(1, len(texts))]]

    t = trainer(tmp_path)
    t.sampler.eos = list(range(0, t.agent.policy.model.config.vocab_size, 8))  # likelier ends
    t.collector.reward = lambda prompts, texts: [float(i) for i in range(len(texts))]
    record, sample = t.iteration()
    width = sample.rollout.seqs.mask.shape[1]
    responses = [
        [token for token, kept in zip(row[-width:], mask, strict=True) if kept]
        for row, mask in zip(
            sample.rollout.seqs.tokens.tolist(), sample.rollout.seqs.mask.tolist(), strict=True
        )
    ]
    ended = [row[-1] in t.eos for row in responses]
    assert True in ended and False in ended
    assert record["response_length"] == sum(map(len, responses)) / 8
    assert record["ended"] == sum(ended) / 8
    assert record["reward_std"] == pytest.approx(math.sqrt((8**2 - 1) / 12))
    t.collector.reward = reward
    record, sample = t.iteration()
    assert sample.scores.faults and record["reward_std"] == 2.0  # of 1 to 7


def test_no_reward_has_no_spread() -> None:
    assert math.isnan(Scores([0.0, 0.0], {0: "late", 1: "late"}).std)
    assert Scores([0.0, 0.7], {0: "late"}).std == 0.0


def test_samples_are_lines_of_json(tmp_path: Path) -> None:
    def reward(prompts: list[str], texts: list[str]) -> list[float]:
        return [math.nan, *[0.5] * (len(prompts) - 1)]

    trainer(tmp_path, reward, updates=2).run(QUIET)
    samples = lines_of(tmp_path / "samples.jsonl")
    assert [s["update"] for s in samples] == [0] * 4 + [1] * 4
    assert samples[0]["fault"] == "reward returned nan" and "reward" not in samples[0]
    assert samples[1]["reward"] == 0.5 and "fault" not in samples[1]
    assert all(isinstance(s["prompt"], str) and isinstance(s["completion"], str) for s in samples)


def test_versions(tmp_path: Path) -> None:
    t = trainer(tmp_path)
    t.begin()
    found = json.loads((tmp_path / "versions.json").read_text())
    assert found == versions(t.backend)
    assert found["ppo_fast"] == ppo_fast.__version__ and found["torch"] == torch.__version__
    assert found["python"] == sys.version.split()[0]
    assert found["backend"] == t.backend != "auto"


def test_summary_says_what_there_is() -> None:
    record = {"reward": 0.71364, "kl": 11.441, "clip_frac": 0.1964, "tokens_per_second": 5571.2}
    assert summary(record) == "reward +0.714, KL 11.44, clip 0.20, tokens/s 5571"
    assert summary({"reward": math.nan, "tokens_per_second": 10.0}) == "tokens/s 10"


def watched(console: Console, records: list[dict], updates: int, samples: list[dict]) -> str:
    """Text on the console after a run of `records`."""
    history = History()
    with progress_bar(console, 0, updates) as show:
        for record in records:
            history.append(record)
            show(record, history, samples)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def numbers(update: int, **changes: object) -> dict:
    return {"update": update, "reward": 0.5, "kl": 1.0, "clip_frac": 0.1, "dropped": {}} | changes


def piped() -> Console:
    return Console(file=io.StringIO(), width=80)


def test_progress_prints_faults_alarms_and_a_line_a_tenth() -> None:
    records = [
        numbers(
            i,
            clip_frac=0.9 if i > 10 else 0.1,
            dropped={3: "reward [b]returned[/b] nan"} if i == 7 else {},
        )
        for i in range(20)
    ]
    lines = watched(piped(), records, 20, []).splitlines()
    assert lines.count("update 7: sample 3 dropped: reward [b]returned[/b] nan") == 1
    said = "update 13: ratios saturate: 58% of the tokens are clipped and give no gradient."
    assert [line.startswith(said) for line in lines].count(True) == 1  # on one line
    ends = [f"{n} of 20 updates: reward +0.500, KL 1.00, clip" for n in range(2, 21, 2)]
    assert [line[:-5] for line in lines if " of 20 updates" in line] == ends
    assert len(lines) == 12


@pytest.mark.parametrize(
    ("done", "updates", "said"),
    [
        (60, 60, list(range(6, 61, 6))),
        (19, 19, [*range(2, 19, 2), 19]),
        (4, 4, [1, 2, 3, 4]),
        (45, 400, [40, 45]),  # stopped
    ],
)
def test_samples_are_shown_about_ten_times_and_at_the_end(
    done: int, updates: int, said: list[int]
) -> None:
    samples = [
        {"prompt": "one\nfilm \x1b[31m[red]", "completion": ":smile: " * 40, "reward": 0.25},
        {"prompt": "not this one", "completion": "", "reward": 0.0},
    ]
    lines = watched(piped(), [numbers(i) for i in range(done)], updates, samples).splitlines()
    assert [int(line.split()[0]) for line in lines if " updates: " in line] == said
    texts = [line for line in lines if " updates: " not in line]
    assert texts[0::2] == ["  prompt: one film \\x1b[31m[red]"] * len(said)
    assert texts[1::2] == ["  +0.250: " + (":smile: " * 8)[:63] + "..."] * len(said)


def test_samples_without_a_reward_or_a_text() -> None:
    sample = {"prompt": "a film", "completion": "", "fault": "late"}
    assert example([sample]) == ["   prompt: a film", "  dropped: (empty)"]
    assert example([]) == []


def test_of_a_long_prompt_both_ends_are_shown() -> None:
    prompt = "Answer the question.\n" + "x" * 10_000 + "\x1b 4 + 3 = ?"
    line = example([{"prompt": prompt, "completion": "c", "reward": 0.0}])[0]
    assert line.startswith("  prompt: Answer the question. x ... xxx") and len(line) == 10 + 66
    assert line.endswith("xxx\\x1b 4 + 3 = ?")


def test_an_alarm_that_returns_is_told_once_more_and_counted() -> None:
    bad = {i + k for i in (10, 40, 70, 100) for k in range(8)}
    records = [numbers(i, clip_frac=0.9 if i in bad else 0.0) for i in range(120)]
    out = watched(piped(), records, 120, [])
    lines = [line for line in out.splitlines() if "ratios saturate" in line]
    assert [line[:30] for line in lines[:2]] == [
        "update 12: ratios saturate: 54",
        "update 42: again, ratios satur",
    ]
    assert lines[2:] == ["ratios saturate: set in 4 times, at updates 12, 42, 72, 102"]


@pytest.mark.parametrize("width", [80, 100])
def test_the_bar_fits_and_names_its_times(width: int) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, no_color=True)
    records = [numbers(i, tokens_per_second=123456.0) for i in range(3)]
    out = watched(console, records, 10_000, [])
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out).replace("\r", "\n").splitlines()
    assert max(map(len, drawn)) <= width
    bars = [line for line in drawn if line.startswith("training")]
    assert re.search(
        r" 3/10000 elapsed \d:\d\d:\d\d left (\d:\d\d:\d\d|-:--:--)$", bars[-1].strip()
    )
    assert drawn[drawn.index(bars[-1]) + 1].strip() == summary(records[-1])


def test_nothing_is_wrapped_or_marked_up_in_a_pipe() -> None:
    console = piped()
    path = "/a folder/" + "long/" * 30 + "reward.png"
    say(console, f"curve: {path}")
    say(console, "[bold]plain[/bold] :smile: \x1b[2J\ttab\ntwo")
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines() == [
        f"curve: {path}",
        "[bold]plain[/bold] :smile: \\x1b[2J\\ttab",
        "two",
    ]


def test_the_plot_has_evaluations_where_there_are_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    drawn: list[dict[tuple[str, str], list[list[float]]]] = []
    save = Figure.savefig

    def seen(figure: Figure, *arguments: object, **options: object) -> None:
        lines = [line for axes in figure.axes for line in axes.get_lines()]
        names = [(line.axes.get_ylabel(), line.get_label()) for line in lines]
        data = [[column.tolist() for column in line.get_data()] for line in lines]
        drawn.append(dict(zip(names, data, strict=True)))
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", seen)
    records = [numbers(i, response_length=9.0 - i) for i in range(4)]
    plot(History(records), tmp_path / "a.png")
    assert ("reward", "evaluation") not in drawn[0]
    lengths = drawn[0]["response length\n(tokens)", "_child0"]
    assert lengths == [[0, 1, 2, 3], [9, 8, 7, 6]]
    records[1]["eval_reward"], records[3]["eval_reward"] = 0.25, 0.75
    plot(History(records), tmp_path / "b.png")
    assert drawn[1]["reward", "evaluation"] == [[1, 3], [0.25, 0.75]]
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_history_has_the_numbers_that_are_there() -> None:
    first = {"update": 0, "reward": 0.5, "kl": None, "dropped": {0: "late", 3: "nan"}, "lr": 1.0}
    history = History([first, {"update": 1, "reward": math.nan, "batch": 8}])
    assert len(history) == 2 and history.column("update").tolist() == [0.0, 1.0]
    assert history.column("reward")[0] == 0.5 and np.isnan(history.column("reward")[1])
    assert np.isnan(history.column("kl")).all() and np.isnan(history.column("batch")[0])
    assert history.column("dropped").tolist() == [2.0, 0.0]
    assert history.fault(0) == history.fault(1) == "nan"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"reward": "0.5"}, "reward must be a number or null, got '0.5'"),
        ({"kl": [1.0]}, r"kl must be a number or null, got \[1.0\]"),
        ({"batch": True}, "batch must be a number or null, got True"),
        ({"dropped": [1]}, r"dropped must be an object, got \[1\]"),
        ({"dropped": {"0": None}}, r"dropped\['0'\] must be a text, got None"),
    ],
)
def test_history_takes_nothing_that_is_no_number(changes: dict, says: str) -> None:
    history = History([{"update": 0, "reward": 0.5}])
    with pytest.raises(FieldError, match=says):
        history.append({"update": 1, "reward": 0.5} | changes)
    assert {len(history.column(name)) for name in (*NUMBERS, "dropped")} == {1}
    assert history.lost == {}


def test_history_knows_numbers_lost_from_numbers_lacking() -> None:
    history = History([{"update": 0, "reward": None}, {"update": 1, "kl": None, "entropy": 1e3}])
    history.append({"update": 2, "kl": math.inf, "entropy": 10**400, "batch": 8})
    assert history.lost == {1: "kl", 2: "kl, entropy"}
    assert np.isnan(history.column("kl")).all() and np.isnan(history.column("entropy")[2])


@pytest.mark.case("R10")
def test_memory_grows_by_numbers_alone() -> None:
    """An update keeps eight bytes a number, and an eighth more that arrays grow ahead."""
    history = History()
    tracemalloc.start()
    try:
        for i in range(4000):
            numbers = {f"number {j}": float(i + j) for j in range(40)}
            history.append({"update": i, "reward": 0.5, "seconds": dict(numbers)} | numbers)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    columns = len(NUMBERS) + 1
    assert 8 * columns * 4000 <= held <= 9 * columns * 4000 + 4096
