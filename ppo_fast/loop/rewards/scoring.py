"""Calling a reward function safely: a faulty sample is named and dropped, the rest goes on."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

RewardFn = Callable[[list[str], list[str]], list[float]]
# The last call that ran out of time, by the id of its reward: the thread keeps that object alive.
_late: dict[int, threading.Thread] = {}


class RewardLengthError(ValueError):
    """The reward function returned another number of rewards than it was given samples."""


@dataclass
class Scores:
    """One reward per sample, 0 for a dropped one, and why each dropped one was dropped."""

    values: list[float]
    faults: dict[int, str] = field(default_factory=dict)

    @property
    def kept(self) -> list[bool]:
        """Which samples have a reward."""
        return [i not in self.faults for i in range(len(self.values))]

    @property
    def mean(self) -> float:
        """Mean reward of the kept samples, NaN without any."""
        kept = [v for i, v in enumerate(self.values) if i not in self.faults]
        return sum(kept) / len(kept) if kept else math.nan


def score(
    reward: RewardFn, prompts: list[str], completions: list[str], timeout: float | None = None
) -> Scores:
    """Reward every completion; drop those without a finite number.

    One call for the batch. Where that call raises, each sample is called alone, so that only
    those that raise are lost. A list of the wrong length raises `RewardLengthError`, because then
    no reward can be assigned to its sample. All of it together may take `timeout` seconds; after
    that the whole batch is dropped. The call itself cannot be stopped: it goes on in a thread that
    does not keep the process alive. A reward may have state, so no call begins beside a late one:
    the next batch waits for that to end, in its own `timeout` seconds, or is dropped too.
    """
    if timeout is None:
        return _score(reward, prompts, completions)
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
            ended.append(_score(reward, prompts, completions))
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


def shaped(scores: Scores, ended: list[bool], clip: float | None, eos_penalty: float) -> Scores:
    """The same scores, clipped to ±`clip`, minus `eos_penalty` for each completion without EOS.

    `ended[i]` says whether completion i reached its EOS. Dropped samples stay as they are.
    """
    bound = math.inf if clip is None else clip
    values = [
        max(-bound, min(bound, v)) - (0.0 if end else eos_penalty) if kept else v
        for v, end, kept in zip(scores.values, ended, scores.kept, strict=True)
    ]
    return Scores(values, scores.faults)


def _dropped(n: int, reason: str) -> Scores:
    return Scores([0.0] * n, dict.fromkeys(range(n), reason))


def _score(reward: RewardFn, prompts: list[str], completions: list[str]) -> Scores:
    try:
        raw: list[object] = _call(reward, prompts, completions)
    except RewardLengthError:
        raise
    except Exception:  # the call below meets it again, and keeps it as the sample's fault
        raw = [_call_one(reward, p, c) for p, c in zip(prompts, completions, strict=True)]
    scores = Scores([0.0] * len(raw))
    for i, value in enumerate(raw):
        if isinstance(value, Exception):
            scores.faults[i] = f"reward raised {type(value).__name__}: {value}"
        elif (number := _number(value)) is None:
            scores.faults[i] = f"reward returned {value!r}"
        else:
            scores.values[i] = number
    return scores


def _call(reward: RewardFn, prompts: list[str], completions: list[str]) -> list[object]:
    rewards = reward(prompts, completions)
    try:
        out: list[object] = list(rewards)
    except TypeError:
        raise RewardLengthError(
            f"reward must return {len(prompts)} numbers, got {rewards!r}"
        ) from None
    if len(out) != len(prompts):
        raise RewardLengthError(f"reward must return {len(prompts)} numbers, got {len(out)}")
    return out


def _call_one(reward: RewardFn, prompt: str, completion: str) -> object:
    try:
        return _call(reward, [prompt], [completion])[0]
    except RewardLengthError:
        raise
    except Exception as error:
        return error


def _number(value: object) -> float | None:
    """`value` as a finite float, None where it is none."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
