"""Two runs in one folder: the second is refused, and nothing of the first is touched."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from loop_helpers import trainer
from rich.console import Console

from ppo_fast.loop import CheckpointError, RunLockedError
from ppo_fast.loop.log.lock import NAME, RunLock
from ppo_fast.loop.rewards import letters

QUIET = Console(quiet=True)
HOLD = """
import sys
from pathlib import Path
from ppo_fast.loop.log.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.claim()
print("held", flush=True)
sys.stdin.read()
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    """Another process that has the folder's lock until it is killed."""
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_another_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    trainer(tmp_path, updates=1).run(QUIET)
    process = holder(tmp_path)
    try:
        before = contents(tmp_path)
        for options in ({}, {"resume": True}, {"resume": True, "lr": 0.5}):
            fresh = trainer(tmp_path, updates=2, **options)
            with pytest.raises(RunLockedError) as refused:
                fresh.run(QUIET) if options else fresh.step()
            said = str(refused.value)
            assert said.startswith(f"{tmp_path} is in use by another run (process {process.pid} ")
        assert contents(tmp_path) == before
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    outcome = trainer(tmp_path, updates=2, resume=True).run(QUIET)
    assert len(outcome.rewards) == 2


def everything_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time of the last change and content of each file and folder."""
    return {
        str(p): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"")
        for p in [folder, *folder.rglob("*")]
    }


@pytest.mark.parametrize("left", ["nothing", "finished", "unfinished", "a FIFO"])
@pytest.mark.parametrize("resume", [False, True])
def test_making_a_trainer_touches_no_file(tmp_path: Path, left: str, resume: bool) -> None:
    """Whatever is in its folder: a run begins with its first step."""
    out = tmp_path / "run"
    if left.endswith("finished"):
        done = trainer(out, updates=2, save_every=1)
        done.step()
        done.checkpoints.save(done)
        if left == "finished":
            done.run(QUIET)
    if left == "a FIFO":
        out.mkdir()
        os.mkfifo(out / "log.jsonl")
    kept = tmp_path / "kept.jsonl"
    before = everything_of(tmp_path)
    opened: list[str] = []
    watching = [True]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        name = str(arguments[0]) if arguments else ""
        if watching and event.startswith(("open", "os.", "shutil.")) and str(tmp_path) in name:
            opened.append(f"{event} {name}")

    sys.addaudithook(watch)
    trainer(out, resume=resume, save_transitions=kept, tensorboard=True)
    watching.clear()
    assert everything_of(tmp_path) == before and not opened


def test_a_run_in_the_same_process_is_refused_while_it_goes_on(tmp_path: Path) -> None:
    refusals: list[str] = []

    def reward(prompts: list[str], texts: list[str]) -> list[float]:
        with pytest.raises(RunLockedError) as refused:
            trainer(tmp_path / "link" / ".." / "run").run(QUIET)
        refusals.append(str(refused.value))
        return letters(prompts, texts)

    (tmp_path / "link").mkdir()
    trainer(tmp_path / "run", reward, updates=2).run(QUIET)
    assert len(refusals) == 2 and "in use by another run (process " in refusals[0]
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["update"] for line in log] == [0, 1]


def test_the_lock_lasts_from_the_begin_of_a_run_to_its_end(tmp_path: Path) -> None:
    def free() -> bool:
        with (tmp_path / NAME).open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    found: list[bool] = []

    def failing(prompts: list[str], texts: list[str]) -> list[float]:
        found.append(free())
        return [0.0]

    t = trainer(tmp_path, failing, save_every=0)
    assert not (tmp_path / NAME).exists()
    with pytest.raises(ValueError, match="reward must return 8 numbers"):
        t.run(QUIET)
    assert found == [False] and free()
    trainer(tmp_path, save_every=1).run(QUIET)
    with pytest.raises(CheckpointError, match="lr is"):
        trainer(tmp_path, resume=True, lr=0.5).run(QUIET)
    assert free()


def test_of_two_trainers_that_began_before_either_runs_one_is_refused(tmp_path: Path) -> None:
    """The later one emptied the log."""
    first = trainer(tmp_path, updates=2)
    second = trainer(tmp_path, updates=2, seed=1, overwrite=True)
    first.step(), second.step()
    with pytest.raises(RunLockedError, match=f"is in use by another run .process {os.getpid()} "):
        first.run(QUIET)
    second.run(QUIET)
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 1
    log = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["update"] for line in log] == [0, 1]


def test_a_forked_process_does_not_keep_the_lock(tmp_path: Path) -> None:
    """It may outlive a run that was killed."""
    process = subprocess.run(
        [sys.executable, "-c", FORKS, str(tmp_path)],
        text=True,
        capture_output=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    child = int(process.stdout)
    try:
        os.kill(child, 0)
        lock = RunLock(tmp_path)
        lock.claim()
        assert str(os.getpid()) in (tmp_path / NAME).read_text()
    finally:
        os.kill(child, signal.SIGKILL)


FORKS = """
import os, signal, sys
from pathlib import Path
from ppo_fast.loop.log.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.claim()
ready, done = os.pipe()
child = os.fork()
if child == 0:
    os.close(1), os.close(2)
    os.write(done, b"1")
    signal.pause()
os.read(ready, 1)
print(child, flush=True)
os._exit(0)
"""


def test_a_system_without_flock_is_told_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*args: Any) -> None:
        raise OSError(38, "Function not implemented")

    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="no lock on .*run, so"):
        patch.setattr(fcntl, "flock", none)
        trainer(tmp_path / "run", updates=1).run(QUIET)
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="has no flock"):
        patch.setattr("ppo_fast.loop.log.lock.fcntl", None)
        trainer(tmp_path / "other", updates=1).run(QUIET)
    assert (tmp_path / "other" / "model" / "model.safetensors").exists()
