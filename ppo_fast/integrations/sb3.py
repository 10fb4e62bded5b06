"""Stable-Baselines3: the rollout buffer's advantages and returns.

`PPO(..., rollout_buffer_class=FastRolloutBuffer)` is Stable-Baselines3's own hook, for one model
(`FastDictRolloutBuffer` for dict observations). `apply()` is for what makes its buffer by itself.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ppo_fast
from ppo_fast.integrations._first_call import first_call
from ppo_fast.integrations._patch import Integration, Swap

Array = np.ndarray[Any, Any]
_BUFFERS = "stable_baselines3.common.buffers"


def compute_returns_and_advantage(self: Any, last_values: Tensor, dones: Array) -> None:
    """Set the buffer's `advantages` and `returns`, `(T, B)` fp32.

    `episode_starts[t]` says that an episode starts *at* step t, so that step t − 1 was the last
    of the one before; the flags are shifted by one step, and `dones` `(B,)` says it of the last.
    """
    ends = np.concatenate([self.episode_starts[1:], dones[None].astype(np.float32)])
    rewards, values, terminated = map(torch.from_numpy, (self.rewards, self.values, ends))
    out = ppo_fast.gae(
        rewards,
        values,
        bootstrap=last_values.detach().cpu().flatten().float(),
        terminated=terminated,
        gamma=self.gamma,
        lam=self.gae_lambda,
        time_major=True,
    )
    self.advantages, self.returns = out.advantages.numpy(), out.returns.numpy()


def _view(arguments: dict[str, Any], _: None) -> dict[str, Tensor]:
    buffer = arguments["self"]
    return {"advantages": torch.tensor(buffer.advantages), "returns": torch.tensor(buffer.returns)}


integration = Integration(
    name="sb3",
    package="stable_baselines3",
    extra="sb3",
    swaps=(
        Swap(
            "gae",
            f"{_BUFFERS}:RolloutBuffer.compute_returns_and_advantage",
            compute_returns_and_advantage,
            view=_view,
        ),
    ),
)
apply, revert, patched = integration.apply, integration.revert, integration.patched


def __getattr__(name: str) -> Any:
    """The buffers that need Stable-Baselines3 to be there at all."""
    if name not in ("FastRolloutBuffer", "FastDictRolloutBuffer"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _fast(name.removeprefix("Fast"))


@functools.cache
def _fast(name: str) -> type:
    """A rollout buffer with these advantages; its first ones are compared with its base's."""
    integration.recognised()
    base = getattr(importlib.import_module(_BUFFERS), name)
    method = "compute_returns_and_advantage"
    theirs = inspect.unwrap(getattr(base, method))

    def compute(self: Any, last_values: Tensor, dones: Array) -> None:
        if not self.compared:
            arguments = {"self": self, "last_values": last_values, "dones": dones}
            ours = compute_returns_and_advantage
            first_call(f"Fast{name}", lambda a: theirs(**a), lambda a: ours(**a), arguments, _view)
            self.compared = True
        compute_returns_and_advantage(self, last_values, dones)

    # By this module's name: Stable-Baselines3 pickles the class with the model.
    members = {
        "compared": False,
        method: compute,
        "__module__": __name__,
        "__doc__": _fast.__doc__,
    }
    return type(f"Fast{name}", (base,), members)
