"""Rewards by name, as `--reward` takes them."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch

from ppo_fast.loop.config import TrainConfig
from ppo_fast.loop.data.packages import TaskError, failing_as
from ppo_fast.loop.rewards import text
from ppo_fast.loop.rewards.answer import answer
from ppo_fast.loop.rewards.calls import RewardFn
from ppo_fast.loop.rewards.http import HttpReward
from ppo_fast.loop.rewards.weighted import WeightedSum
from ppo_fast.loop.values import shown


class Source(NamedTuple):
    """Options, device, and a task's own reward, of which rewards are made."""

    config: TrainConfig
    own: RewardFn | None
    device: torch.device


_Maker = Callable[[Source], RewardFn]


def _frozen(name: str) -> _Maker:
    """A reward of `frozen.py`, imported when it is asked for: it loads transformers."""

    def make(source: Source) -> RewardFn:
        module = importlib.import_module("ppo_fast.loop.rewards.frozen")
        made: RewardFn = getattr(module, name)(source.config.reward_model, source.device)
        return made

    return make


def _gail(source: Source) -> RewardFn:
    from ppo_fast.loop.rewards.frozen import Encoder
    from ppo_fast.loop.rewards.gail import Discriminator

    encoder = Encoder(source.config.reward_model, source.device)
    return Discriminator(encoder, source.config.seed)


def _own(source: Source) -> RewardFn:
    if source.own is None:
        raise TaskError("reward 'task' is that of a task, and data has none: name another one")
    return source.own


REWARDS: dict[str, _Maker] = {
    "task": _own,
    "vader": lambda source: text.vader(),
    "letters": lambda source: text.letters,
    "rouge": lambda source: text.rouge(),
    "chrf": lambda source: text.chrf(),
    "likelihood": _frozen("likelihood"),
    "cross_entropy": _frozen("cross_entropy"),
    "similarity": _frozen("similarity"),
    "classifier": _frozen("classifier"),
    "gail": _gail,
    "answer": lambda source: answer,
}


def load_reward(config: TrainConfig, own: RewardFn | None, device: torch.device) -> RewardFn:
    """The function that `config.reward` names, or the weighted sum of several.

    A name is one of `REWARDS`, "module:function", or an address of HTTP; `own` is the task's.
    """
    source = Source(config, own, device)
    found = []
    for name in config.reward.split(","):
        with failing_as(f"reward {name!r}"):
            found.append(_load(name, source))
    weights = config.weights()
    return found[0] if weights == [1.0] else WeightedSum(found, weights, config.reward.split(","))


def _load(name: str, source: Source) -> RewardFn:
    if name in REWARDS:
        return REWARDS[name](source)
    if name.startswith(("http://", "https://")):
        return HttpReward(name, source.config.http_timeout, source.config.http_retries)
    module, _, function = name.partition(":")
    if not module or not function:
        raise TaskError(
            f'reward must be one of {", ".join(REWARDS)}, "module:function" or "http://...",'
            f" got {name!r}"
        )
    return _imported(name, module, function)


def _imported(name: str, module: str, function: str) -> RewardFn:
    folder = os.getcwd()
    if folder not in sys.path and "" not in sys.path:  # the command begins with its own folder
        sys.path.insert(0, folder)
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise ModuleNotFoundError(f"reward {name!r}: {error}, in {folder} neither") from None
    if not hasattr(found, function):
        raise TaskError(f"reward {name!r}: module {module!r} has no function {function!r}")
    loaded: RewardFn = getattr(found, function)
    if not callable(loaded):
        raise TaskError(f"reward {name!r} must be a function, got {shown(loaded)}")
    return loaded
