"""skrl: `compute_gae` of every on-policy PyTorch agent, whitened advantages included."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import ppo_fast
from ppo_fast.integrations._extract import Block
from ppo_fast.integrations._patch import Integration, Swap

# Each agent's module has a function of its own; in 1.4 it is inside the class's `_update`.
_AGENTS = {
    "agents.torch.a2c.a2c": "A2C",
    "agents.torch.a2c.a2c_rnn": "A2C_RNN",
    "agents.torch.amp.amp": "AMP",
    "agents.torch.ppo.ppo": "PPO",
    "agents.torch.ppo.ppo_rnn": "PPO_RNN",
    "agents.torch.rpo.rpo": "RPO",
    "agents.torch.rpo.rpo_rnn": "RPO_RNN",
    "agents.torch.trpo.trpo": "TRPO",
    "agents.torch.trpo.trpo_rnn": "TRPO_RNN",
    "multi_agents.torch.ippo.ippo": "IPPO",
    "multi_agents.torch.mappo.mappo": "MAPPO",
}


def _compute(
    rewards: Tensor, values: Tensor, ends: Tensor, following: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Returns and whitened advantages `(T, B, 1)` fp32.

    `following` is the value after the last step, `(B, 1)`, or the one after each, `(T, B, 1)`, 0
    where there is none: an end then cuts the recursion alone.
    """
    ended, after = ends.squeeze(-1), following.squeeze(-1)
    stepwise = following.dim() == rewards.dim()
    out = ppo_fast.gae(
        rewards.squeeze(-1),
        values.squeeze(-1),
        gamma=gamma,
        lam=lam,
        next_values=after if stepwise else None,
        bootstrap=None if stepwise else after,
        terminated=None if stepwise else ended,
        truncated=ended if stepwise else None,
        time_major=True,
    )
    advantages = ppo_fast.whiten(out.advantages, moments=out.moments, eps_at="std")
    return out.returns.unsqueeze(-1), advantages.unsqueeze(-1)


def compute_gae(
    *,
    rewards: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    values: Tensor,
    last_values: Tensor,
    discount_factor: float = 0.99,
    lambda_coefficient: float = 0.95,
    time_limit_bootstrap: bool = False,
) -> tuple[Tensor, Tensor]:
    """Of 2.1. With time limits γV' is in the rewards: what is truncated has ended."""
    ends = (terminated | truncated) if time_limit_bootstrap else terminated
    return _compute(rewards, values, ends, last_values, discount_factor, lambda_coefficient)


def compute_gae_terminated(
    *,
    rewards: Tensor,
    terminated: Tensor,
    values: Tensor,
    next_values: Tensor,
    discount_factor: float = 0.99,
    lambda_coefficient: float = 0.95,
) -> tuple[Tensor, Tensor]:
    """Of 2.0 and of the recurrent agents of 2.1; AMP in 2.0 has a next value for every step."""
    return _compute(rewards, values, terminated, next_values, discount_factor, lambda_coefficient)


def _statements(
    rewards: Tensor,
    dones: Tensor,
    values: Tensor,
    following: Tensor,
    discount_factor: float,
    lambda_coefficient: float,
) -> dict[str, Tensor]:
    returns, advantages = _compute(
        rewards, values, dones, following, discount_factor, lambda_coefficient
    )
    return {"returns": returns, "advantages": advantages}


def _nested(last_values: Tensor, **given: Any) -> dict[str, Tensor]:
    """Of 1.4, where `dones` are of both kinds."""
    return _statements(following=last_values, **given)


def _nested_stepwise(next_values: Tensor, **given: Any) -> dict[str, Tensor]:
    """Of AMP in 1.4."""
    return _statements(following=next_values, **given)


def _swaps(module: str, agent: str) -> tuple[Swap, ...]:
    place = f"skrl.{module}:compute_gae"
    return (
        Swap("gae", place, compute_gae),
        Swap("gae", place, compute_gae_terminated),
        Swap(
            "gae",
            f"skrl.{module}:{agent}._update",
            _nested_stepwise if agent == "AMP" else _nested,
            block=Block("advantage = 0", "advantages = (advantages"),
        ),
    )


integration = Integration(
    name="skrl",
    package="skrl",
    extra="skrl",
    swaps=tuple(_swaps(module, agent) for module, agent in _AGENTS.items()),
)
apply, revert, patched = integration.apply, integration.revert, integration.patched
