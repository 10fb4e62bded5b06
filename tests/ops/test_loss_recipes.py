"""Recipes of docs/losses.md: other systems' losses as options, against their formulas in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from token_batches import Batch, Formula, batch, flat, wanted
from torch import Tensor

import ppo_fast

# fp64 sums of a hundred terms of order 1, and a few exponentials: 1e-16 times some hundred.
CLOSE = {"rtol": 1e-12, "atol": 1e-13}


def prime_rl(b: Batch, new: Tensor) -> Tensor:
    """−M·A·ρ + τ·d², d to the sampler; a token is dropped that moves its way by more than 0.2
    (prime-rl, src/prime_rl/trainer/rl/loss.py), here by 0.02."""
    adv, sampled = flat(b, b.advantages), flat(b, b.old)
    d = new - sampled
    gap = new.detach().exp() - sampled.exp()
    dropped = torch.where(adv > 0, gap > 0.02, gap < -0.02)
    return -torch.where(dropped, 0.0, adv * d.exp()) + 1e-3 * d**2


def importance(b: Batch, new: Tensor) -> Tensor:
    return -flat(b, b.advantages) * (new - flat(b, b.old)).exp()


def policy_gradient(b: Batch, new: Tensor) -> Tensor:
    return -flat(b, b.advantages) * new


def score_kl(b: Batch, new: Tensor) -> Tensor:
    """The clipped loss and 0.2·e^(l − sg l)·k3 (NeMo-RL, loss_functions.py)."""
    x = new - flat(b, b.ref)
    rho, adv = (new - flat(b, b.old)).exp(), flat(b, b.advantages)
    clipped = torch.maximum(-adv * rho, -adv * rho.clamp(0.8, 1.2))
    return clipped + 0.2 * (new - new.detach()).exp() * ((-x).exp() - 1 + x)


def fipo(b: Batch, new: Tensor) -> Tensor:
    """The clipped loss times clip(e^F), F a discounted sum of later log-ratios (ms-swift)."""
    d, adv, gamma = new - flat(b, b.old), flat(b, b.advantages), 2 ** (-1 / 32)
    future = torch.zeros_like(new)
    for at in b.per_sequence():
        carry, before = 0.0, None
        for i in reversed(at.tolist()):
            steps = 1 if before is None else before - i
            carry = float(d[i].detach()) + gamma**steps * carry
            future[i], before = carry, i
    weight = future.exp().clamp(0.8, 1.2)
    rho = d.exp()
    return weight * torch.maximum(-adv * rho, -adv * rho.clamp(0.8, 1.2))


def fipo_weights(b: Batch) -> Tensor:
    d = torch.where(b.mask, b.logprobs - b.old, 0.0)
    out = ppo_fast.gae(
        d, torch.zeros_like(d), gamma=2 ** (-1 / 32), lam=1.0, mask=b.mask, masked="zero"
    )
    return out.advantages.exp().clamp(0.8, 1.2)


RECIPES: dict[str, tuple[Formula, Callable[[Batch], dict[str, Any]]]] = {
    "prime-rl": (
        prime_rl,
        lambda b: {
            "variant": "dppo-tv",
            "clip_low": 0.02,
            "clip_high": 0.02,
            "ref_logprobs": b.old,
            "kl_estimator": "k2",
            "kl_clamp": None,
            "log_ratio_clamp": None,
            "kl_coef": 2e-3,
        },
    ),
    "importance": (importance, lambda b: {"variant": "reinforce"}),
    "importance by clip": (importance, lambda b: {"clip_low": 1.0, "clip_high": math.inf}),
    "policy gradient": (
        policy_gradient,
        lambda b: {"variant": "reinforce", "ratio_cap": 1.0, "old_logprobs": None},
    ),
    "score": (
        score_kl,
        lambda b: {"ref_logprobs": b.ref, "kl_coef": 0.2, "kl_weight": "score", "kl_clamp": None},
    ),
    "fipo": (fipo, lambda b: {"is_weights": fipo_weights(b)}),
}


@pytest.mark.parametrize("layout", ["padded", "holes"])
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_recipes(backend: str, name: str, layout: str) -> None:
    b = batch(layout)
    formula, options = RECIPES[name]
    want, want_grad = wanted(b, formula)
    new = b.logprobs.clone().requires_grad_()
    given: dict[str, Any] = {"old_logprobs": b.old, **options(b)}
    loss, _ = ppo_fast.ppo_loss(
        new, advantages=b.advantages, mask=b.mask, backend=backend, **given
    )
    loss.backward()
    torch.testing.assert_close(loss.detach(), want, **CLOSE)
    torch.testing.assert_close(new.grad, want_grad, **CLOSE)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_luspo_is_a_sum_of_one_ratio(backend: str) -> None:
    """Per sequence |y| times the clipped term of its ratio, over the sequences with a token."""
    b = batch("holes")
    new = b.logprobs.clone().requires_grad_()
    adv = b.advantages.nan_to_num(0.0)[:, :1].contiguous()
    loss, _ = ppo_fast.ppo_loss(
        new,
        b.old,
        adv,
        b.mask,
        ratio_level="sequence",
        reduction="seq-mean-token-sum",
        backend=backend,
    )
    loss.backward()
    leaf = torch.where(b.mask, b.logprobs, 0.0).requires_grad_()
    d, n = torch.where(b.mask, leaf - b.old.nan_to_num(0.0), 0.0), b.mask.sum(1)
    rho = (d.sum(1) / n.clamp(min=1)).exp()
    term = torch.maximum(-adv[:, 0] * rho, -adv[:, 0] * rho.clamp(0.8, 1.2))
    want = (n * term).sum() / (n > 0).sum()
    want.backward()
    torch.testing.assert_close(loss.detach(), want.detach(), **CLOSE)
    torch.testing.assert_close(new.grad, leaf.grad, **CLOSE)
