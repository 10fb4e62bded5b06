"""Agreement with PPO as OpenAI's Spinning Up writes it, in fp64, gradients included.

Its page "Proximal Policy Optimization" (spinningup.openai.com, algorithms/ppo) states PPO-Clip as
L = min(π/π_k · A, g(ε, A)) with g(ε, A) = (1 + ε)A for A ≥ 0 and (1 − ε)A otherwise, and the
critic's regression on rewards-to-go as a mean squared error. Advantages are GAE-λ: discounted sums
of TD residuals over each trajectory, closed by the value of the state where it was cut. Here each
is spelled out as written, a trajectory and a step at a time.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ppo_fast

# Sums of at most 60 terms in another order: 60 roundings of 2**-53 of the largest, and a margin
# of 10 for the condition of the terms themselves (exp, products), all of order 1.
FP64 = 600 * 2.0**-53
on_both = pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)


def g(epsilon: float, advantage: float) -> float:
    return (1 + epsilon) * advantage if advantage >= 0 else (1 - epsilon) * advantage


def objective(logp: Tensor, old: Tensor, advantages: Tensor, epsilon: float) -> Tensor:
    """The mean over a batch of Spinning Up's L; the larger, the better."""
    total = logp.new_zeros(())
    for new, before, advantage in zip(logp, old, advantages, strict=True):
        ratio = torch.exp(new - before)
        bound = logp.new_tensor(g(epsilon, float(advantage)))
        total = total + torch.minimum(ratio * advantage, bound)
    return total / len(logp)


def discounted_sum(x: list[float], discount: float) -> list[float]:
    """y_t = Σ_l discount^l · x_{t+l}, each sum by itself."""
    return [sum(discount**k * later for k, later in enumerate(x[t:])) for t in range(len(x))]


def trajectory_gae(
    rewards: list[float], values: list[float], last: float, gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    """GAE-λ advantages and discounted rewards-to-go of one trajectory, closed by `last`."""
    v = [*values, last]
    deltas = [r + gamma * v[t + 1] - v[t] for t, r in enumerate(rewards)]
    return discounted_sum(deltas, gamma * lam), discounted_sum([*rewards, last], gamma)[:-1]


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    """(logp, old, A), 60 each: both signs of A at ratios below, inside and above the range."""
    generator = torch.Generator().manual_seed(0)
    old = -3 * torch.rand(60, generator=generator, dtype=torch.float64) - 0.1
    ratio = torch.tensor([0.5, 0.79, 0.95, 1.0, 1.1, 1.21, 2.0]).double().repeat(9)[:60]
    advantages = torch.randn(60, generator=generator, dtype=torch.float64)
    return old + ratio.log(), old, advantages


@on_both
@pytest.mark.parametrize("epsilon", [0.1, 0.2, 0.3])
def test_clipped_objective_and_its_gradient(
    batch: tuple[Tensor, Tensor, Tensor], epsilon: float, backend: str
) -> None:
    logp, old, advantages = batch
    theirs = logp.clone().requires_grad_()
    wanted = -objective(theirs, old, advantages, epsilon)
    wanted.backward()
    ours = logp.clone().requires_grad_()
    loss = ppo_fast.ppo_loss(
        ours, old, advantages, clip_low=epsilon, clip_high=epsilon, backend=backend
    ).loss
    loss.backward()
    assert theirs.grad is not None and ours.grad is not None
    assert 0 < int(theirs.grad.eq(0).sum()) < 60  # some are clipped, and some are not
    torch.testing.assert_close(loss, wanted, rtol=0, atol=FP64)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=FP64)


@on_both
@pytest.mark.parametrize(("gamma", "lam"), [(0.99, 0.97), (1.0, 1.0), (0.9, 0.0)])
def test_advantages_and_rewards_to_go(gamma: float, lam: float, backend: str) -> None:
    """Three trajectories in one buffer: one ends, one is cut at a time limit, one by the epoch."""
    generator = torch.Generator().manual_seed(1)
    lengths = [7, 13, 20]
    rewards, values = torch.randn(2, 40, generator=generator, dtype=torch.float64)
    lasts = [0.0, 0.7, -1.3]  # V of the state after: 0 where the episode ended by itself
    advantages, returns = [], []
    for r, v, last in zip(rewards.split(lengths), values.split(lengths), lasts, strict=True):
        a, togo = trajectory_gae(r.tolist(), v.tolist(), last, gamma, lam)
        advantages, returns = advantages + a, returns + togo
    cuts = torch.tensor(lengths).cumsum(0) - 1
    following = torch.cat([values[1:], values.new_zeros(1)])
    following[cuts] = values.new_tensor(lasts)
    terminated, truncated = torch.zeros(2, 40, 1, dtype=torch.bool)
    terminated[cuts[0]], truncated[cuts[1:]] = True, True
    ours = ppo_fast.gae(
        rewards[:, None],
        values[:, None],
        gamma=gamma,
        lam=lam,
        lam_returns=1.0,
        next_values=following[:, None],
        terminated=terminated,
        truncated=truncated,
        time_major=True,
        backend=backend,
    )
    largest = max(map(abs, advantages + returns))
    for mine, wanted in ((ours.advantages, advantages), (ours.returns, returns)):
        expected = torch.tensor(wanted, dtype=torch.float64)[:, None]
        torch.testing.assert_close(mine, expected, rtol=0, atol=FP64 * largest)


@on_both
def test_value_regression_and_its_gradient(
    batch: tuple[Tensor, Tensor, Tensor], backend: str
) -> None:
    """mean (V − R)²; ours with scale 1, unclipped."""
    values, _, returns = batch
    theirs = values.clone().requires_grad_()
    wanted = sum((v - r) ** 2 for v, r in zip(theirs, returns, strict=True)) / len(returns)
    wanted.backward()
    ours = values.clone().requires_grad_()
    loss = ppo_fast.value_loss(ours, None, returns, clip=None, scale=1.0, backend=backend).loss
    loss.backward()
    largest = float(wanted.detach())
    torch.testing.assert_close(loss, wanted, rtol=0, atol=FP64 * largest)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=FP64 * largest)


@on_both
def test_normalised_advantages_are_spinning_ups(
    batch: tuple[Tensor, Tensor, Tensor], backend: str
) -> None:
    """Its buffer divides by the population's standard deviation, ours with unbiased=False."""
    _, _, a = batch
    mean = sum(a.tolist()) / 60
    deviation = (sum((x - mean) ** 2 for x in a.tolist()) / 60) ** 0.5
    wanted = torch.tensor([(x - mean) / deviation for x in a.tolist()], dtype=torch.float64)
    ours = ppo_fast.whiten(a[None], unbiased=False, eps=0.0, backend=backend)[0]
    torch.testing.assert_close(ours, wanted, rtol=0, atol=FP64 * float(wanted.abs().max()))
