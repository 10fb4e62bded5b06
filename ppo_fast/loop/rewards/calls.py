"""Calls of a reward function, and checks of the values that it returns."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Set, Sized
from itertools import islice
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from ppo_fast.loop.config import OptionError
from ppo_fast.loop.rewards.settings import settings_kept
from ppo_fast.loop.values import shown

RewardFn = Callable[..., list[float]]
"""fn(prompts, completions, **columns): of the data's columns it gets those its signature takes."""


class RewardError(ValueError):
    """A reward function from whose answers nothing can be learnt."""


class RewardSignatureError(RewardError, OptionError):
    """A reward function that takes what the data does not have."""


class RewardLengthError(RewardError):
    """The reward function returned no list that has one entry for each sample."""


class NoAnswerError(ConnectionError):
    """A server gave no rewards for a batch, nor would it for each sample alone."""


class Raised(NamedTuple):
    """An exception of the reward function in the place of a value."""

    error: BaseException


class Wanted(NamedTuple):
    """The first two arguments of a signature, the columns that it names, and whether it takes any.

    `required` are those of the named ones that have no default.
    """

    first: list[str]
    named: list[str]
    required: list[str]
    any: bool


def wanted(reward: RewardFn) -> Wanted:
    """The columns that a reward function takes after prompts and completions, its first two."""
    try:
        parameters = list(inspect.signature(reward).parameters.values())
    except (TypeError, ValueError):  # compiled code that says nothing of its arguments
        return Wanted([], [], [], any=False)
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = [p for p in parameters[2:] if p.kind in kinds]
    return Wanted(
        [p.name for p in parameters[:2]],
        [p.name for p in named],
        [p.name for p in named if p.default is p.empty],
        any(p.kind is p.VAR_KEYWORD for p in parameters),
    )


def taken(reward: RewardFn, names: Iterable[str]) -> list[str]:
    """The columns that a reward function gets, of those with `names`.

    Raises RewardSignatureError where it needs one that is not there, and where its first two
    arguments, which are given by their place, have the names of others.
    """
    names, of = list(names), wanted(reward)
    for i, name in enumerate(of.first):
        own = ("prompts", "completions")[i]
        if name != own and (name in ("prompts", "completions") or name in names):
            raise RewardSignatureError(
                f"reward {_name(reward)} must take prompts and completions as its first two"
                f" arguments, got {', '.join(of.first)}"
            )
    missing = [name for name in of.required if name not in names]
    if missing:
        raise RewardSignatureError(
            f"reward {_name(reward)} takes {', '.join(missing)}, which must be columns of the"
            f" data; there are {', '.join(names) or 'none'}"
        )
    return [n for n in names if n in of.named or (of.any and n not in of.first)]


def learns(reward: object) -> bool:
    """True for a reward with a state, which its calls change."""
    return bool(reward.state_dict()) if hasattr(reward, "state_dict") else False


def _name(reward: object) -> str:
    return getattr(reward, "__name__", type(reward).__name__)


def ask(
    reward: RewardFn,
    prompts: list[Any],
    completions: list[str],
    columns: Mapping[str, list[Any]] | None = None,
) -> tuple[list[object], BaseException | None]:
    """Each sample's value or `Raised`, and what the call for all of them raised.

    Where that one raises anything but KeyboardInterrupt or NoAnswerError, each sample is asked for
    alone.
    """
    given = columns or {}
    given = {name: given[name] for name in taken(reward, given)}
    try:
        return _call(reward, prompts, completions, given), None
    except (RewardLengthError, KeyboardInterrupt):
        raise
    except NoAnswerError as error:
        return [Raised(error)] * len(prompts), error
    except BaseException as error:  # sys.exit and the like included: it costs samples, not the run
        alone = []
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            own = {name: values[i : i + 1] for name, values in given.items()}
            alone.append(_call_one(reward, prompt, completion, own))
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


def _call(
    reward: RewardFn, prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]
) -> list[object]:
    with settings_kept():
        own = {name: list(values) for name, values in columns.items()}
        return checked(reward(list(prompts), list(completions), **own), len(prompts))


def checked(rewards: Any, n: int) -> list[object]:
    """The `n` entries that a reward function returned; RewardLengthError for another number."""
    out = list(islice(_rows(rewards, n), n + 1))
    if len(out) == n:
        return out
    got = len(rewards) if isinstance(rewards, Sized) else "more" if len(out) > n else len(out)
    raise RewardLengthError(f"reward must return {n} numbers, got {got}")


def _call_one(
    reward: RewardFn, prompt: Any, completion: str, columns: dict[str, list[Any]]
) -> object:
    try:
        return _call(reward, [prompt], [completion], columns)[0]
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
