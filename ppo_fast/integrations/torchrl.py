"""torchrl: generalised advantages, its loop and its vectorised form."""

from __future__ import annotations

import torch
from torch import Tensor

import ppo_fast
from ppo_fast.integrations._errors import Uncovered
from ppo_fast.integrations._patch import Integration, Swap


def estimate(
    gamma: float | Tensor,
    lmbda: float | Tensor,
    state_value: Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    *,
    time_dim: int = -2,
) -> tuple[Tensor, Tensor]:
    """Advantages and value targets `(*B, T, *F)` fp32, of torchrl's arguments of that shape.

    Raises Uncovered for a γ per step, gradients through the estimate, and mixtures of float64
    with narrower types.
    """
    terminated = done if terminated is None else terminated
    floats = (state_value, next_state_value, reward)
    if isinstance(gamma, Tensor) and gamma.numel() > 1:
        raise Uncovered("gamma is a tensor with a value for each step")
    if torch.is_grad_enabled() and any(x.requires_grad for x in floats):
        raise Uncovered("differentiable=True: gradients go through the advantages")
    if len({x.dtype == torch.float64 for x in floats}) > 1:
        raise Uncovered("float64 beside narrower types")
    if len({x.shape for x in (*floats, done, terminated)}) > 1:
        raise Uncovered("the shapes differ")
    last = state_value.movedim(time_dim, -1)

    def rows(x: Tensor) -> Tensor:
        """`(*B, T, *F)` as `(N, T)`; a view for one feature."""
        return x.movedim(time_dim, -1).reshape(-1, last.shape[-1])

    def back(x: Tensor) -> Tensor:
        return x.reshape(last.shape).movedim(-1, time_dim).to(next_state_value.dtype)

    lam = lmbda
    if isinstance(lam, Tensor):
        lam = rows(lam.expand_as(reward)) if lam.numel() > 1 else float(lam)
    # `done` cuts the recursion and `terminated` the next value, whichever of them is set.
    out = ppo_fast.gae(
        rows(reward),
        rows(state_value),
        gamma=float(gamma),
        lam=lam,
        next_values=rows(next_state_value.masked_fill(terminated, 0.0)),
        truncated=rows(done),
    )
    return back(out.advantages), back(out.returns)


_FUNCTIONS = "torchrl.objectives.value.functional:"
integration = Integration(
    name="torchrl",
    package="torchrl",
    extra="torchrl",
    swaps=(
        Swap("gae", f"{_FUNCTIONS}generalized_advantage_estimate", estimate),
        Swap("gae", f"{_FUNCTIONS}vec_generalized_advantage_estimate", estimate),
    ),
)
apply, revert, patched = integration.apply, integration.revert, integration.patched
