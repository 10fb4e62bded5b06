"""The names behind `--reward`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ppo_fast.loop.data.packages import TaskError, failing_as
from ppo_fast.loop.rewards import text
from ppo_fast.loop.rewards.calls import RewardFn
from ppo_fast.loop.values import shown

if TYPE_CHECKING:
    import torch

    from ppo_fast.loop.config import TrainConfig
    from ppo_fast.loop.tasks import Task

_Maker = Callable[["TrainConfig", "Task", "torch.device"], RewardFn]


def _frozen(name: str, *fields: str) -> _Maker:
    """A reward of `frozen.py`, imported when it is asked for: it loads transformers."""

    def make(config: TrainConfig, task: Task, device: torch.device) -> RewardFn:
        module = importlib.import_module("ppo_fast.loop.rewards.frozen")
        arguments = [getattr(task, field) for field in fields]
        made: RewardFn = getattr(module, name)(config.reward_model, device, *arguments)
        return made

    return make


def _gail(config: TrainConfig, task: Task, device: torch.device) -> RewardFn:
    from ppo_fast.loop.rewards.frozen import Encoder
    from ppo_fast.loop.rewards.gail import Discriminator

    return Discriminator(Encoder(config.reward_model, device), task.references, config.seed)


REWARDS: dict[str, _Maker] = {
    "task": lambda config, task, device: task.reward,
    "vader": lambda config, task, device: text.vader(),
    "letters": lambda config, task, device: text.letters,
    "rouge": lambda config, task, device: text.rouge(task.references),
    "chrf": lambda config, task, device: text.chrf(task.references),
    "likelihood": _frozen("likelihood"),
    "cross_entropy": _frozen("cross_entropy", "references"),
    "similarity": _frozen("similarity", "references"),
    "classifier": _frozen("classifier"),
    "gail": _gail,
}


def load_reward(config: TrainConfig, task: Task, device: Any) -> RewardFn:
    """The function that `config.reward` names: one of `REWARDS`, or "module:function"."""
    name = config.reward
    with failing_as(f"reward {name!r}"):
        return REWARDS[name](config, task, device) if name in REWARDS else _imported(name)


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
