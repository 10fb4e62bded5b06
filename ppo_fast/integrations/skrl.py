"""skrl 2.1: `compute_gae` of every on-policy PyTorch agent, whitened advantages included."""

from __future__ import annotations

from torch import Tensor

import ppo_fast
from ppo_fast.integrations._patch import Integration, Swap

# Each agent's module has a function of its own.
_AGENTS = (
    "agents.torch.a2c.a2c",
    "agents.torch.amp.amp",
    "agents.torch.ppo.ppo",
    "agents.torch.rpo.rpo",
    "agents.torch.trpo.trpo",
    "multi_agents.torch.ippo.ippo",
    "multi_agents.torch.mappo.mappo",
)
_RECURRENT = (
    "agents.torch.a2c.a2c_rnn",
    "agents.torch.ppo.ppo_rnn",
    "agents.torch.rpo.rpo_rnn",
    "agents.torch.trpo.trpo_rnn",
)


def _compute(
    rewards: Tensor, values: Tensor, ends: Tensor, bootstrap: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Returns and whitened advantages `(T, B, 1)` fp32, `bootstrap` `(B, 1)`."""
    out = ppo_fast.gae(
        rewards.squeeze(-1),
        values.squeeze(-1),
        bootstrap=bootstrap.flatten(),
        terminated=ends.squeeze(-1),
        gamma=gamma,
        lam=lam,
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
    """Of the agents. With time limits γV' is in the rewards: what is truncated has ended."""
    ends = (terminated | truncated) if time_limit_bootstrap else terminated
    return _compute(rewards, values, ends, last_values, discount_factor, lambda_coefficient)


def compute_gae_recurrent(
    *,
    rewards: Tensor,
    terminated: Tensor,
    values: Tensor,
    next_values: Tensor,
    discount_factor: float = 0.99,
    lambda_coefficient: float = 0.95,
) -> tuple[Tensor, Tensor]:
    """Of the recurrent agents, which know no time limits."""
    return _compute(rewards, values, terminated, next_values, discount_factor, lambda_coefficient)


integration = Integration(
    name="skrl",
    package="skrl",
    extra="skrl",
    swaps=(
        *(Swap("gae", f"skrl.{agent}:compute_gae", compute_gae) for agent in _AGENTS),
        *(Swap("gae", f"skrl.{agent}:compute_gae", compute_gae_recurrent) for agent in _RECURRENT),
    ),
)
apply, revert, patched = integration.apply, integration.revert, integration.patched
