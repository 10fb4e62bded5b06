"""Calls of a reward function, and checks of the values that it returns."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Set, Sized
from itertools import islice
from typing import NamedTuple, TypeGuard

import numpy as np

from ppo_fast.loop.rewards.settings import settings_kept
from ppo_fast.loop.values import shown

RewardFn = Callable[[list[str], list[str]], list[float]]


class RewardError(ValueError):
    """A reward function from whose answers nothing can be learnt."""


class RewardLengthError(RewardError):
    """The reward function returned no list that has one entry for each sample."""


class Raised(NamedTuple):
    """An exception of the reward function in the place of a value."""

    error: BaseException


def ask(
    reward: RewardFn, prompts: list[str], completions: list[str]
) -> tuple[list[object], BaseException | None]:
    """Each sample's value or `Raised`, and what the call for all of them raised.

    Where that one raises anything but KeyboardInterrupt, each sample is asked for alone.
    """
    try:
        return _call(reward, prompts, completions), None
    except (RewardLengthError, KeyboardInterrupt):
        raise
    except BaseException as error:  # sys.exit and the like included: it costs samples, not the run
        alone = [_call_one(reward, p, c) for p, c in zip(prompts, completions, strict=True)]
        return alone, error


def as_number(value: object) -> float | None:
    """`value` as a float, None where it is none.

    A number is what `float` takes, and an array of one element; never a complex number.
    """
    try:
        if isinstance(value, np.ndarray) and value.size == 1:
            value = value.reshape(())  # else it depends on NumPy's version
        dtype = getattr(value, "dtype", None)
        if getattr(dtype, "kind", "") == "c" or getattr(dtype, "is_complex", False):
            return None  # `float` would leave out the imaginary part
        return float(value)  # type: ignore[arg-type]
    except KeyboardInterrupt:
        raise
    except BaseException:  # whatever the value's own code raises, it is no number
        return None


def _call(reward: RewardFn, prompts: list[str], completions: list[str]) -> list[object]:
    n = len(prompts)
    with settings_kept():
        rewards = reward(list(prompts), list(completions))
        out = list(islice(_rows(rewards, n), n + 1))
    if len(out) == n:
        return out
    got = len(rewards) if isinstance(rewards, Sized) else "more" if len(out) > n else len(out)
    raise RewardLengthError(f"reward must return {n} numbers, got {got}")


def _call_one(reward: RewardFn, prompt: str, completion: str) -> object:
    try:
        return _call(reward, [prompt], [completion])[0]
    except (RewardLengthError, KeyboardInterrupt):
        raise
    except BaseException as error:
        return Raised(error)


def _rows(rewards: object, n: int) -> Iterable[object]:
    """The entries of `rewards` in the samples' order; RewardLengthError for a type without one."""
    got = shown(rewards)
    if inspect.iscoroutine(rewards):
        rewards.close()  # else Python warns that nobody awaited it
        got = "a coroutine: an async function must be run by a plain one (asyncio.run)"
    elif isinstance(rewards, (str, bytes, bytearray, Mapping, Set)) or _is_table(rewards):
        got = f"a {type(rewards).__name__}, which is no list of numbers: {got}"
    elif _is_iterable(rewards):
        return rewards
    raise RewardLengthError(f"reward must return {n} numbers, got {got}")


def _is_iterable(rewards: object) -> TypeGuard[Iterable[object]]:
    try:
        iter(rewards)  # type: ignore[call-overload]
    except TypeError:
        return False
    return True


def _is_table(rewards: object) -> bool:
    """True for a data frame, whose iteration gives the columns' names."""
    return hasattr(rewards, "columns")
