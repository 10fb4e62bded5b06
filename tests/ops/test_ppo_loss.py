"""ppo_loss: every variant, estimator and reduction against the fp64 reference, and by hand."""

from __future__ import annotations

import math

import pytest
import torch

import ppo_fast
from ppo_fast import Moments, testing
from ppo_fast._boundary.schema import ESTIMATORS, REDUCTIONS, VARIANTS
from ppo_fast.testing import ppo_call, run

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
OPTIONS: dict[str, dict[str, object]] = {
    "dual clip": {"dual_clip": 3.0},
    "gspo dual clip": {"variant": "gspo", "dual_clip": 3.0},
    "one-sided": {"clip_low": 1.0, "clip_high": math.inf},
    "no log-ratio clamp": {"log_ratio_clamp": None},
    "asymmetric clamp": {"log_ratio_clamp": (-1.0, 0.5)},
    "kl clamp": {"kl_clamp": 0.05},
    "no kl clamp": {"kl_clamp": None},
    "ratio clip": {"kl_estimator": "k3+", "kl_ratio_clip": 1.05},
    "penalty ratio clip": {"variant": "penalty", "kl_estimator": "abs+", "kl_ratio_clip": 0.9},
    "ratio kl": {"kl_weight": "ratio"},
    "ratio kl clamp": {"kl_weight": "ratio", "kl_clamp": 0.05, "log_ratio_clamp": (-0.4, 0.3)},
    "ratio gspo": {"kl_weight": "ratio", "variant": "gspo"},
    "ratio cispo": {"kl_weight": "ratio", "variant": "cispo", "kl_estimator": "k2"},
    "score kl": {"kl_weight": "score"},
    "score abs": {"kl_weight": "score", "kl_estimator": "abs", "kl_clamp": 0.3},
    "gspo clamp": {"variant": "gspo", "log_ratio_clamp": (-0.1, 0.05)},
    "denom": {"denom": 17.0},
    "negative coefficients": {"kl_coef": -0.1, "entropy_coef": -0.2},
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_within_budget(backend: str, device: str, variant: str, reduction: str) -> None:
    options = {"variant": variant, "reduction": reduction, "device": device}
    testing.assert_agrees(ppo_call((4, 9), mask="row", **options), backend)
    bare = {"extras": (), "kl_coef": 0.0, "mask": None}
    testing.assert_agrees(ppo_call((2, 3), **options, **bare), backend)


@pytest.mark.parametrize("plus", ["", "+"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("variant", ["clip", "penalty"])
def test_estimators(backend: str, device: str, variant: str, estimator: str, plus: str) -> None:
    call = ppo_call(variant=variant, kl_estimator=estimator + plus, device=device)
    testing.assert_agrees(call, backend)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_precisions(backend: str, device: str, dtype: torch.dtype) -> None:
    for seed, variant in enumerate(VARIANTS):
        call = ppo_call(variant=variant, dtype=dtype, device=device, seed=seed)
        testing.assert_agrees(call, backend)
    out = run(call, backend)
    assert out["loss"].dtype == torch.float32 and out["grad_logprobs"].dtype == dtype


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(backend: str, device: str, options: dict[str, object]) -> None:
    for seed in range(2):
        testing.assert_agrees(ppo_call(device=device, seed=seed, **options), backend)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("variant", ["clip", "gspo"])
def test_packed(backend: str, device: str, variant: str, reduction: str) -> None:
    options = {"denom": 11.0} if reduction.endswith("norm") else {}
    call = ppo_call(
        (41,), packed=True, variant=variant, reduction=reduction, device=device, **options
    )
    testing.assert_agrees(call, backend)


def test_flat_without_sequences(backend: str, device: str) -> None:
    testing.assert_agrees(ppo_call((41,), device=device), backend)


def test_many_blocks(backend: str, device: str) -> None:
    """More tokens than one program or task takes."""
    testing.assert_agrees(ppo_call((3, 1500), device=device), backend)
    testing.assert_agrees(ppo_call((4500,), variant="gspo", packed=True, device=device), backend)


def tiny(device: str, d: list[float], adv: list[float], **options: object) -> testing.Call:
    """Tokens with given log-ratios and advantages, summed."""
    new = torch.full((1, len(d)), -1.0, device=device)
    tensors = {
        "logprobs": new,
        "old_logprobs": new - torch.tensor([d], device=device),
        "advantages": torch.tensor([adv], device=device),
    }
    loss = {"loss": torch.tensor(1.0, device=device)}
    return testing.Call("ppo_loss", tensors, {"reduction": "token-sum", **options}, loss)


def test_gradient_stops_where_the_clip_binds(backend: str, device: str) -> None:
    """dl/dlogprob is −Aρ where min(ρA, clip(ρ)A) is the unclipped term, else exactly 0."""
    d, adv = [0.5, 0.5, -0.5, -0.5, 0.1], [1.0, -1.0, 1.0, -1.0, 1.0]
    grad = run(tiny(device, d, adv), backend)["grad_logprobs"][0].tolist()
    want = [0.0, math.exp(0.5), -math.exp(-0.5), 0.0, -math.exp(0.1)]
    assert all(
        math.isclose(g, w, rel_tol=1e-6) or g == w == 0 for g, w in zip(grad, want, strict=True)
    )


def test_dual_clip_caps_negative_advantages(backend: str, device: str) -> None:
    out = run(tiny(device, [2.0, 2.0, 0.1], [-1.0, 1.0, -1.0], dual_clip=3.0), backend)
    grad = out["grad_logprobs"][0]
    assert math.isclose(float(out["loss"]), 3.0 - 1.2 + math.exp(0.1), rel_tol=1e-6)
    assert bool((grad[:2] == 0).all()) and math.isclose(
        float(grad[2]), math.exp(0.1), rel_tol=1e-6
    )
    assert ppo_fast.Stats(out["stats"]).compute()["clip_frac_dual"] == pytest.approx(1 / 3)


@pytest.mark.case("N15")
def test_at_the_edge_the_whole_gradient_passes(backend: str, device: str) -> None:
    """A tie with the clip (ρ = 1 with no width; A = 0) counts as unclipped, as in torch.min."""
    call = tiny(device, [0.0, 0.0, 0.0], [2.0, -3.0, 0.0], clip_low=0.0, clip_high=0.0)
    out = run(call, backend)
    assert out["grad_logprobs"].tolist() == [[-2.0, 3.0, 0.0]]
    assert ppo_fast.Stats(out["stats"]).compute()["clip_frac"] == 0.0


@pytest.mark.case("X12")
@pytest.mark.parametrize("d", [89.0, -89.0, 1e4, -1e4, math.inf, -math.inf])
@pytest.mark.parametrize("variant", VARIANTS)
def test_huge_log_ratios(backend: str, device: str, variant: str, d: float) -> None:
    """Clamped to ±20: loss and gradient are finite, and the clamped ratio passes no gradient."""
    out = run(tiny(device, [d], [-1.0], variant=variant), backend)
    assert bool(out["loss"].isfinite()) and bool(out["stats"][:24].isfinite().all())
    if variant != "cispo":
        assert float(out["grad_logprobs"]) == 0.0
    ratio = ppo_fast.Stats(out["stats"]).compute()["ratio_max"]
    assert math.isclose(ratio, math.exp(math.copysign(20, d)), rel_tol=1e-5)


@pytest.mark.case("X12")
def test_without_the_clamp_ratios_overflow_as_in_eager(backend: str, device: str) -> None:
    out = run(tiny(device, [1e4], [-1.0], log_ratio_clamp=None), backend)
    assert float(out["loss"]) == math.inf


def test_no_old_logprobs_is_ratio_one(backend: str, device: str) -> None:
    """ρ exactly 1: the loss is −ΣA/D, the gradient −A/D, nothing is clipped."""
    call = ppo_call((3, 4), mask=None, extras=(), kl_coef=0.0, device=device)
    call = call.replace(old_logprobs=None).option(old_logprobs=None)
    out, adv = run(call, backend), call.tensors["advantages"]
    stats = ppo_fast.Stats(out["stats"]).compute()
    assert stats["ratio_min"] == stats["ratio_max"] == stats["ratio_mean"] == stats["ess"] == 1.0
    assert stats["clip_frac"] == stats["clip_frac_eps"] == stats["kl_k1"] == stats["kl_k3"] == 0.0
    assert torch.allclose(out["loss"], -adv.mean(), rtol=1e-5)
    scale = call.cotangents["loss"] / adv.numel()
    assert torch.allclose(out["grad_logprobs"], -adv * scale, rtol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_old_logprobs_in_every_variant(backend: str, device: str, variant: str) -> None:
    call = ppo_call((3, 4), variant=variant, device=device)
    same = call.replace(old_logprobs=call.tensors["logprobs"])
    a, b = (
        run(same, backend),
        run(call.replace(old_logprobs=None).option(old_logprobs=None), backend),
    )
    assert all(testing.same_bits(a[k], b[k]) for k in a)


def test_gspo_gradient_goes_through_each_token(backend: str, device: str) -> None:
    """ρ is the sequence's, the gradient −Aρ of each token by itself, not ρ/n."""
    d, adv = [0.2, -0.1, 0.05], [1.0, 2.0, -1.0]
    out = run(tiny(device, d, adv, variant="gspo"), backend)
    ratio = math.exp(sum(d) / 3)
    want = torch.tensor([[-a * ratio for a in adv]], device=device)
    assert torch.allclose(out["grad_logprobs"], want, rtol=1e-6)
    assert math.isclose(float(out["loss"]), -sum(adv) * ratio, rel_tol=1e-6)


def test_cispo_gradient_never_stops(backend: str, device: str) -> None:
    out = run(tiny(device, [3.0, -3.0], [1.0, 1.0], variant="cispo"), backend)
    assert torch.allclose(out["grad_logprobs"].cpu(), torch.tensor([[-1.2, -0.8]]), rtol=1e-6)


def test_plus_estimators_take_the_gradient_of_k2(backend: str, device: str) -> None:
    """The value is the estimator's; beyond the clamp the gradient still flows."""
    call = ppo_call((3, 5), extras=("ref_logprobs",), kl_clamp=0.01, device=device, mask=None)
    call = call.replace(advantages=torch.zeros_like(call.tensors["advantages"]))
    gap = call.tensors["logprobs"] - call.tensors["ref_logprobs"]
    scale = 0.3 * call.cotangents["loss"] / gap.numel()
    for name in ESTIMATORS:
        plain = run(call.option(kl_estimator=name), backend)
        plus = run(call.option(kl_estimator=name + "+"), backend)
        assert testing.same_bits(plain["loss"], plus["loss"])
        assert torch.allclose(plus["grad_logprobs"], gap * scale, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_is_weights_touch_the_policy_term_only(backend: str, device: str, variant: str) -> None:
    """Zero weights leave what zero advantages leave: KL and entropy."""
    call = ppo_call((3, 5), variant=variant, extras=("entropy", "ref_logprobs"), device=device)
    flat = torch.zeros_like(call.tensors["advantages"])
    a = run(call.replace(is_weights=flat), backend)
    b = run(call.replace(advantages=flat), backend)
    for name in ("loss", "grad_logprobs", "grad_entropy"):
        assert testing.same_bits(a[name], b[name]), name


def test_broadcast_advantages(backend: str, device: str) -> None:
    """(B, 1) is the same as its copy over T; (B,) is an error (test_errors.py)."""
    call = ppo_call((4, 9), device=device)
    column = call.tensors["advantages"][:, :1].clone()
    wide = column.expand(4, 9).contiguous()
    a, b = (
        run(call.replace(advantages=column), backend),
        run(call.replace(advantages=wide), backend),
    )
    assert all(testing.same_bits(a[k], b[k]) for k in a)


def test_tensor_coefficients_are_their_numbers(backend: str, device: str) -> None:
    call = ppo_call(device=device, kl_coef=0.25, entropy_coef=0.125, denom=16.0)
    names = ("kl_coef", "entropy_coef", "denom")
    on_device = {k: torch.tensor(call.options[k], device=device) for k in names}
    doubles = {k: v.double() for k, v in on_device.items()}
    want = run(call, backend)
    for given in (on_device, doubles):
        got = run(call.option(**given), backend)
        assert all(testing.same_bits(got[k], want[k]) for k in want)


@pytest.mark.case("X10")
@pytest.mark.parametrize("m2, n", [(0.0, 5.0), (0.0, 0.0), (3.0, 1.0)])
def test_moments_without_variance_whiten_to_zero(
    backend: str, device: str, m2: float, n: float
) -> None:
    call = ppo_call(device=device, extras=("advantage_moments",), kl_coef=0.0)
    moments = torch.tensor([n, 0.3, m2], dtype=torch.float64, device=device)
    out = run(call.option(advantage_moments=Moments(moments)), backend)
    assert float(out["loss"]) == 0.0 and not bool(out["grad_logprobs"].any())


def test_whitening_on_the_fly_is_whitening_first(backend: str, device: str) -> None:
    call = ppo_call((4, 9), device=device, extras=(), kl_coef=0.0)
    adv, mask = call.tensors["advantages"] * 10 + 1e3, call.tensors["mask"]
    n = mask.sum()
    mean = adv[mask].double().mean()
    moments = Moments(torch.stack([n.double(), mean, (adv[mask].double() - mean).square().sum()]))
    fused = run(call.replace(advantages=adv).option(advantage_moments=moments), backend)
    white = ppo_fast.whiten(adv, mask, backend=backend)
    apart = run(call.replace(advantages=white), backend)
    for name in ("loss", "grad_logprobs"):
        assert torch.allclose(fused[name], apart[name], rtol=1e-5, atol=1e-7), name


@pytest.mark.case("X10")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_kept(backend: str, device: str, reduction: str, variant: str) -> None:
    """A divisor of 0 gives loss 0 and zero gradients, with `denom` too."""
    for options in ({}, {"denom": 5.0}):
        call = ppo_call(
            mask="empty", reduction=reduction, variant=variant, device=device, **options
        )
        out = run(call, backend)
        assert float(out["loss"]) == 0.0
        assert not bool(out["grad_logprobs"].any()) and not bool(out["grad_entropy"].any())


@pytest.mark.case("X8")
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,), (1, 1)], ids=str)
def test_small_shapes(backend: str, device: str, shape: tuple[int, ...]) -> None:
    testing.assert_agrees(ppo_call(shape, device=device, mask="all"), backend)
