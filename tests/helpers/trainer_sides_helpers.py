"""Sides of a comparison with other trainers, run in this process on the tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from loop_helpers import TEXTS

from benchmarks.loop import trainer_sides
from benchmarks.loop.equal_work import Update, Work, prepare
from ppo_fast.loop.data import packages


class EnoughError(Exception):
    """No more updates are wanted."""


class Taker:
    """An asker that wants `n` updates."""

    def __init__(self, n: int) -> None:
        self.left, self.taken = n, list[Update]()

    def wait(self) -> None:
        if not self.left:
            raise EnoughError
        self.left -= 1

    def take(self, update: Update) -> None:
        self.taken.append(update)


def prepared(folder: Path, prompts: int = 4) -> Path:
    """A folder that sides read: the tiny model, and the first of the loop's test prompts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packages, "movie_reviews", lambda: [f"{text} and so on" for text in TEXTS])
        prepare(folder, "tiny", [prompts])
    return folder


def updates(side: str, work: Work, folder: Path, n: int) -> list[Update]:
    """The first `n` updates of a side."""
    taker, threads = Taker(n), torch.get_num_threads()
    with pytest.raises(EnoughError):
        trainer_sides.run(side, work, folder, taker)
    torch.set_num_threads(threads)
    return taker.taken
