"""Recorder of a run: options, versions, log, samples and reward curve in its folder."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from ppo_fast.loop.config import TrainConfig
from ppo_fast.loop.data.sequences import Scores
from ppo_fast.loop.files import naming, replace, require_file
from ppo_fast.loop.log.history import NUMBERS, History, Record
from ppo_fast.loop.log.plot import plot
from ppo_fast.loop.log.trackers import Board, Trackers, check
from ppo_fast.loop.log.versions import versions

FILES = LOG, SAMPLES, CONFIG, VERSIONS, REWARD_CURVE = (
    "log.jsonl",
    "samples.jsonl",
    "config.json",
    "versions.json",
    "reward.png",
)
LINES = (LOG, SAMPLES)
SAMPLED = 4  # samples kept of every update


class Recorder:
    """Writer of a run's folder, as the run goes on; nothing is written before `begin` or `resume`.

    `config.json` has the options and `versions.json` the machine and its versions; `log.jsonl` an
    update a line, `samples.jsonl` some completions of each, every line a JSON object. The trackers
    that the options name get the log's numbers.
    """

    def __init__(self, config: TrainConfig, backend: str) -> None:
        self.folder = config.out
        self.sampled: list[Record] = []  # of the last update, as they are logged
        self._config, self._backend = config, backend
        self._files: dict[str, IO[str]] = {}
        self._board: Board | None = None
        self._trackers: Trackers | None = None

    @property
    def open(self) -> bool:
        """True from `begin` or `resume` on."""
        return bool(self._files)

    def begin(self, say: Callable[[str], None]) -> None:
        """Start with an empty log; a tracker that fails is reported to `say`."""
        if self._trackers is None:
            self.track(say)
        self._open("w")
        self._describe(None)

    def resume(self, updates: int, say: Callable[[str], None]) -> tuple[list[Record], list[str]]:
        """Cut log and samples back to `updates` updates; the log, and what is missing in words.

        A tracker that fails is reported to `say`.
        """
        self.track(say)
        for name in LINES:
            _opened(self.folder / name, "a").close()
        _, lacking = cut_back(self.folder / SAMPLES, updates)
        lines, damaged = cut_back(self.folder / LOG, updates)
        lacking += damaged
        self._open("a")
        self._describe(updates)
        if [r["update"] for r in lines] != list(range(updates)):
            lacking.append(f"the log lacks some of the first {updates} updates")
        return lines, lacking

    def update(self, record: Record) -> None:
        """Append one finished update; a number that is not finite is written as null."""
        with naming(self.folder / LOG):
            self._files[LOG].write(json.dumps(_finite(record), allow_nan=False) + "\n")
            self._files[LOG].flush()
        if self._board is not None:
            with naming(self.folder / "tensorboard"):
                self._board.update(record)
        if self._trackers is not None:
            self._trackers.update(record)

    def samples(self, update: int, prompts: list[str], completions: list[str], s: Scores) -> None:
        """Append the first completions of an update, each with its reward or its fault."""
        file, self.sampled = self._files[SAMPLES], []
        for i, (prompt, text) in enumerate(zip(prompts[:SAMPLED], completions, strict=False)):
            verdict = {"fault": s.faults[i]} if i in s.faults else {"reward": s.values[i]}
            self.sampled.append({"update": update, "prompt": prompt, "completion": text} | verdict)
        with naming(self.folder / SAMPLES):
            file.writelines(json.dumps(sample) + "\n" for sample in self.sampled)
            file.flush()

    def sync(self) -> None:
        """Have log and samples on the disk, so that no checkpoint is ahead of them."""
        for name, file in self._files.items():
            with naming(self.folder / name):
                os.fsync(file.fileno())

    def close(self, history: History) -> Path | None:
        """Close the files and draw the reward curve; its path if there is any update.

        A step that fails does not keep the others from being done.
        """
        path, drawn = self.folder / REWARD_CURVE, len(history) > 0 and self.open
        _run_all(
            [
                *(functools.partial(_close, f, self.folder / n) for n, f in self._files.items()),
                lambda: _close(self._board, self.folder / "tensorboard"),
                lambda: _close(self._trackers, self.folder),
                lambda: plot(history, path) if drawn else None,
            ]
        )
        return path if drawn else None

    def _open(self, mode: str) -> None:
        self._files = {name: _opened(self.folder / name, mode) for name in LINES}

    def track(self, say: Callable[[str], None]) -> None:
        """Start the trackers, before any file is changed."""
        check(self._config)
        self._trackers = Trackers(self._config, say)

    def _describe(self, done: int | None) -> None:
        """Write options and versions, and begin TensorBoard's files after `done` updates."""
        options = json.dumps(dataclasses.asdict(self._config), default=str, indent=2)
        replace(self.folder / CONFIG, f"{options}\n".encode())
        ran_on = json.dumps(versions(self._backend), indent=2)
        replace(self.folder / VERSIONS, f"{ran_on}\n".encode())
        if "tensorboard" in self._config.trackers():
            with naming(self.folder / "tensorboard"):
                self._board = Board(self.folder / "tensorboard", done)


def _opened(path: Path, mode: str) -> IO[str]:
    require_file(path)
    return path.open(mode, encoding="utf-8")


def _close(file: IO[str] | Board | Trackers | None, path: Path) -> None:
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
    """Drop later updates, and lines that hold no record, from a file of JSON lines.

    Returns the records that are left, and in words the dropped lines that a kill does not explain:
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
