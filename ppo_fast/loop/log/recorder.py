"""What a run leaves in its folder: options, versions, log, samples and reward curve."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from ppo_fast.loop.config import TrainConfig
from ppo_fast.loop.data.sequences import Scores
from ppo_fast.loop.files import naming, replace, require_file, require_folder
from ppo_fast.loop.log.history import NUMBERS, History, Record
from ppo_fast.loop.log.lock import RunLock
from ppo_fast.loop.log.plot import plot
from ppo_fast.loop.log.tensorboard import Board
from ppo_fast.loop.log.versions import versions

SAMPLES = 4  # of every update are kept


class Recorder:
    """Writes what a run leaves as it goes on.

    `config.json` has the options and `versions.json` what it ran on; `log.jsonl` an update a line,
    `samples.jsonl` some completions of each, every line a JSON object. TensorBoard gets the log's
    numbers where the options ask for it.
    """

    def __init__(self, config: TrainConfig, backend: str, lock: RunLock) -> None:
        self.folder = config.out
        self._config, self._backend, self._lock = config, backend, lock
        self.history = History()
        mode = "a" if config.resume else "w"
        self._log = _opened(self.folder / "log.jsonl", mode)
        self._samples = _opened(self.folder / "samples.jsonl", mode)
        self._board: Board | None = None
        if not config.resume:
            self._begin(None)

    def _begin(self, done: int | None) -> None:
        """Say what runs, which a run that is not allowed to resume must not."""
        options = json.dumps(dataclasses.asdict(self._config), default=str, indent=2)
        replace(self.folder / "config.json", f"{options}\n".encode())
        ran_on = json.dumps(versions(self._backend), indent=2)
        replace(self.folder / "versions.json", f"{ran_on}\n".encode())
        if self._config.tensorboard:
            with naming(self.folder / "tensorboard"):
                self._board = Board(self.folder / "tensorboard", done)

    def hold(self) -> None:
        """Keep the folder to a run from its begin to its end."""
        for name in ("checkpoints", "tensorboard"):
            require_folder(self.folder / name, link=True)
        self._lock.hold()

    def release(self) -> None:
        """Give the folder back."""
        self._lock.release()

    def update(self, record: Record) -> None:
        """Append one finished update; a number that is not finite is written as null."""
        self.history.append(record)
        with naming(self.folder / "log.jsonl"):
            self._log.write(json.dumps(_finite(record), allow_nan=False) + "\n")
            self._log.flush()
        if self._board is not None:
            with naming(self.folder / "tensorboard"):
                self._board.update(record)

    def samples(self, update: int, prompts: list[str], completions: list[str], s: Scores) -> None:
        """Append the first completions of an update, each with its reward or its fault."""
        for i, (prompt, text) in enumerate(zip(prompts[:SAMPLES], completions, strict=False)):
            verdict = {"fault": s.faults[i]} if i in s.faults else {"reward": s.values[i]}
            sample = {"update": update, "prompt": prompt, "completion": text} | verdict
            with naming(self.folder / "samples.jsonl"):
                self._samples.write(json.dumps(sample) + "\n")
        with naming(self.folder / "samples.jsonl"):
            self._samples.flush()

    def rewind(self, updates: int) -> list[str]:
        """Cut log and samples back to `updates` updates; what they lack, in words."""
        self._log.close()
        self._samples.close()
        _, lacking = cut_back(self.folder / "samples.jsonl", updates)
        lines, damaged = cut_back(self.folder / "log.jsonl", updates)
        lacking += damaged
        self._log = _opened(self.folder / "log.jsonl", "a")
        self._samples = _opened(self.folder / "samples.jsonl", "a")
        self.history = History(lines)
        self._begin(updates)
        if [r["update"] for r in lines] != list(range(updates)):
            lacking.append(f"the log lacks some of the first {updates} updates")
        return lacking

    def sync(self) -> None:
        """Have log and samples on the disk, so that no checkpoint is ahead of them."""
        for file in (self._log, self._samples):
            with naming(Path(file.name)):
                os.fsync(file.fileno())

    def close(self) -> Path | None:
        """Close the files, draw the reward curve and give the folder back.

        Returns the curve's path if there is any update. What fails does not keep the rest from it.
        """
        path = self.folder / "reward.png"
        steps = [
            lambda: _close(self._log, self.folder / "log.jsonl"),
            lambda: _close(self._samples, self.folder / "samples.jsonl"),
            lambda: _close(self._board, self.folder / "tensorboard"),
            lambda: plot(self.history, path) if self.history else None,
            self.release,
        ]
        _run_all(steps)
        return path if self.history else None


class Muted(Recorder):
    """Keeps the history of a rank that writes nothing, since the first rank writes it."""

    def __init__(self) -> None:
        self.history = History()

    def hold(self) -> None:
        """Nothing: the folder is the first rank's."""

    def release(self) -> None:
        """Nothing to give back."""

    def update(self, record: Record) -> None:
        """Keep one finished update."""
        self.history.append(record)

    def samples(self, update: int, prompts: list[str], completions: list[str], s: Scores) -> None:
        """Nothing: these are the first rank's."""

    def close(self) -> Path | None:
        """Nothing to close or to draw."""
        return None

    def rewind(self, updates: int) -> list[str]:
        """Nothing to cut back."""
        return []

    def sync(self) -> None:
        """Nothing to write."""


def _opened(path: Path, mode: str) -> IO[str]:
    require_file(path)
    return path.open(mode, encoding="utf-8")


def _close(file: IO[str] | Board | None, path: Path) -> None:
    if file is not None:
        with naming(path):
            file.close()


def _run_all(steps: list[Callable[[], None]]) -> None:
    """Run each step, also after one that failed."""
    if steps:
        try:
            steps[0]()
        finally:
            _run_all(steps[1:])


def cut_back(path: Path, updates: int) -> tuple[list[Record], list[str]]:
    """Drop what a file of JSON lines has of later updates, and lines that are none.

    Returns the lines that are left, and in words which were dropped that a kill cannot explain:
    it tears the last line alone.
    """
    kept, found, damaged = [], [], []
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        entry = _record(line)
        if entry is None:
            if number < len(lines):
                damaged.append(f"{path}: line {number} dropped, which is no record of an update")
        elif entry["update"] >= updates:
            break
        else:
            kept.append(line)
            found.append(entry)
    if (left := b"".join(kept)) != content:
        replace(path, left)
    return found, damaged


def _record(line: bytes) -> Record | None:
    """A line's object, with an update and numbers where numbers belong; None if it is not one."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or not line.endswith(b"\n"):
        return None
    numbers = [entry[name] for name in NUMBERS if entry.get(name) is not None]
    sound = all(isinstance(x, int | float) for x in numbers) and type(entry.get("update")) is int
    return entry if sound and isinstance(entry.get("dropped", {}), dict) else None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
