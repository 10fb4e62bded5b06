"""The internal variant `given` of the ppo_loss op: policy terms and their slopes as inputs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ppo_fast import Stats, testing
from ppo_fast._boundary import calls
from ppo_fast._boundary.options import TokenTensors
from ppo_fast._boundary.schema import KERNEL_VARIANTS, VARIANTS
from ppo_fast._results import STATS_FIELDS
from ppo_fast._sequences import Sequences
from ppo_fast.ops.loss_options import LossOptions
from ppo_fast.reference.common import keep_of, token_weights
from ppo_fast.testing import Call, ppo_call, promoted, run, same_bits
from ppo_fast.testing.budget import assert_within_budget
from ppo_fast.testing.loss_conditions import finite, ppo_condition

EXTRAS = ("entropy", "ref_logprobs", "sequence_weights")
DEFAULTS: dict[str, Any] = {
    "ratio_level": "token",
    "ratio_cap": None,
    "dual_clip": None,
    "log_ratio_clamp": 20.0,
    "entropy_coef": 0.0,
    "kl_coef": 0.0,
    "kl_estimator": "k3",
    "kl_clamp": 10.0,
    "kl_ratio_clip": None,
    "kl_weight": None,
    "denom": None,
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "row means": {"mask": "row", "reduction": "seq-mean-token-mean"},
    "left": {"mask": "left", "kl_weight": "ratio"},
    "no mask": {"mask": None, "kl_weight": "score", "kl_estimator": "k2"},
    "clamped": {"kl_weight": "ratio", "log_ratio_clamp": (-0.3, 0.2), "kl_clamp": 0.1},
    "bare": {"extras": (), "kl_coef": 0.0},
    "packed": {"packed": True, "kl_weight": "ratio", "reduction": "seq-mean-token-mean"},
    "packed sum": {"packed": True, "reduction": "token-sum", "kl_estimator": "abs"},
    "nothing": {"mask": "empty"},
}


def given(call: Call, value: Tensor, slope: Tensor, by_sequence: int, backend: str) -> Any:
    """(loss, stats, gradients) of the op, with moments that nothing may be whitened by."""
    t, given = call.tensors, DEFAULTS | {"variant": "clip"} | call.options
    moments = torch.tensor([97.0, 0.4, 390.0], dtype=torch.float64, device=value.device)
    ref, entropy, ends = (t.get(k) for k in ("ref_logprobs", "entropy", "cu_seqlens"))
    options = LossOptions(**{k: given[k] for k in LossOptions._fields}).checked(
        "ppo_loss", value, ends, has_ref=ref is not None, has_entropy=entropy is not None
    )
    options = options._replace(variant=KERNEL_VARIANTS.index("given"), by_sequence=by_sequence)
    loss, stats, scale, grads = calls.ppo_loss(
        backend,
        t["logprobs"],
        TokenTensors(t.get("old_logprobs"), slope, value, ref, moments),
        options,
        2,
        mask=t.get("mask"),
        entropy=entropy,
        cu_seqlens=ends,
        sequence_weights=t.get("sequence_weights"),
    )
    return loss, stats, grads * scale


def make(device: str, seed: int = 0, packed: bool = False, **options: Any) -> Call:
    options = {"extras": EXTRAS, "reduction": "token-mean"} | options
    shape = (45,) if packed else (4, 9)
    call = ppo_call(shape, packed=packed, seed=seed, device=device, **options)
    loss = {"loss": torch.ones((), device=device)}
    return call.replace(advantages=torch.zeros(shape, device=device))._replace(cotangents=loss)


def terms(call: Call, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Values and slopes, some of them 0 beside another that is not."""
    new, rng = call.tensors["logprobs"], torch.Generator().manual_seed(seed)
    value, slope = torch.randn((2, *new.shape), generator=rng).to(new.device)
    value.view(-1)[::5] = 0.0
    slope.view(-1)[1::5] = 0.0
    return value, slope


def assert_given(call: Call, by_sequence: int, backend: str, seed: int = 0) -> None:
    """The fp64 loss without advantages, plus Σ w·value / D and w·slope / D."""
    value, slope = terms(call, seed)
    loss, stats, grads = given(call, value, slope, by_sequence, backend)
    rest = promoted(call.option(variant="gspo" if by_sequence else "clip"))
    exact = run(rest, "reference")
    t = rest.tensors
    seqs = Sequences(keep_of(t["logprobs"], t.get("mask")), t.get("cu_seqlens"))
    reduction = call.options["reduction"]
    w = token_weights(seqs, reduction, torch.float64, t.get("sequence_weights"))
    # The sum of the terms, and D of the reference's own loss.
    own = float(Stats(exact["stats"]).field("loss_denom")) or 1.0
    size = ppo_condition(rest, exact, torch.finfo(torch.float32).eps)
    adds = 1 + math.sqrt(max(1, int(seqs.keep.sum()))) / 4
    total, magnitude = (w * value.double()).sum(), (w * value.double()).abs().sum() * adds
    added, more = torch.zeros_like(exact["stats"]), torch.zeros_like(exact["stats"])
    for name in ("loss", "policy_loss"):
        added[STATS_FIELDS.index(name)], more[STATS_FIELDS.index(name)] = total, magnitude
    want = {
        "loss": (loss, exact["loss"] + total / own, magnitude / own),
        "stats": (stats, exact["stats"] + added, more),
        "grad_logprobs": (
            grads[0],
            exact["grad_logprobs"] + w * slope.double() / own,
            w * slope.double().abs() / own,
        ),
    }
    if "entropy" in t:
        want["grad_entropy"] = (grads[1], exact["grad_entropy"], torch.zeros_like(w))
    for name, (got, number, extra) in want.items():
        ops, condition, _ = size[name]
        assert_within_budget(
            got,
            number,
            condition=finite(condition) + extra,
            ops=ops,
            compute=torch.float32,
            name=name,
        )


@pytest.mark.parametrize("by_sequence", [0, 1])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_within_budget(
    kernel: str, device: str, options: dict[str, Any], by_sequence: int
) -> None:
    for seed in range(2):
        assert_given(make(device, seed, **options), by_sequence, kernel, seed)


@pytest.mark.parametrize("by_sequence", [0, 1])
def test_without_old_logprobs(kernel: str, device: str, by_sequence: int) -> None:
    """The ratio is exactly 1."""
    call = make(device, kl_weight="ratio").replace(old_logprobs=None)
    value, slope = terms(call)
    _, stats, _ = given(call, value, slope, by_sequence, kernel)
    fields = Stats(stats)
    assert float(fields.field("ratio_min")) == float(fields.field("ratio_max")) == 1.0
    same = call.replace(old_logprobs=call.tensors["logprobs"])
    want = given(same, value, slope, by_sequence, kernel)
    got = given(call, value, slope, by_sequence, kernel)
    assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("by_sequence", [0, 1])
@pytest.mark.parametrize("packed", [False, True])
def test_masked_slots_may_hold_anything(
    kernel: str, device: str, packed: bool, by_sequence: int
) -> None:
    call = make(device, packed=packed, mask="random", kl_weight="ratio")
    value, slope = terms(call)

    def filled(x: float) -> tuple[Tensor, ...]:
        keep = call.tensors["mask"]
        spoilt = (torch.where(keep, v, x) for v in (value, slope))
        out: tuple[Tensor, ...] = given(
            testing.with_garbage(call, x), *spoilt, by_sequence, kernel
        )
        return out

    clean = filled(0.0)
    for garbage in (math.nan, math.inf, -math.inf):
        assert all(same_bits(a, b) for a, b in zip(filled(garbage), clean, strict=True))
    assert bool((clean[2][:, ~call.tensors["mask"]] == 0).all())


@pytest.mark.parametrize("which", [0, 1])
def test_a_nan_shows_where_it_stands(kernel: str, device: str, which: int) -> None:
    """In the value it reaches the loss, in the slope that token's gradient; nothing is idle."""
    call = make(device, mask=None)
    spoilt = terms(call)
    spoilt[which][1, 2] = math.nan
    loss, _, grads = given(call, *spoilt, 0, kernel)
    here = torch.zeros(4, 9, dtype=torch.bool, device=device)
    here[1, 2] = which == 1
    assert bool(loss.isnan()) == (which == 0) and torch.equal(grads[0].isnan(), here)


def test_no_clip_is_counted(kernel: str, device: str) -> None:
    """Of ratios on both sides of the bounds: `clip_eps` alone, which is the ratio's."""
    call = make(device, dual_clip=None)
    value, slope = terms(call)
    _, stats, _ = given(call, value, slope, 0, kernel)
    fields = {name: float(Stats(stats).field(name)) for name in STATS_FIELDS}
    assert fields["clip_low"] == fields["clip_high"] == fields["clip_dual"] == 0.0
    assert fields["clip_eps"] > 0.0


def test_the_variant_is_not_offered() -> None:
    call = ppo_call(variant="given")
    with pytest.raises(ValueError, match=r"variant must be one of clip, .*got 'given'"):
        run(call, None)
    assert KERNEL_VARIANTS[:-1] == VARIANTS


def test_the_one_pass_op_refuses_it(kernel: str, device: str) -> None:
    """Its slopes come from whole sequences, or from no formula of the kernels."""
    from one_pass_helpers import make as one_pass

    args = one_pass(device)
    options = args.options._replace(variant=KERNEL_VARIANTS.index("given"))
    with pytest.raises((RuntimeError, ValueError), match="gspo and given need whole sequences"):
        calls.logits_ppo_loss(
            kernel, args.logits, args.scoring(), args.per_token(), args.weights, options
        )
