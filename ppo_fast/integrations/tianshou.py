"""tianshou: the recursion of `compute_episodic_return`, on NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

import ppo_fast
from ppo_fast.integrations._extract import Block
from ppo_fast.integrations._patch import Integration, Swap

Array = np.ndarray[Any, Any]


def _advantages(
    v_s: Array, v_s_: Array, rew: Array, end_flag: Array, gamma: float, gae_lambda: float
) -> dict[str, Array]:
    """Advantages and returns `(N,)` in fp64, as tianshou's; its v_s_ is 0 where terminated.

    An episode ends where `end_flag` is set, so each is a packed sequence of its own.
    """
    starts = np.flatnonzero(np.append(True, end_flag[:-1]))
    offsets = np.append(starts, len(rew))
    rewards, values, after = (
        torch.from_numpy(np.ascontiguousarray(x, np.float64)) for x in (rew, v_s, v_s_)
    )
    advantages = ppo_fast.gae(
        rewards,
        values,
        next_values=after,
        gamma=gamma,
        lam=gae_lambda,
        cu_seqlens=torch.from_numpy(offsets),
    ).advantages.numpy()
    return {"advantage": advantages, "returns": advantages + v_s}


def _view(_: dict[str, Any], result: dict[str, Array]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(x) for name, x in result.items()}


def _swap(holder: str, recursion: str) -> Swap:
    """Of the statements around the recursion, which every algorithm calls to have it compiled."""
    block = Block(f"advantage = {recursion}(", "returns = advantage + v_s")
    return Swap("gae", f"{holder}.compute_episodic_return", _advantages, block=block, view=_view)


integration = Integration(
    name="tianshou",
    package="tianshou",
    extra="tianshou",
    swaps=(
        (
            _swap("tianshou.algorithm.algorithm_base:Algorithm", "_gae"),
            _swap("tianshou.policy.base:BasePolicy", "_gae_return"),  # 1.2
        ),
    ),
)
apply, revert, patched = integration.apply, integration.revert, integration.patched
