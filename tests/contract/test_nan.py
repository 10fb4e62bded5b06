"""NaN and overflow in the ops: what is not a number shows where it stands, on every backend."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import ppo_fast
from ppo_fast._boundary.schema import ESTIMATORS, VARIANTS
from ppo_fast.ops.group_advantages import group_advantages

NAN = math.nan
ROW, COL, SHAPE = 1, 2, (3, 5)


def numbers(seed: int, device: str, low: float = -1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(SHAPE, generator=generator) + low).to(device)


def spoilt(x: Tensor, value: float = NAN) -> Tensor:
    """A copy with `value` in one slot."""
    x = x.clone()
    x[ROW, COL] = value
    return x


def only_here(x: Tensor) -> bool:
    """True if the spoilt slot alone is NaN."""
    here = torch.zeros(SHAPE, dtype=torch.bool)
    here[ROW, COL] = True
    return torch.equal(x.isnan().cpu(), here)


@pytest.mark.case("X18")
@pytest.mark.parametrize("form", ["max", "clipped"])
@pytest.mark.parametrize("which", ["values", "old_values", "returns"])
def test_value_loss(backend: str, device: str, form: str, which: str) -> None:
    """By the formula a clamp between NaNs is NaN, and so is the larger of it and a number."""
    given = {
        name: numbers(i, device) for i, name in enumerate(("values", "old_values", "returns"))
    }
    given[which] = spoilt(given[which])
    values = given["values"].requires_grad_()
    loss = ppo_fast.value_loss(**given, form=form, backend=backend).loss
    loss.backward()
    assert loss.isnan() and only_here(values.grad)


@pytest.mark.parametrize("form", ["max", "clipped"])
def test_value_loss_of_an_infinite_old_value(backend: str, device: str, form: str) -> None:
    """clamp(v, inf − c, inf + c) is inf: not a NaN, and not to be taken for one."""
    values = numbers(0, device).requires_grad_()
    old = spoilt(numbers(1, device), math.inf)
    loss = ppo_fast.value_loss(values, old, numbers(2, device), form=form, backend=backend).loss
    loss.backward()
    assert loss.item() == math.inf and values.grad[ROW, COL] == 0.0
    assert values.grad.isfinite().all()


@pytest.mark.case("X18")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("which", ["logprobs", "old_logprobs", "advantages", "is_weights"])
def test_ppo_loss(backend: str, device: str, variant: str, which: str) -> None:
    """In loss and gradient, of the token alone; of its sequence where the ratio is the sequence's.

    All ratios are e^0.1, within the clip, so that every token has a slope.
    """
    logprobs = numbers(0, device)
    given = {
        "logprobs": logprobs,
        "old_logprobs": logprobs - 0.1,
        "advantages": numbers(1, device),
        "is_weights": numbers(2, device, 0.5),
    }
    given[which] = spoilt(given[which])
    leaf = given["logprobs"].requires_grad_()
    loss = ppo_fast.ppo_loss(**given, variant=variant, backend=backend).loss
    loss.backward()
    assert loss.isnan()
    if variant == "gspo" and which.endswith("logprobs"):
        assert torch.equal(leaf.grad.isnan().any(1).cpu(), torch.arange(3) == ROW)
        assert leaf.grad[ROW].isnan().all()
    else:
        assert only_here(leaf.grad)


@pytest.mark.case("X18")
@pytest.mark.parametrize("estimator", [e for e in ESTIMATORS if e != "k1"])  # k1's slope is 1
def test_reference_log_probability(backend: str, device: str, estimator: str) -> None:
    leaf = numbers(0, device).requires_grad_()
    loss = ppo_fast.ppo_loss(
        leaf,
        None,
        numbers(1, device),
        ref_logprobs=spoilt(numbers(2, device)),
        kl_coef=0.1,
        kl_estimator=estimator,
        backend=backend,
    ).loss
    loss.backward()
    assert loss.isnan() and only_here(leaf.grad)


@pytest.mark.case("X20")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_ratio_that_overflows_beside_an_advantage_of_0(
    backend: str, device: str, variant: str
) -> None:
    """e^200 is inf in fp32 and a number in fp64, where the product with 0 is 0."""
    logprobs, advantages = numbers(0, device), spoilt(numbers(1, device), 0.0)
    old = spoilt(logprobs - 0.1, logprobs[ROW, COL].item() - 200.0)
    if variant == "gspo":  # the sequence's ratio overflows: all its advantages must be 0
        old[ROW], advantages[ROW] = logprobs[ROW] - 200.0, 0.0

    def run(dtype: torch.dtype, name: str) -> tuple[Tensor, Tensor]:
        leaf, *rest = (x.detach().to(dtype) for x in (logprobs, old, advantages))
        leaf = leaf.requires_grad_()
        options: dict[str, Any] = {"variant": variant, "log_ratio_clamp": None, "clip_high": 1e9}
        loss = ppo_fast.ppo_loss(leaf, *rest, **options, backend=name).loss
        loss.backward()
        return loss, leaf.grad

    (loss, grad), (want, want_grad) = run(torch.float32, backend), run(torch.float64, "reference")
    terms = float(advantages.abs().sum()) * math.exp(0.1) / advantages.numel()
    eps = torch.finfo(torch.float32).eps
    # Nine roundings a token: difference, exp (two ulp), product, weight and the sum of 15.
    assert abs(loss.item() - want.item()) <= 9 * eps * terms
    assert grad[ROW, COL] == 0.0 and want_grad[ROW, COL] == 0.0 and grad.isfinite().all()


@pytest.mark.case("X18")
def test_a_divisor_on_the_device(backend: str, device: str) -> None:
    """A comparison with NaN is false, which would stand for a batch without a token."""
    nan = torch.tensor(NAN, device=device)
    leaf = numbers(0, device).requires_grad_()
    losses = [
        ppo_fast.ppo_loss(leaf, None, numbers(1, device), denom=nan, backend=backend).loss,
        ppo_fast.value_loss(
            leaf, leaf.detach(), numbers(1, device), denom=nan, backend=backend
        ).loss,
    ]
    logits, tokens = torch.zeros(*SHAPE, 4, device=device), torch.zeros(SHAPE, device=device)
    for loss in losses:
        (grad,) = torch.autograd.grad(loss, leaf)
        assert loss.isnan() and grad.isnan().all()
    logits.requires_grad_()
    loss = ppo_fast.logits_ppo_loss(
        logits, tokens.long(), None, numbers(1, device), denom=nan, backend=backend
    ).loss
    loss.backward()
    assert loss.isnan() and logits.grad.isnan().all()


GROUPS = torch.tensor([0, 0, 0, 1, 1, 2])
APART = ("grpo", "grpo-passk", "rloo", "dr_grpo", "opo", "maxrl")
TOGETHER = ("reinforce++", "grpo-batch-std")


@pytest.mark.case("X19")
@pytest.mark.parametrize("score", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("baseline", [*APART, *TOGETHER])
def test_group_advantages(baseline: str, score: float) -> None:
    """Other groups keep their numbers; scaled together they have none, and never 0."""
    good = torch.tensor([1.0, 2.0, 0.0, 5.0, 1.0, 3.0])
    bad = good.clone()
    bad[1] = score
    lengths = torch.arange(1, 7) if baseline == "opo" else None
    got, want = (
        group_advantages(x, GROUPS, baseline=baseline, lengths=lengths) for x in (bad, good)
    )
    assert not got[:3].isfinite().any() and not (got[:3] == 0).any()
    if baseline in TOGETHER:
        assert got.isnan().all()
    else:
        assert torch.equal(got[3:], want[3:])


@pytest.mark.case("X19")
@pytest.mark.parametrize("baseline", APART)
def test_a_score_alone_in_its_group(baseline: str) -> None:
    """It has nothing to be compared with, but is no 0; nor are equal infinities."""
    options = {"baseline": baseline, "lengths": torch.ones_like(GROUPS)}
    options = options if baseline == "opo" else {"baseline": baseline}
    alone = torch.tensor([1.0, 2.0, 0.0, 5.0, 1.0, NAN])
    assert group_advantages(alone, GROUPS, **options)[5].isnan()
    equal = torch.tensor([1.0, 2.0, 0.0, math.inf, math.inf, 0.0])
    assert group_advantages(equal, GROUPS, **options)[3:5].isnan().all()
