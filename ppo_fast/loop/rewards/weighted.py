"""Weighted sum of several rewards."""

from __future__ import annotations

import math
from inspect import Parameter, Signature
from typing import Any

from ppo_fast.loop.rewards.calls import RewardFn, as_number, checked, taken, wanted


class Sum(float):
    """A weighted sum that knows its `parts`, the rewards before they were weighted."""

    parts: tuple[float, ...]


class WeightedSum:
    """Sum of weight · reward; NaN, which drops a sample, where one of them gives no number.

    Each is called with the columns that it takes; `names` are theirs, each once.
    """

    def __init__(
        self, rewards: list[RewardFn], weights: list[float], names: list[str] | None = None
    ) -> None:
        self.rewards, self.weights = rewards, weights
        names = names or [getattr(reward, "__name__", type(reward).__name__) for reward in rewards]
        self.names = [n if names.count(n) == 1 else f"{n} {i}" for i, n in enumerate(names, 1)]
        self.__signature__ = _signature(rewards)

    def __call__(
        self, prompts: list[Any], completions: list[str], **columns: list[Any]
    ) -> list[float]:
        parts = []
        for reward in self.rewards:
            own = {name: list(columns[name]) for name in taken(reward, columns)}
            values = checked(reward(list(prompts), list(completions), **own), len(prompts))
            numbers = [as_number(value) for value in values]
            parts.append([math.nan if number is None else number for number in numbers])
        totals: list[float] = []
        for row in zip(*parts, strict=True):
            weighted = (w * value for w, value in zip(self.weights, row, strict=True))
            total = Sum(sum(weighted))
            total.parts = row
            totals.append(total)
        return totals

    def state_dict(self) -> dict[str, Any]:
        """The states of the rewards that have one, flat: the number of a reward before each."""
        return {
            f"{i}.{key}": value
            for i, reward in enumerate(self.rewards)
            if hasattr(reward, "state_dict")
            for key, value in reward.state_dict().items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        for i, reward in enumerate(self.rewards):
            if hasattr(reward, "load_state_dict"):
                start = f"{i}."
                own = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
                reward.load_state_dict(own)


def _signature(rewards: list[RewardFn]) -> Signature:
    """Arguments of all the rewards together, by which their columns are looked up."""
    each = [wanted(reward) for reward in rewards]
    required = {name for one in each for name in one.required}
    parameters = [Parameter(n, Parameter.POSITIONAL_ONLY) for n in ("prompts", "completions")]
    for name in dict.fromkeys(name for one in each for name in one.named):
        default = Parameter.empty if name in required else None
        parameters.append(Parameter(name, Parameter.KEYWORD_ONLY, default=default))
    if any(one.any for one in each):
        parameters.append(Parameter("columns", Parameter.VAR_KEYWORD))
    return Signature(parameters)
