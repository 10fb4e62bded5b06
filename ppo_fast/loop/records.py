"""What a run leaves in its folder: options, versions, log, samples and reward curve."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

from ppo_fast.loop.config import TrainConfig
from ppo_fast.loop.history import History, Record, mean
from ppo_fast.loop.rewards import Scores
from ppo_fast.loop.tensorboard import Board
from ppo_fast.loop.versions import versions

SAMPLES = 4  # of every update are kept


class Recorder:
    """Writes what a run leaves as it goes on.

    `config.json` has the options and `versions.json` what it ran on; `log.jsonl` an update a line,
    `samples.jsonl` some completions of each, every line a JSON object. TensorBoard gets the log's
    numbers where the options ask for it.
    """

    def __init__(self, config: TrainConfig, backend: str) -> None:
        self.folder = config.out
        self.folder.mkdir(parents=True, exist_ok=True)
        options = json.dumps(dataclasses.asdict(config), default=str, indent=2)
        (self.folder / "config.json").write_text(options + "\n")
        ran_on = json.dumps(versions(backend), indent=2)
        (self.folder / "versions.json").write_text(ran_on + "\n")
        self.history = History()
        mode = "a" if config.resume else "w"
        self._log = (self.folder / "log.jsonl").open(mode, encoding="utf-8")
        self._samples = (self.folder / "samples.jsonl").open(mode, encoding="utf-8")
        self._board = Board(self.folder / "tensorboard") if config.tensorboard else None

    def update(self, record: Record) -> None:
        """Append one finished update; a number that is not finite is written as null."""
        self.history.append(record)
        self._log.write(json.dumps(_finite(record), allow_nan=False) + "\n")
        self._log.flush()
        if self._board is not None:
            self._board.update(record)

    def samples(self, update: int, prompts: list[str], completions: list[str], s: Scores) -> None:
        """Append the first completions of an update, each with its reward or its fault."""
        for i, (prompt, text) in enumerate(zip(prompts[:SAMPLES], completions, strict=False)):
            verdict = {"fault": s.faults[i]} if i in s.faults else {"reward": s.values[i]}
            sample = {"update": update, "prompt": prompt, "completion": text} | verdict
            self._samples.write(json.dumps(sample) + "\n")
        self._samples.flush()

    def rewind(self, updates: int) -> bool:
        """Cut log and samples back to `updates` updates; whether the log has them all."""
        cut_back(self.folder / "samples.jsonl", updates)
        lines = cut_back(self.folder / "log.jsonl", updates)
        self.history = History(lines)
        if self._board is not None:
            self._board.close()
            self._board = Board(self.folder / "tensorboard", updates)
        return [r["update"] for r in lines] == list(range(updates))

    def sync(self) -> None:
        """Have log and samples on the disk, so that no checkpoint is ahead of them."""
        for file in (self._log, self._samples):
            os.fsync(file.fileno())

    def close(self) -> Path | None:
        """Close the files and draw the reward curve; returns its path if there is any update."""
        self._log.close()
        self._samples.close()
        if self._board is not None:
            self._board.close()
        if not self.history:
            return None
        path = self.folder / "reward.png"
        plot(self.history, path)
        return path


class Muted(Recorder):
    """Keeps the history of a rank that writes nothing, since the first rank writes it."""

    def __init__(self) -> None:
        self.history = History()

    def update(self, record: Record) -> None:
        """Keep one finished update."""
        self.history.append(record)

    def samples(self, update: int, prompts: list[str], completions: list[str], s: Scores) -> None:
        """Nothing: these are the first rank's."""

    def close(self) -> Path | None:
        """Nothing to close or to draw."""
        return None

    def rewind(self, updates: int) -> bool:
        """Nothing to cut back."""
        return True

    def sync(self) -> None:
        """Nothing to write."""


def cut_back(path: Path, updates: int) -> list[Record]:
    """Truncate a file of JSON lines before the first torn or later one; returns what is left."""
    kept, size = [], 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except ValueError:  # what a power cut left
            break
        if not line.endswith(b"\n") or entry["update"] >= updates:
            break
        kept.append(entry)
        size += len(line)
    os.truncate(path, size)
    return kept


def fifths(rewards: list[float]) -> tuple[float, float]:
    """Mean reward of the first and of the last fifth of the updates, skipped ones left out."""
    n = max(1, len(rewards) // 5)
    return mean(rewards[:n]), mean(rewards[-n:])


def plot(history: History, path: Path) -> None:
    """Reward and KL per sequence against updates."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True)
    updates, rewards = history.column("update"), history.column("reward").tolist()
    smooth = [mean(rewards[max(0, i - 4) : i + 1]) for i in range(len(rewards))]
    top.plot(updates, rewards, ".", alpha=0.5, label="mean of the batch")
    top.plot(updates, smooth, label="mean of the last five")
    top.set_ylabel("reward")
    top.legend(loc="lower right")
    bottom.plot(updates, history.column("kl"))
    bottom.set_ylabel("KL to the reference\n(nats per sequence)")
    bottom.set_xlabel("update")
    figure.savefig(path, dpi=120)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
