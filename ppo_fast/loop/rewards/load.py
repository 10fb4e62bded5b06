"""Rewards by name, as `--reward` takes them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch

from ppo_fast.loop.config import TrainConfig
from ppo_fast.loop.data.packages import References, TaskError, failing_as
from ppo_fast.loop.rewards import text
from ppo_fast.loop.rewards.calls import RewardFn
from ppo_fast.loop.values import shown


class Source(NamedTuple):
    """Options, device, and a task's own reward and reference texts, of which rewards are made."""

    config: TrainConfig
    own: RewardFn
    references: References
    device: torch.device


_Maker = Callable[[Source], RewardFn]


def _frozen(name: str, with_references: bool = False) -> _Maker:
    """A reward of `frozen.py`, imported when it is asked for: it loads transformers."""

    def make(source: Source) -> RewardFn:
        module = importlib.import_module("ppo_fast.loop.rewards.frozen")
        references = [source.references] if with_references else []
        made: RewardFn = getattr(module, name)(
            source.config.reward_model, source.device, *references
        )
        return made

    return make


def _gail(source: Source) -> RewardFn:
    from ppo_fast.loop.rewards.frozen import Encoder
    from ppo_fast.loop.rewards.gail import Discriminator

    encoder = Encoder(source.config.reward_model, source.device)
    return Discriminator(encoder, source.references, source.config.seed)


REWARDS: dict[str, _Maker] = {
    "task": lambda source: source.own,
    "vader": lambda source: text.vader(),
    "letters": lambda source: text.letters,
    "rouge": lambda source: text.rouge(source.references),
    "chrf": lambda source: text.chrf(source.references),
    "likelihood": _frozen("likelihood"),
    "cross_entropy": _frozen("cross_entropy", with_references=True),
    "similarity": _frozen("similarity", with_references=True),
    "classifier": _frozen("classifier"),
    "gail": _gail,
}


def load_reward(
    config: TrainConfig, own: RewardFn, references: References, device: torch.device
) -> RewardFn:
    """The function that `config.reward` names: one of `REWARDS`, or "module:function".

    `own` is the task's reward, `references` has a text for each prompt.
    """
    name = config.reward
    with failing_as(f"reward {name!r}"):
        return (
            REWARDS[name](Source(config, own, references, device))
            if name in REWARDS
            else _imported(name)
        )


def _imported(name: str) -> RewardFn:
    module, _, function = name.partition(":")
    if not module or not function:
        raise TaskError(
            f'reward must be one of {", ".join(REWARDS)} or "module:function", got {name!r}'
        )
    found = importlib.import_module(module)
    if not hasattr(found, function):
        raise TaskError(f"reward {name!r}: module {module!r} has no function {function!r}")
    loaded: RewardFn = getattr(found, function)
    if not callable(loaded):
        raise TaskError(f"reward {name!r} must be a function, got {shown(loaded)}")
    return loaded
