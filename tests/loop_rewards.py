"""Rewards that fail, by the name `loop_rewards:function`: all but `absent` at the third call."""

from __future__ import annotations

import os
import signal
import time

from ppo_fast.loop.rewards import letters

calls: list[int] = []


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
