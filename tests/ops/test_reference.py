"""The reference, against independent spellings: scalar loops, torch.distributions, identities."""

from __future__ import annotations

import math
import statistics

import pytest
import spelled_out
import torch

import ppo_fast
from ppo_fast import testing
from ppo_fast._boundary.schema import REDUCTIONS, VARIANTS

F64 = {"dtype": torch.float64}
EXACT = 1e-12  # fp64 spellings of at most some thousand roundings of numbers near 1


def close(a: torch.Tensor, b: object) -> bool:
    return torch.allclose(a, torch.as_tensor(b, dtype=torch.float64), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_logprobs_are_a_categorical_distribution(temperature: float) -> None:
    call = testing.logprobs_call(mask=None, temperature=temperature, **F64)
    out = testing.run(call, "reference")
    z = call.tensors["logits"] / temperature
    spoken = torch.distributions.Categorical(logits=z)
    assert close(out["logprobs"], spoken.log_prob(call.tensors["tokens"]))
    assert close(out["entropy"], spoken.entropy())
    row = spelled_out.log_softmax(z[1, 2].tolist())
    assert close(out["logprobs"][1, 2], row[int(call.tensors["tokens"][1, 2])])
    assert close(out["entropy"][1, 2], -math.fsum(math.exp(p) * p for p in row))


def test_logprob_gradient_is_onehot_minus_probabilities() -> None:
    call = testing.logprobs_call(mask=None, temperature=2.0, **F64)
    grads = {
        k: torch.full_like(v, 1.0 if k == "logprobs" else 0.0) for k, v in call.cotangents.items()
    }
    grad = testing.run(call._replace(cotangents=grads), "reference")["grad_logits"]
    p = (call.tensors["logits"] / 2.0).softmax(-1)
    onehot = torch.nn.functional.one_hot(call.tensors["tokens"], p.shape[-1])
    assert close(grad, (onehot - p) / 2.0)


@pytest.mark.parametrize("masked", ["carry", "zero"])
@pytest.mark.parametrize(
    "extras",
    [
        (),
        ("bootstrap",),
        ("bootstrap", "terminated"),
        ("next_values", "terminated", "truncated"),
        ("bootstrap", "rho", "c"),
        ("next_values", "terminated", "truncated", "rho", "c"),
    ],
    ids="+".join,
)
def test_gae_is_the_explicit_sum(extras: tuple[str, ...], masked: str) -> None:
    call = testing.gae_call((5, 11), extras=extras, masked=masked, lam=0.9, **F64)
    out = testing.run(call, "reference")
    names = {"next_values": "following", "bootstrap": "last", "rewards": "rewards"}
    for b in range(5):
        row = {names.get(k, k): v[b].tolist() for k, v in call.tensors.items()}
        adv, ret = spelled_out.gae_row(**row, gamma=0.99, lam=0.9, masked=masked)
        assert close(out["advantages"][b], adv)
        assert close(out["returns"][b], ret)


@pytest.mark.case("N5")
def test_gae_with_lambda_one_is_monte_carlo() -> None:
    """A = G − V with G summed by hand, bootstrap not zero."""
    call = testing.gae_call((3, 12), mask=None, extras=("bootstrap",), lam=1.0, **F64)
    t = call.tensors
    gain = [
        math.fsum(0.99**k * float(r) for k, r in enumerate(row)) + 0.99 ** len(row) * float(last)
        for row, last in zip(t["rewards"], t["bootstrap"], strict=True)
    ]
    out = testing.run(call, "reference")
    assert close(out["returns"][:, 0], gain)
    assert close(out["advantages"][:, 0], torch.tensor(gain, **F64) - t["values"][:, 0])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_ppo_loss_is_the_scalar_loop(variant: str, reduction: str) -> None:
    call = testing.ppo_call(
        (5, 8),
        mask="row",
        variant=variant,
        reduction=reduction,
        extras=(),
        kl_coef=0.0,
        log_ratio_clamp=None,
        **F64,
    )
    t = call.tensors
    want = spelled_out.ppo_rows(
        t["logprobs"], t["old_logprobs"], t["advantages"], t["mask"], variant, reduction, 0.2, 0.28
    )
    got = float(testing.run(call, "reference")["loss"])
    assert math.isclose(got, want, rel_tol=1e-11, abs_tol=1e-12)


@pytest.mark.parametrize("clamp", [None, 0.6])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_kl_estimators(estimator: str, clamp: float | None) -> None:
    """The KL term is what two losses with and without it differ by."""
    options = {"kl_estimator": estimator, "kl_clamp": clamp, "kl_coef": 0.25}
    call = testing.ppo_call(
        (3, 7), extras=("ref_logprobs",), reduction="token-sum", **options, **F64
    )
    t = call.tensors
    gaps = (t["logprobs"] - t["ref_logprobs"])[t["mask"]].tolist()
    want = 0.25 * math.fsum(spelled_out.kl(x, estimator, clamp) for x in gaps)
    with_kl = testing.run(call, "reference")["loss"]
    without = testing.run(call.option(kl_coef=0.0), "reference")["loss"]
    assert math.isclose(float(with_kl - without), want, rel_tol=1e-9)


@pytest.mark.parametrize("form", ["max", "clipped", None])
def test_value_loss_is_the_scalar_loop(form: str | None) -> None:
    options = {"clip": None} if form is None else {"form": form}
    call = testing.value_call((4, 9), reduction="token-sum", **options, **F64)
    t = call.tensors
    rows = [
        t[k][t["mask"]].tolist() if k in t else None for k in ("values", "old_values", "returns")
    ]
    olds = rows[1] or rows[0]
    want = math.fsum(
        spelled_out.value_token(v, old, r, None if form is None else 0.2, form or "max")
        for v, old, r in zip(rows[0], olds, rows[2], strict=True)
    )
    assert math.isclose(float(testing.run(call, "reference")["loss"]), want, rel_tol=1e-12)


def test_whiten_is_the_standard_score() -> None:
    x = testing.whiten_call((50,), mask="random", **F64).tensors
    kept = x["x"][x["mask"]].tolist()
    mean = statistics.fmean(kept)
    spread = {True: statistics.variance(kept), False: statistics.pvariance(kept)}
    for unbiased, var in spread.items():
        out = ppo_fast.whiten(x["x"], x["mask"], unbiased=unbiased, backend="reference")
        assert close(out[x["mask"]], [(v - mean) / math.sqrt(var + 1e-8) for v in kept])
        out = ppo_fast.whiten(
            x["x"],
            x["mask"],
            unbiased=unbiased,
            eps_at="std",
            eps=1e-3,
            shift_mean=False,
            backend="reference",
        )
        assert close(out[x["mask"]], [(v - mean) / (math.sqrt(var) + 1e-3) + mean for v in kept])


@pytest.mark.parametrize("place", ["last-token", "first-pad", "per-token"])
def test_rlhf_advantages_are_gae_of_shaped_rewards(place: str) -> None:
    """Rewards by hand, advantages from the scalar sum over right-padded rows."""
    call = testing.rlhf_call((4, 7), score_at=place, lam=0.9, bootstrap=False, **F64)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1] * 7, [0] * 7, [1] + [0] * 6]).bool()
    t = call.replace(mask=mask).tensors
    out = testing.run(call.replace(mask=mask), "reference")
    for b, length in enumerate((3, 7, 0, 1)):
        kls = [float(t["logprobs"][b, i] - t["ref_logprobs"][b, i]) for i in range(length)]
        rewards = [-0.2 * k for k in kls] + [0.0] * (7 - length)
        slot = min(length, 6) if place == "first-pad" and 0 < length < 7 else length - 1
        if place == "per-token":
            rewards = [r + float(t["scores"][b, i]) * (i < length) for i, r in enumerate(rewards)]
        elif length:
            rewards[slot] += float(t["scores"][b])
        live = [i < length or (length > 0 and i == slot) for i in range(7)]
        adv, ret = spelled_out.gae_row(rewards, t["values"][b].tolist(), 0.99, 0.9, mask=live)
        assert close(out["rewards"][b], rewards)
        assert close(out["kl"][b, :length], kls)
        assert close(out["advantages"][b], [a * (i < length) for i, a in enumerate(adv)])
        assert close(out["returns"][b], ret)
