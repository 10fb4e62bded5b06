"""Weights in the policy losses: of the KL term, of sequences, of 0; the clamp of gspo's ratio."""

from __future__ import annotations

import math
from typing import Any

import pytest
import spelled_out
import torch
from head_helpers import shape_for, short_chunks

import ppo_fast
from ppo_fast import testing
from ppo_fast._boundary.schema import REDUCTIONS, VARIANTS
from ppo_fast._results import STATS_FIELDS
from ppo_fast.testing import Call, ppo_call, run, same_bits

EXTRAS = ("entropy", "ref_logprobs", "is_weights", "advantage_moments", "sequence_weights")
WEIGHTED: dict[str, dict[str, Any]] = {
    "ratio": {"kl_weight": "ratio"},
    "score": {"kl_weight": "score", "kl_estimator": "k2"},
    "ratio of gspo": {"kl_weight": "ratio", "variant": "gspo"},
    "sequences": {"extras": EXTRAS, "reduction": "seq-mean-token-mean"},
    "sequences of gspo": {"extras": EXTRAS, "variant": "gspo"},
}


def one_row(device: str, d: list[float], adv: list[float], **options: Any) -> Call:
    """Tokens with given log-ratios and advantages, summed."""
    new = torch.full((1, len(d)), -1.0, device=device)
    tensors = {
        "logprobs": new,
        "old_logprobs": new - torch.tensor([d], device=device),
        "advantages": torch.tensor([adv], device=device),
    }
    loss = {"loss": torch.tensor(1.0, device=device)}
    return Call("ppo_loss", tensors, {"reduction": "token-sum", **options}, loss)


SLOPES = {
    "k1": lambda x: 1.0,
    "k2": lambda x: x,
    "k3": lambda x: -math.expm1(-x),
    "abs": lambda x: math.copysign(1.0, x),
}


@pytest.mark.parametrize("estimator", SLOPES)
@pytest.mark.parametrize("kl_weight", ["ratio", "score"])
def test_kl_weight_by_hand(backend: str, device: str, kl_weight: str, estimator: str) -> None:
    """W·k' + W'·k, of log-ratios and estimates on both sides of their clamps; A is 0."""
    gaps, refs = [0.2, -0.4, 0.9, -0.7, 0.3], [0.3, -0.5, 0.4, -0.25, 1.9]
    call = one_row(
        device,
        gaps,
        [0.0] * 5,
        log_ratio_clamp=0.5,
        kl_coef=0.25,
        kl_estimator=estimator,
        kl_clamp=0.6,
        kl_weight=kl_weight,
    )
    new = call.tensors["logprobs"]
    call = call.replace(ref_logprobs=new - torch.tensor([refs], device=device))
    values, want, plain = 0.0, [], 0.0
    for d, x in zip(gaps, refs, strict=True):
        k = spelled_out.kl(x, estimator, 0.6)
        bent = 0.0 if abs(spelled_out.kl(x, estimator, None)) > 0.6 else SLOPES[estimator](x)
        weight = math.exp(min(max(d, -0.5), 0.5)) if kl_weight == "ratio" else 1.0
        moving = k if kl_weight == "score" or abs(d) <= 0.5 else 0.0
        values += 0.25 * weight * k
        want.append(0.25 * weight * (bent + moving))
        plain += k
    out = run(call, backend)
    assert math.isclose(float(out["loss"]), values, rel_tol=1e-5)
    assert torch.allclose(out["grad_logprobs"].cpu(), torch.tensor([want]), rtol=1e-5, atol=1e-7)
    stats = ppo_fast.Stats(out["stats"])
    assert math.isclose(float(stats.field("ref_kl")), plain, rel_tol=1e-5), "unweighted"
    assert math.isclose(float(stats.field("loss")), values, rel_tol=1e-5)
    assert float(stats.field("policy_loss")) == 0.0


def test_kl_of_0_beside_a_ratio_that_overflows(backend: str, device: str) -> None:
    """0 in loss and gradient, as the exact product: e^200 is a number in fp64."""
    call = one_row(device, [200.0], [0.0], log_ratio_clamp=None, kl_coef=0.5, kl_weight="ratio")
    call = call.replace(ref_logprobs=call.tensors["logprobs"])
    out = run(call, backend)
    assert float(out["loss"]) == 0.0 and float(out["grad_logprobs"]) == 0.0


def test_kl_weight_without_a_reference_changes_nothing(backend: str, device: str) -> None:
    call = ppo_call(device=device, extras=("entropy",), kl_coef=0.0)
    want = run(call, backend)
    for kl_weight in ("ratio", "score"):
        got = run(call.option(kl_weight=kl_weight), backend)
        assert all(same_bits(got[k], want[k]) for k in want)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("variant", ["clip", "gspo", "linear"])
def test_sequence_weights(backend: str, device: str, variant: str, reduction: str) -> None:
    options: dict[str, Any] = {"variant": variant, "reduction": reduction, "extras": EXTRAS}
    testing.assert_agrees(ppo_call((4, 9), mask="row", device=device, **options), backend)
    denom = {"denom": 11.0} if reduction.endswith("norm") else {}
    flat = ppo_call((41,), packed=True, device=device, **options, **denom)
    testing.assert_agrees(flat, backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_sequence_weights_over_many_blocks(
    backend: str, device: str, dtype: torch.dtype
) -> None:
    options: dict[str, Any] = {"extras": EXTRAS, "dtype": dtype, "device": device}
    options["log_ratio_clamp"] = 3.0  # e^20 over D is beyond fp16
    testing.assert_agrees(ppo_call((3, 1500), **options), backend)
    testing.assert_agrees(ppo_call((4500,), packed=True, **options), backend)


@pytest.mark.parametrize("packed", [False, True])
def test_sequence_weights_multiply_the_terms_alone(
    backend: str, device: str, packed: bool
) -> None:
    """Twice for all is twice the loss and its sums; D and the other statistics keep their bits."""
    call = ppo_call((45,) if packed else (4, 9), packed=packed, device=device)
    want = run(call, backend)
    got = run(call.replace(sequence_weights=torch.full((4,), 2.0, device=device)), backend)
    for name in ("loss", "grad_logprobs", "grad_entropy"):
        assert same_bits(got[name], 2 * want[name]), name
    for name in STATS_FIELDS:
        i, factor = STATS_FIELDS.index(name), 2 if name in ("loss", "policy_loss") else 1
        assert same_bits(got["stats"][i], factor * want["stats"][i]), name


def test_a_nan_sequence_weight(backend: str, device: str) -> None:
    """In loss and gradient of its own tokens; of a sequence without tokens in nothing."""
    call = ppo_call((4, 9), mask="row", device=device, extras=EXTRAS)
    clean = run(call, backend)
    weights = call.tensors["sequence_weights"].clone()
    weights[0] = math.nan  # the row without a token
    empty = run(call.replace(sequence_weights=weights), backend)
    assert all(same_bits(empty[k], clean[k]) for k in clean)
    weights[2] = math.nan
    out = run(call.replace(sequence_weights=weights), backend)
    here = torch.zeros(4, 9, dtype=torch.bool, device=device)
    here[2] = True
    assert out["loss"].isnan()
    assert torch.equal(out["grad_logprobs"].isnan(), here & call.tensors["mask"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_broadcast_is_weights(backend: str, device: str, variant: str) -> None:
    """(B, 1) is the same as its copy over T."""
    call = ppo_call((4, 9), variant=variant, device=device)
    column = call.tensors["is_weights"][:, :1].clone()
    wide = column.expand(4, 9).contiguous()
    a, b = (run(call.replace(is_weights=x), backend) for x in (column, wide))
    assert all(same_bits(a[k], b[k]) for k in a)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("spoilt", ["overflow", "logprobs", "old_logprobs", "advantages"])
def test_a_weight_of_0_drops_what_is_no_number(
    backend: str, device: str, spoilt: str, variant: str
) -> None:
    """The loss is that of the other tokens, the gradient of the dropped one exactly 0."""
    if variant == "penalty" and spoilt.endswith("logprobs"):
        pytest.skip("its KL is of the same log-probabilities, and is not dropped")
    call = ppo_call(
        (3, 5), variant=variant, extras=(), kl_coef=0.0, log_ratio_clamp=None, device=device
    )
    call = call.replace(mask=None).option(reduction="token-sum")
    t = {k: v.clone() for k, v in call.tensors.items()}
    t["old_logprobs"] = t["logprobs"] - 0.1
    t["is_weights"] = torch.ones_like(t["advantages"])
    t["is_weights"][1] = 0.0  # of a whole sequence, whose ratio gspo shares
    want = run(call.replace(**t | {"advantages": t["advantages"] * t["is_weights"]}), backend)
    if spoilt == "overflow":
        t["old_logprobs"][1], t["advantages"][1] = t["logprobs"][1] - 200.0, -math.inf
    else:
        t[spoilt][1, 2] = math.nan
    out = run(call.replace(**t), backend)
    assert same_bits(out["loss"], want["loss"])
    assert same_bits(out["grad_logprobs"], want["grad_logprobs"])
    assert bool((out["grad_logprobs"][1] == 0).all() and out["grad_logprobs"][0].all())


def test_gspo_clamps_the_mean_log_ratio(backend: str, device: str) -> None:
    """Not those of its tokens, whose own clamp is left to the statistics."""
    d, adv = [30.0, -6.0, 0.0], [1.0, -2.0, -1.5]
    out = run(one_row(device, d, adv, variant="gspo", clip_high=math.inf), backend)
    ratio = math.exp(8.0)
    want = torch.tensor([[-a * ratio for a in adv]])
    assert math.isclose(float(out["loss"]), -sum(adv) * ratio, rel_tol=1e-5)
    assert torch.allclose(out["grad_logprobs"].cpu(), want, rtol=1e-5)
    k1 = float(ppo_fast.Stats(out["stats"]).field("kl_k1"))
    assert math.isclose(k1, -(20.0 - 6.0), rel_tol=1e-6)


@pytest.mark.parametrize("bounds", [(-0.4, 0.1), (-0.1, 0.4)])
def test_gspo_has_no_slope_where_the_clamp_holds(
    backend: str, device: str, bounds: tuple[float, float]
) -> None:
    """The whole sequence has none, though none of its tokens is at the bound itself."""
    sign = 1.0 if bounds[1] == 0.1 else -1.0
    d, adv = [0.3 * sign, 0.1 * sign, 0.2 * sign], [1.0, -2.0, -1.5]
    options = {"variant": "gspo", "clip_low": 1.0, "clip_high": math.inf}
    out = run(one_row(device, d, adv, log_ratio_clamp=bounds, **options), backend)
    assert math.isclose(float(out["loss"]), -sum(adv) * math.exp(0.1 * sign), rel_tol=1e-5)
    assert not bool(out["grad_logprobs"].any())
    free = run(one_row(device, d, adv, log_ratio_clamp=(-0.4, 0.4), **options), backend)
    assert bool(free["grad_logprobs"].all())


@pytest.mark.parametrize("op", ["logits_ppo_loss", "linear_ppo_loss"])
@pytest.mark.parametrize("options", WEIGHTED.values(), ids=WEIGHTED.keys())
def test_heads(
    backend: str, device: str, monkeypatch: pytest.MonkeyPatch, op: str, options: dict[str, Any]
) -> None:
    short_chunks(monkeypatch, backend)
    call = testing.HEADS[op](shape_for(backend, device), device=device, **options)
    testing.assert_agrees(call, backend)


@pytest.mark.parametrize("op", ["logits_ppo_loss", "linear_ppo_loss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_packed_heads(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, op: str) -> None:
    short_chunks(monkeypatch)
    options: dict[str, Any] = {"extras": EXTRAS, "kl_weight": "ratio", "dtype": dtype}
    for variant in ("clip", "gspo"):
        call = testing.HEADS[op]((45,), packed=True, variant=variant, **options)
        testing.assert_agrees(call, "cpu")


@pytest.mark.parametrize("op", ["logits_ppo_loss", "linear_ppo_loss"])
def test_a_nan_weight_of_an_empty_sequence_reaches_no_gradient(
    kernel: str, device: str, op: str
) -> None:
    """dW is a sum over all rows: 0·NaN must not be among its terms."""
    call = testing.HEADS[op]((2, 2), mask="row", device=device, extras=EXTRAS)
    keep = torch.tensor([[False, False], [True, True]], device=device)
    weights = torch.tensor([math.nan, 0.7], device=device)
    clean = run(call.replace(mask=keep, sequence_weights=torch.ones_like(weights) * 0.7), kernel)
    out = run(call.replace(mask=keep, sequence_weights=weights), kernel)
    assert all(same_bits(out[k], clean[k]) for k in clean)
