"""Stats and Moments: fields, merging, micro-batches with one denominator."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import ppo_fast
from ppo_fast import Moments, Stats, testing
from ppo_fast._boundary.schema import REDUCTIONS, VARIANTS
from ppo_fast._results import STATS_FIELDS
from ppo_fast.testing import ppo_call, run, value_call


def merged(parts: list[torch.Tensor]) -> Stats:
    total = Stats(parts[0])
    for part in parts[1:]:
        total = total + Stats(part)
    return total


@pytest.mark.parametrize("reduction", [r for r in REDUCTIONS if r != "seq-mean-token-sum-norm"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_micro_batches_merge(backend: str, device: str, variant: str, reduction: str) -> None:
    """Rows in three calls give the statistics of one call, to the rounding of the sums."""
    call = ppo_call((6, 9), mask="row", variant=variant, reduction=reduction, device=device)
    parts = [testing.with_rows(call, torch.arange(i, i + 2, device=device)) for i in (0, 2, 4)]
    want = Stats(run(call, backend)["stats"]).compute()
    got = merged([run(part, backend)["stats"] for part in parts]).compute()
    for name, x in want.items():
        assert got[name] == pytest.approx(x, rel=1e-4, abs=1e-4, nan_ok=True), name


@pytest.mark.parametrize("op", ["ppo_loss", "value_loss"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_denom_adds_micro_batches_up(backend: str, device: str, op: str, reduction: str) -> None:
    """`denom` is the whole batch's D: losses and gradients of the parts are the whole's."""
    call = testing.FACTORIES[op]((6, 9), mask="row", reduction=reduction, device=device)
    keep = call.tensors["mask"]
    rows = float(keep.any(-1).sum())
    whole = {"token-mean": float(keep.sum()), "token-sum": 1.0}.get(reduction, rows)
    whole = whole * 9 if reduction.endswith("norm") else whole
    parts = [
        run(
            testing.with_rows(call, torch.arange(i, i + 2, device=device)).option(denom=whole),
            backend,
        )
        for i in (0, 2, 4)
    ]
    want = run(call, backend)
    total = sum(float(part["loss"]) for part in parts)
    assert total == pytest.approx(float(want["loss"]), rel=1e-5)
    grads = [name for name in want if name.startswith("grad_")]
    for name in grads:
        assert torch.allclose(torch.cat([p[name] for p in parts]), want[name], rtol=1e-6), name


@pytest.mark.parametrize("op", ["ppo_loss", "value_loss"])
def test_denom_leaves_the_statistics(backend: str, device: str, op: str) -> None:
    call = testing.FACTORIES[op](device=device)
    for reduction in REDUCTIONS:
        a = run(call.option(reduction=reduction), backend)["stats"]
        b = run(call.option(reduction=reduction, denom=123.0), backend)["stats"]
        assert testing.same_bits(a, b)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_computed_loss_is_the_loss(backend: str, device: str, reduction: str) -> None:
    out = run(ppo_call(reduction=reduction, device=device), backend)
    got = Stats(out["stats"]).compute()["loss"]
    assert got == pytest.approx(float(out["loss"]), rel=1e-5)
    out = run(value_call(reduction=reduction, device=device), backend)
    got = Stats(out["stats"]).compute()["value_loss"]
    assert got == pytest.approx(float(out["loss"]), rel=1e-5)


def test_policy_and_value_losses_merge(backend: str, device: str) -> None:
    """Each op leaves the other's fields neutral, so one `+` joins both."""
    policy, value = run(ppo_call(device=device), backend), run(value_call(device=device), backend)
    both = (Stats(policy["stats"]) + Stats(value["stats"])).compute()
    alone = Stats(policy["stats"]).compute()
    critic = Stats(value["stats"]).compute()
    shared = ("value_loss", "vf_clip_frac", "explained_variance")
    for name, x in both.items():
        assert x == pytest.approx((critic if name in shared else alone)[name], nan_ok=True), name


def test_every_field_by_hand(backend: str, device: str) -> None:
    """Ratios e^0.5, e^-0.5, 1 and 1.1 of four tokens in two sequences, A = 1."""
    d = torch.tensor([[0.5, -0.5], [0.0, math.log(1.1)]], device=device)
    new = torch.full((2, 2), -1.0, device=device)
    out = ppo_fast.ppo_loss(
        new,
        new - d,
        torch.ones(2, 2, device=device),
        entropy=torch.full((2, 2), 0.7, device=device),
        ref_logprobs=new - 1,
        kl_estimator="k1",
        backend=backend,
    )
    gaps = [0.5, -0.5, 0.0, math.log(1.1)]
    ratios = [math.exp(x) for x in gaps]
    want = {
        "policy_loss": -(1.2 + ratios[1] + 1.0 + 1.1) / 4,
        "loss": -(1.2 + ratios[1] + 1.0 + 1.1) / 4,
        "value_loss": 0.0,
        "entropy": 0.7,
        "ref_kl": 1.0,
        "divergence": 0.0,
        "z_loss": 0.0,
        "kl_k1": -sum(gaps) / 4,
        "kl_k2": sum(x * x for x in gaps) / 8,
        "kl_k3": sum(math.expm1(x) - x for x in gaps) / 4,
        "ratio_mean": sum(ratios) / 4,
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "ess": sum(ratios) ** 2 / (4 * sum(r * r for r in ratios)),
        "clip_frac": 0.25,
        "clip_frac_eps": 0.5,
        "clip_frac_low": 0.0,
        "clip_frac_high": 0.25,
        "clip_frac_dual": 0.0,
        "vf_clip_frac": math.nan,
        "explained_variance": math.nan,
        "rollout_weight_mean": math.nan,
        "rollout_ess": math.nan,
        "rollout_k3": math.nan,
        "rollout_rejected_frac": math.nan,
        "rollout_missing": 0.0,
        "n_tokens": 4.0,
        "n_seqs": 2.0,
    }
    got = out.stats.compute()
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert got[name] == pytest.approx(x, rel=1e-6, abs=1e-7, nan_ok=True), name


def test_stats_of_nothing(backend: str, device: str) -> None:
    out = Stats(run(ppo_call(mask="empty", device=device), backend)["stats"])
    assert out.field("ratio_min").item() == math.inf and out.field("ratio_max").item() == -math.inf
    got = out.compute()
    assert got["loss"] == 0.0 and got["n_tokens"] == 0.0 and math.isnan(got["ratio_mean"])
    assert math.isnan(got["ratio_min"])
    full = Stats(run(ppo_call(device=device), backend)["stats"])
    assert testing.same_bits((out + full).values, full.values)


def test_ratio_extremes_merge_as_extremes() -> None:
    values = torch.zeros(len(STATS_FIELDS), dtype=torch.float64)
    low, high = values.clone(), values.clone()
    low[-2:] = torch.tensor([0.5, 0.9], dtype=torch.float64)
    high[-2:] = torch.tensor([0.7, 1.4], dtype=torch.float64)
    assert (Stats(low) + Stats(high)).values[-2:].tolist() == [0.5, 1.4]


def test_rollout_fields_by_hand() -> None:
    """Weights 0.5, 1 and 2 of four tokens, one of them rejected."""
    fields = {"rollout_tokens": 4.0, "rollout_weight": 3.5, "rollout_weight_sq": 5.25}
    fields |= {"rollout_k3": 0.6, "rollout_rejected": 1.0, "rollout_missing": 2.0}
    values = torch.zeros(len(STATS_FIELDS), dtype=torch.float64)
    for name, x in fields.items():
        values[STATS_FIELDS.index(name)] = x
    got = (Stats(values) + Stats(values)).compute()
    assert got["rollout_weight_mean"] == 0.875
    assert got["rollout_ess"] == pytest.approx(3.5**2 / (4 * 5.25), rel=1e-15)
    assert got["rollout_k3"] == pytest.approx(0.15, rel=1e-15)
    assert got["rollout_rejected_frac"] == 0.25 and got["rollout_missing"] == 4.0


@pytest.mark.parametrize("cuts", [(0,), (1,), (7,), (3, 20), (0, 0, 50)])
def test_moments_merge(cuts: tuple[int, ...]) -> None:
    x = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1e3
    edges = [0, *cuts, 50]
    total = Moments(torch.zeros(3, dtype=torch.float64))
    for a, b in itertools.pairwise(edges):
        part = x[a:b]
        n = float(b - a)
        mean = float(part.mean()) if n else 0.0
        m2 = float((part - mean).square().sum())
        total = total + Moments(torch.tensor([n, mean, m2], dtype=torch.float64))
    n, mean, m2 = total.values.tolist()
    assert n == 50 and mean == pytest.approx(float(x.mean()), rel=1e-13)
    assert m2 == pytest.approx(float(x.var() * 49), rel=1e-10)


def test_stats_are_float64_and_not_differentiable(backend: str, device: str) -> None:
    call = ppo_call(device=device)
    leaf = call.tensors["logprobs"].clone().requires_grad_()
    out = ppo_fast.ppo_loss(**call.replace(logprobs=leaf).tensors, **call.options, backend=backend)
    assert out.stats.values.dtype == torch.float64 and not out.stats.values.requires_grad
    assert out.stats.values.shape == (len(STATS_FIELDS),) and out.loss.requires_grad


def test_a_ratio_that_is_nan_shows(backend: str, device: str) -> None:
    """Among many tokens, wherever it stands: in the extremes as in the mean."""
    call = ppo_call((2, 40), mask="all", device=device)._replace(cotangents={})
    for at in (0, 17, 79):
        old = call.tensors["old_logprobs"].clone()
        old.view(-1)[at] = math.nan
        got = Stats(run(call.replace(old_logprobs=old), backend)["stats"]).compute()
        assert all(math.isnan(got[name]) for name in ("ratio_mean", "ratio_min", "ratio_max"))
