"""Calling a reward function safely: a faulty sample is named and dropped, the rest goes on."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field

RewardFn = Callable[[list[str], list[str]], list[float]]


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


def score(reward: RewardFn, prompts: list[str], completions: list[str]) -> Scores:
    """Reward every completion; drop those without a finite number.

    One call for the batch. Where that call raises, each sample is called alone, so that only
    those that raise are lost. A list of the wrong length raises `RewardLengthError`, because then
    no reward can be assigned to its sample.
    """
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


def vader() -> RewardFn:
    """VADER's compound sentiment of the completion alone, in [-1, 1] (Hutto and Gilbert 2014)."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()

    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        return [float(analyzer.polarity_scores(text)["compound"]) for text in completions]

    return reward


def letters(prompts: list[str], completions: list[str]) -> list[float]:
    """The share of ASCII letters in the completion, in [0, 1]: what a tiny model can learn."""
    return [sum(c.isascii() and c.isalpha() for c in t) / max(1, len(t)) for t in completions]


def load_reward(name: str) -> RewardFn:
    """The function behind `--reward`: "vader", "letters" or "module:function"."""
    if name in ("vader", "letters"):
        return vader() if name == "vader" else letters
    module, _, function = name.partition(":")
    if not function:
        raise ValueError(f'reward must be "vader", "letters" or "module:function", got {name!r}')
    loaded: RewardFn = getattr(importlib.import_module(module), function)
    return loaded
