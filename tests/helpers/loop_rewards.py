"""Rewards that fail, by the name `loop_rewards:function`: all but `absent` at the third call."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import transformers

from ppo_fast.loop.rewards import letters

calls: list[int] = []
# Where each rank that imports this leaves the number of its process, for `killing`.
if folder := os.environ.get("RANKS_FOLDER"):
    Path(folder, os.environ["RANK"]).write_text(str(os.getpid()))


def _third() -> bool:
    calls.append(1)
    return len(calls) == 3


def dying(prompts: list[str], texts: list[str]) -> list[float]:
    if _third():
        os.kill(os.getpid(), signal.SIGKILL)
    return letters(prompts, texts)


def short(prompts: list[str], texts: list[str]) -> list[float]:
    return letters(prompts, texts)[: 1 if _third() else None]


def hanging(prompts: list[str], texts: list[str]) -> list[float]:
    if _third():
        time.sleep(3600)
    return letters(prompts, texts)


def absent(prompts: list[str], texts: list[str]) -> list[float]:
    raise LookupError("nothing is known of any text")


def killing(prompts: list[str], texts: list[str]) -> list[float]:
    """Kills the other rank, and has the model take its time to be written."""
    if _third():
        save = transformers.PreTrainedModel.save_pretrained

        def slowly(*args: object, **kwargs: object) -> None:
            save(*args, **kwargs)
            time.sleep(3)

        transformers.PreTrainedModel.save_pretrained = slowly  # type: ignore[method-assign]
        os.kill(int(Path(os.environ["RANKS_FOLDER"], "1").read_text()), signal.SIGKILL)
    return letters(prompts, texts)


def waiting(prompts: list[str], texts: list[str]) -> list[float]:
    """Waits until whoever sees that it waits lets it go on."""
    if _third():
        Path(os.environ["RANKS_FOLDER"], "waits").touch()
        while not Path(os.environ["RANKS_FOLDER"], "goes-on").exists():
            time.sleep(0.1)
    return letters(prompts, texts)
