"""Ratios of a whole sequence: `ratio_level`, and the KL weighed by them, against fp64 formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from token_batches import LAYOUTS, Batch, batch, flat, given, wanted
from torch import Tensor

import ppo_fast
from ppo_fast import surrogates

# fp64 sums of a hundred terms of order 1, and a few exponentials: 1e-16 times some hundred.
CLOSE = {"rtol": 1e-12, "atol": 1e-13}


def sequence_terms(b: Batch, new: Tensor, level: str, term: Callable[..., Tensor]) -> Tensor:
    """Terms of a ratio of the sequence: e^mean d, differentiated whole or by the token's own."""
    d, adv, out = new - flat(b, b.old), flat(b, b.advantages), torch.zeros_like(new)
    for at in b.per_sequence():
        if at.numel():
            mean = d[at].mean()
            s = mean if level == "sequence" else mean.detach() + new[at] - new[at].detach()
            out = out.index_put((at,), term(s.exp().expand(at.shape), adv[at], new[at]))
    return out


def clip_term(rho: Tensor, adv: Tensor, new: Tensor) -> Tensor:
    return torch.maximum(-adv * rho, -adv * rho.clamp(0.97, 1.05))


def cispo_term(rho: Tensor, adv: Tensor, new: Tensor) -> Tensor:
    return -rho.detach().clamp(0.97, 1.05) * adv * new


def sapo_term(rho: Tensor, adv: Tensor, new: Tensor) -> Tensor:
    tau = torch.where(adv > 0, torch.ones_like(adv), 1.05 * torch.ones_like(adv))
    return -adv * 4 / tau * torch.sigmoid(tau * (rho - 1))


LEVELS = {"clip": clip_term, "cispo": cispo_term, "sapo": sapo_term}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", LEVELS)
@pytest.mark.parametrize("level", ["sequence", "sequence-token"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_ratio_of_the_sequence(backend: str, level: str, variant: str, layout: str) -> None:
    b = batch(layout)
    want, want_grad = wanted(b, lambda b, new: sequence_terms(b, new, level, LEVELS[variant]))
    new = b.logprobs.clone().requires_grad_()
    out = ppo_fast.ppo_loss(
        new,
        *given(b),
        variant=variant,
        ratio_level=level,
        clip_low=0.03,
        clip_high=0.05,
        cu_seqlens=b.cu_seqlens,
        backend=backend,
    )
    out.loss.backward()
    torch.testing.assert_close(out.loss.detach(), want, **CLOSE)
    torch.testing.assert_close(new.grad, want_grad, **CLOSE)
    ratios = [float((b.logprobs - b.old).reshape(-1)[at].mean().exp()) for at in b.per_sequence()]
    low = out.stats.compute()["ratio_min"]
    assert math.isclose(low, min(r for r in ratios if not math.isnan(r)), rel_tol=1e-12)


@pytest.mark.parametrize("level", ["token", "sequence", "sequence-token"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_kl_times_the_ratio(backend: str, level: str) -> None:
    """TRL's bias-corrected KL: beta·rho·k3, the gradient through both factors."""
    b = batch("holes")

    def formula(b: Batch, new: Tensor) -> Tensor:
        x = new - flat(b, b.ref)
        k3 = (-x).exp() - 1 + x
        d = new - flat(b, b.old)
        if level == "token":
            return clip_term(d.exp(), flat(b, b.advantages), new) + 0.3 * d.exp() * k3
        rho = sequence_terms(b, new, level, lambda rho, adv, new: rho)
        return clip_term(rho, flat(b, b.advantages), new) + 0.3 * rho * k3

    want, want_grad = wanted(b, formula)
    new = b.logprobs.clone().requires_grad_()
    out = ppo_fast.ppo_loss(
        new,
        *given(b),
        ratio_level=level,
        clip_low=0.03,
        clip_high=0.05,
        ref_logprobs=b.ref,
        kl_coef=0.3,
        kl_weight="ratio",
        backend=backend,
    )
    out.loss.backward()
    torch.testing.assert_close(out.loss.detach(), want, **CLOSE)
    torch.testing.assert_close(new.grad, want_grad, **CLOSE)
    # The statistics hold the estimate without its weight, and the policy term without the KL.
    x = (b.logprobs - b.ref)[b.mask]
    found = out.stats.compute()
    k3 = float(((-x).exp() - 1 + x).mean())
    assert math.isclose(found["ref_kl"], k3, rel_tol=1e-12)
    plain = ppo_fast.ppo_loss(
        b.logprobs, *given(b), ratio_level=level, clip_low=0.03, clip_high=0.05, backend=backend
    )
    assert math.isclose(found["policy_loss"], float(plain.loss), rel_tol=1e-12)


def test_a_coupled_slope_carries_weights_of_other_tokens() -> None:
    """d/dl_t of a sequence's ratio is a sum over its tokens, each with its own weight and w."""
    b = batch("holes")
    g = torch.Generator().manual_seed(1)
    weights = torch.rand(b.mask.shape, generator=g, dtype=torch.float64)
    per_sequence = torch.rand(5, generator=g, dtype=torch.float64)

    def formula(b: Batch, new: Tensor) -> Tensor:
        spread = per_sequence[:, None].expand(b.mask.shape).reshape(-1)
        return sequence_terms(b, new, "sequence", clip_term) * flat(b, weights) * spread

    want, want_grad = wanted(b, formula)
    new = b.logprobs.clone().requires_grad_()
    out = ppo_fast.ppo_loss(
        new,
        *given(b),
        ratio_level="sequence",
        clip_low=0.03,
        clip_high=0.05,
        is_weights=weights,
        sequence_weights=per_sequence,
        backend="cpu",
    )
    out.loss.backward()
    torch.testing.assert_close(out.loss.detach(), want, **CLOSE)
    torch.testing.assert_close(new.grad, want_grad, **CLOSE)


def test_built_clip_is_the_kernels_with_a_dual_clip() -> None:
    """Value, gradient and clip fractions of both signs of A, above and below the caps."""
    b = batch("holes")
    old = b.logprobs + 4.0 * (b.old - b.logprobs)  # ratios from 0.1 to 10
    found = []
    for variant, dual in (("clip", 3.0), (surrogates.clip(0.2, 0.2, 3.0), None)):
        new = b.logprobs.clone().requires_grad_()
        loss, stats = ppo_fast.ppo_loss(
            new, old, b.advantages, b.mask, variant=variant, dual_clip=dual, backend="cpu"
        )
        loss.backward()
        fields = [stats.field(name) for name in ("clip_low", "clip_high", "clip_eps")]
        found.append((loss.detach(), new.grad, torch.stack(fields)))
    for a, z in zip(*found, strict=True):
        torch.testing.assert_close(a, z, **CLOSE)
    assert bool((found[0][2] > 0).all())
