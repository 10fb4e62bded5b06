"""Scores of a batch: a sample with a faulty reward is named and dropped, the rest stays."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
import traceback
from typing import Any

from ppo_fast.loop.config import TrainConfig
from ppo_fast.loop.data.prompts import Columns
from ppo_fast.loop.data.sequences import Scores
from ppo_fast.loop.rewards.calls import Raised, RewardFn, as_number, ask
from ppo_fast.loop.rewards.settings import settings_kept
from ppo_fast.loop.rewards.weighted import Sum, WeightedSum
from ppo_fast.loop.values import described, is_fp32, shown

_SHOWN = 120  # characters of a value that is no reward
# The last call that ran out of time, by the id of its reward: the thread keeps that object alive.
_late: dict[int, threading.Thread] = {}


def score(
    reward: RewardFn,
    prompts: list[Any],
    completions: list[str],
    timeout: float | None = None,
    columns: Columns | None = None,
) -> Scores:
    """Reward every completion; drop those without a number that is finite in fp32.

    One call for the batch, with those of its `columns` that the function takes. Where that call
    raises, each sample is called alone, so that only those that raise are lost. A list of the
    wrong length raises `RewardLengthError`, because then no reward can be assigned to its sample.
    All of it together may take `timeout` seconds; after that the whole batch is dropped. The call
    itself cannot be stopped: it goes on in a thread that does not keep the process alive. A reward
    may have state, so no call begins beside a late one: the next batch waits for that to end, in
    its own `timeout` seconds, or is dropped too.

    The reward gets lists of its own, and settings of the process that it changes are put back.
    """
    if timeout is None:
        return _score(reward, prompts, completions, columns)
    with settings_kept():  # those that a late call changed
        return _in_time(reward, prompts, completions, timeout, columns)


def _in_time(
    reward: RewardFn,
    prompts: list[Any],
    completions: list[str],
    timeout: float,
    columns: Columns | None,
) -> Scores:
    start = time.monotonic()
    late = _late.pop(id(reward), None)
    if late is not None:
        late.join(timeout)
        if late.is_alive():
            _late[id(reward)] = late
            return _dropped(
                len(prompts), f"reward still ran for an earlier batch {timeout:g} s on"
            )
    ended: list[Scores | BaseException] = []

    def work() -> None:
        try:
            ended.append(_score(reward, prompts, completions, columns))
        except BaseException as error:  # raised again below, where the caller can see it
            ended.append(error)

    thread = threading.Thread(target=work, name="reward", daemon=True)
    thread.start()
    thread.join(max(0.0, start + timeout - time.monotonic()))
    if not ended:
        _late[id(reward)] = thread
        return _dropped(len(prompts), f"reward took longer than {timeout:g} s")
    if isinstance(ended[0], BaseException):
        raise ended[0]
    return ended[0]


def shaped(scores: Scores, config: TrainConfig, ended: list[bool], lengths: list[int]) -> Scores:
    """The same scores, clipped to ±`score_clip`, less the penalties of the options.

    `missing_eos_penalty` is taken off each completion i without `ended[i]`. `overlong_penalty` is
    taken off one of `max_new_tokens` tokens, and evenly less off shorter ones until none is off
    those that leave `overlong_buffer` tokens unused. Dropped samples stay as they are, and one
    that then has no number of fp32 is dropped too.
    """
    bound = math.inf if config.score_clip is None else config.score_clip
    buffer = config.overlong_buffer
    out = dataclasses.replace(scores, values=list(scores.values), faults=dict(scores.faults))
    for i, (value, end, n) in enumerate(zip(scores.values, ended, lengths, strict=True)):
        if i in scores.faults:
            continue
        number = max(-bound, min(bound, value)) - (0.0 if end else config.missing_eos_penalty)
        if buffer and (over := n - (config.max_new_tokens - buffer)) > 0:
            number -= config.overlong_penalty * over / buffer
        if is_fp32(number):
            out.values[i] = number
        else:
            out.values[i] = 0.0
            out.faults[i] = f"reward {value:g} became {number:g} by clip and penalties"
    return out


def rewarded(
    reward: RewardFn,
    config: TrainConfig,
    prompts: list[Any],
    completions: list[str],
    ended: list[bool],
    lengths: list[int],
    columns: Columns | None = None,
) -> Scores:
    """`score` and then `shaped`, as a run's options ask."""
    raw = score(reward, prompts, completions, config.reward_timeout, columns)
    return shaped(raw, config, ended, lengths)


def _dropped(n: int, reason: str) -> Scores:
    return Scores([0.0] * n, dict.fromkeys(range(n), reason), late=True)


def _score(
    reward: RewardFn, prompts: list[Any], completions: list[str], columns: Columns | None
) -> Scores:
    raw, error = ask(reward, prompts, completions, columns)
    scores = Scores([0.0] * len(raw))
    errors = [] if error is None else [error]
    for i, value in enumerate(raw):
        if isinstance(value, Raised):
            scores.faults[i] = f"reward raised {described(value.error)}"
            errors.append(value.error)
        elif (number := as_number(value)) is not None and is_fp32(number):
            scores.values[i] = number
        else:
            wide = number is not None and math.isfinite(number)
            scores.faults[i] = (
                f"reward returned {shown(value, _SHOWN)}{', infinite in fp32' if wide else ''}"
            )
    if isinstance(reward, WeightedSum):
        lost = (math.nan,) * len(reward.names)
        rows = zip(*(v.parts if isinstance(v, Sum) else lost for v in raw), strict=True)
        scores.parts = {name: list(row) for name, row in zip(reward.names, rows, strict=False)}
    scores.errors = list({place(error): error for error in reversed(errors)}.values())[::-1]
    return scores


def place(error: BaseException) -> tuple[str, str, int]:
    """Type of an exception, and the file and line that raised it."""
    last = traceback.extract_tb(error.__traceback__, limit=-1)
    return type(error).__name__, last[0].filename, last[0].lineno or 0
