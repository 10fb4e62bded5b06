"""Corrections' errors, normalisation, statistics that merge, and the off-policy mask."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import ppo_fast
from ppo_fast import Correction, RolloutStats
from ppo_fast._results import ROLLOUT_FIELDS

OLD = -torch.rand(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
ROLLOUT = OLD - 0.2 * torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).double()
MASK = torch.arange(6) < torch.tensor([[6], [3], [0], [5]])
ANY = Correction("token", high=2.0)

REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("level must be one of None, token, sequence, geometric, got 'turn'", {"level": "turn"}),
    ("form must be one of truncate, mask, got 'clip'", {"form": "clip"}),
    ("ratio must be one of old, current, got 'new'", {"ratio": "new"}),
    ("drops must be one of policy, all, got 'kl'", {"drops": "kl"}),
    ("count must be one of all, kept, got 'some'", {"count": "some"}),
    ("low or high must be given with level 'token', got None", {"high": None}),
    ("low and high must be None with level None, got None, 2.0", {"level": None}),
    (r"low and high must be 0 <= low <= high, got \(3.0, 2.0\)", {"low": 3}),
    (r"low and high must be 0 <= low <= high, got \(-1.0, 2.0\)", {"low": -1.0}),
    ("high must be a number, got nan", {"high": math.nan}),
    ("low must be a number, got True", {"low": True}),
    ("high must be a number, got '2'", {"high": "2"}),
    ("reject must be given with level None, got nothing", {"level": None, "high": None}),
    ("reject must be a mapping of statistics to bounds, got 5", {"reject": 5}),
    ("reject must be a mapping of statistics to bounds, got 'k1'", {"reject": "k1"}),
    (r"reject's keys must be <token\|seq-sum.*>-<ratio\|k1\|k2\|k3>, got 'k1'", {"k1": 2.0}),
    ("reject's keys must be .*, got 'turn-k1'", {"turn-k1": 2.0}),
    ("reject's keys must be .*, got 'token-k4'", {"token-k4": 2.0}),
    (r"reject\['token-k3'\] must be at least 0, got -1.0", {"token-k3": -1.0}),
    (r"reject\['token-k2'\] must be a number, got \(1, 2\)", {"token-k2": (1, 2)}),
    (r"reject\['token-ratio'\] must be \(low, high\), got 2.0", {"token-ratio": 2.0}),
    (
        r"reject\['token-ratio'\] must be 0 <= low <= high > 0, got \(2, 1\)",
        {"token-ratio": (2, 1)},
    ),
    (
        r"reject\['token-ratio'\] must be 0 <= low <= high > 0, got \(0, 0\)",
        {"token-ratio": (0, 0)},
    ),
    (r"reject\['seq-sum-k1'\] must be at least 1 or \(low, high\), got 0.5", {"seq-sum-k1": 0.5}),
    (r"reject\['seq-sum-k1'\] must be \(low, high\), got \(1,\)", {"seq-sum-k1": (1,)}),
]


@pytest.mark.parametrize("words, change", REFUSED, ids=[row[0][:50] for row in REFUSED])
def test_corrections_that_do_not_fit(words: str, change: dict[str, Any]) -> None:
    (name,) = list(change)[:1]
    if name not in Correction.__dataclass_fields__:
        change = {"reject": change}
    with pytest.raises(ValueError, match=f"^Correction: {words}"):
        Correction(**{"level": "token", "high": 2.0, **change})


def test_a_correction_is_a_value() -> None:
    """Equal, hashed and pickled by what was given, whatever the order of its rejections."""
    keys = {"token-k1": [0.5, 2], "seq-max-k3": 1.0}
    a, b = (
        Correction("token", high=2.0, reject=dict(x))
        for x in (keys.items(), [*keys.items()][::-1])
    )
    assert a == b and hash(a) == hash(b) and a == pickle.loads(pickle.dumps(a))
    assert a.reject == (("seq-max-k3", 1.0), ("token-k1", (0.5, 2)))
    assert a == Correction("token", high=2.0, reject=a.reject)
    assert a.needs_sequences() and not ANY.needs_sequences()


FLAT = {"old_logprobs": OLD[0], "rollout_logprobs": OLD[0], "mask": None}
SHAPE = r"must have shape \(B, T\) = \(4, 6\), got"
BAD_CALLS: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "old_logprobs must be a tensor, got list", {"old_logprobs": [1.0]}),
    (TypeError, "old_logprobs must be float32, .*, got torch.int64", {"old_logprobs": OLD.long()}),
    (
        ValueError,
        r"old_logprobs must have shape \(B, T\) or \(N,\), got \(1, 4, 6\)",
        {"old_logprobs": OLD[None]},
    ),
    (ValueError, rf"rollout_logprobs {SHAPE} \(4, 5\)", {"rollout_logprobs": ROLLOUT[:, 1:]}),
    (TypeError, "rollout_logprobs must not mix float64", {"rollout_logprobs": ROLLOUT.float()}),
    (
        ValueError,
        "rollout_logprobs must be on cpu, got meta",
        {"rollout_logprobs": ROLLOUT.to("meta")},
    ),
    (ValueError, rf"mask {SHAPE} \(4,\)", {"mask": MASK[:, 0]}),
    (TypeError, "correction must be a ppo_fast.Correction, got dict", {"correction": {}}),
    (ValueError, "backend must be one of reference, cpu, triton, cuda, got 'x'", {"backend": "x"}),
    (
        ValueError,
        "cu_seqlens must be given for flat inputs with correction .*, got None",
        {**FLAT, "correction": Correction("sequence", high=2.0)},
    ),
    (
        ValueError,
        r"cu_seqlens must rise from 0 to N = 6, got \[0, 5\]",
        {**FLAT, "cu_seqlens": torch.tensor([0, 5])},
    ),
]


@pytest.mark.parametrize("kind, words, change", BAD_CALLS, ids=[r[1][:40] for r in BAD_CALLS])
def test_calls_that_do_not_fit(kind: type[Exception], words: str, change: dict[str, Any]) -> None:
    given = {"old_logprobs": OLD, "rollout_logprobs": ROLLOUT, "mask": MASK, "correction": ANY}
    with pytest.raises(kind, match=f"^rollout_weights: {words}"):
        ppo_fast.rollout_weights(**(given | change))


def test_a_backend_without_the_op_is_refused_by_name() -> None:
    if ppo_fast.backends()["triton"] is not None:
        pytest.skip("Triton is not usable here")
    with pytest.raises(ValueError, match="backend must be one of reference, cpu, got 'triton'"):
        ppo_fast.rollout_weights(OLD.float(), ROLLOUT.float(), correction=ANY, backend="triton")


def test_the_results_are_constants() -> None:
    old, rollout = OLD.clone().requires_grad_(), ROLLOUT.clone().requires_grad_()
    for backend in ("cpu", "reference"):
        out = ppo_fast.rollout_weights(old, rollout, correction=ANY, backend=backend)
        assert not out.weights.requires_grad and not out.stats.values.requires_grad


@pytest.mark.parametrize("level", ["token", "sequence", "geometric", None])
def test_normalised_weights_have_the_mean_1(level: str | None) -> None:
    """Over tokens, or over sequences that have one; the statistics are of the weights before."""
    c = None if level is None else Correction(level, high=1.3)
    plain = ppo_fast.rollout_weights(OLD, ROLLOUT, MASK, correction=c)
    out = ppo_fast.rollout_weights(OLD, ROLLOUT, MASK, correction=c, normalize=True)
    assert torch.equal(out.stats.values, plain.stats.values) and torch.equal(out.mask, plain.mask)
    if level in ("token", None):
        mean = plain.weights[MASK].mean()
    else:
        mean = plain.weights[[0, 1, 3], 0].mean()
    # Two sums of at most 18 terms and a division.
    torch.testing.assert_close(out.weights * mean, plain.weights, rtol=20 * 2**-52, atol=0)
    assert (level is None) == (abs(float(mean) - 1) < 1e-6)


def test_weights_without_a_mean_are_not_divided() -> None:
    zero = Correction("token", "mask", 5.0, 6.0)
    out = ppo_fast.rollout_weights(OLD, ROLLOUT, MASK, correction=zero, normalize=True)
    assert not out.weights.any()
    nothing = ppo_fast.rollout_weights(
        OLD, ROLLOUT, torch.zeros_like(MASK), correction=ANY, normalize=True
    )
    assert not nothing.weights.any() and not nothing.mask.any()
    computed = nothing.stats.compute()
    assert math.isnan(computed["weight_mean"]) and math.isnan(computed["weight_min"])
    assert computed["n_tokens"] == computed["n_seqs"] == computed["missing"] == 0.0


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_statistics_of_parts_add_up(backend: str) -> None:
    """Micro-batches of rows give the whole batch's sums, and its extremes."""
    c = Correction("token", low=0.9, high=1.1, reject={"seq-max-k2": 0.02})
    whole, top, rest = (
        ppo_fast.rollout_weights(OLD[s], ROLLOUT[s], MASK[s], correction=c, backend=backend).stats
        for s in (slice(None), slice(0, 1), slice(1, None))
    )
    # Sums of 14 terms, and of at most 14 once more.
    torch.testing.assert_close((top + rest).values, whole.values, rtol=28 * 2**-52, atol=1e-300)
    assert (top + rest).field("weight_min") == whole.field("weight_min")
    assert float(whole.field("seqs")) == 3 and float(whole.field("tokens")) == int(MASK.sum())


def test_compute_divides() -> None:
    """Two tokens of one sequence: weights 1 and 3, ratios e^0 and e^1."""
    s = dict.fromkeys(ROLLOUT_FIELDS, 0.0)
    s |= {"tokens": 2, "missing": 1, "rejected": 1, "weight": 4, "weight_sq": 10, "below": 1}
    s |= {"above": 2, "k1": -1, "k3": 0.5, "ratio_sq": 8, "seqs": 4, "rejected_seqs": 1}
    s |= {"seq_ratio_sq": 12, "log_ppl": 6, "rollout_log_ppl": 4, "ppl": 8, "rollout_ppl": 4}
    s |= {"ppl_ratio": 2, "weight_min": 1, "weight_max": 3}
    stats = RolloutStats(torch.tensor(list(s.values()), dtype=torch.float64))
    assert stats.compute() == {
        "weight_mean": 2.0,
        "weight_std": 1.0,
        "weight_min": 1.0,
        "weight_max": 3.0,
        "ess": 0.8,
        "frac_low": 0.5,
        "frac_high": 1.0,
        "rejected_frac": 0.5,
        "seq_rejected_frac": 0.25,
        "kl": -0.5,
        "k3_kl": 0.25,
        "chi2_token": 3.0,
        "chi2_seq": 2.0,
        "ppl": 2.0,
        "rollout_ppl": 1.0,
        "ppl_ratio": 0.5,
        "log_ppl_diff": 0.5,
        "missing": 1,
        "n_tokens": 2,
        "n_seqs": 4,
    }


def test_under_compile() -> None:
    """One graph, with the same bits, for a correction and for none."""
    if ppo_fast.backends()["cpu"] is not None:
        pytest.skip("backend 'cpu' is not usable here")
    for c in (Correction("sequence", high=1.1, reject={"token-k1": 1.3}), None):

        def f(old: Tensor, rollout: Tensor, mask: Tensor, c: Correction | None = c) -> Any:
            return ppo_fast.rollout_weights(old, rollout, mask, correction=c)

        args = (OLD.float(), ROLLOUT.float(), MASK)
        got, want = torch.compile(f, fullgraph=True, backend="aot_eager")(*args), f(*args)
        assert torch.equal(got.weights, want.weights) and torch.equal(got.mask, want.mask)
        assert torch.equal(got.stats.values, want.stats.values)


def dropped(logprobs: Any, rollout: Any, advantages: Any, mask: Any, delta: float) -> Tensor:
    """DeepSeek-V3.2's rule, sequence by sequence."""
    out = []
    for now, then, a, m in zip(logprobs, rollout, advantages, mask, strict=True):
        gaps = [y - x for x, y, k in zip(now, then, m, strict=True) if k]
        gaps = [0.0 if math.isnan(gap) else gap for gap in gaps]
        far = sum(gaps) / max(len(gaps), 1) > delta
        out.append([0.0 if x < 0 and far else 1.0 for x in a])
    return torch.tensor(out, dtype=torch.float64)


def test_off_policy_mask() -> None:
    """Rows of advantages, one advantage a row, packed sequences; a missing token is no gap."""
    rollout = ROLLOUT.clone()
    rollout[0, 0] = math.nan
    rollout[3] = OLD[3] + 0.5
    rollout[:, -1] = OLD[:, -1] + 9.0  # masked in rows 1 to 3
    advantages = torch.tensor([[-1.0], [-1.0], [-1.0], [-2.0]]).double()
    every = torch.where(torch.arange(6) % 2 == 0, advantages, 1.0)
    for a in (advantages, every):
        want = dropped(OLD.tolist(), rollout.tolist(), a.tolist(), MASK.tolist(), 0.3)
        got = ppo_fast.off_policy_mask(OLD, rollout, a, MASK, delta=0.3)
        assert torch.equal(got, want) and got.dtype == torch.float64
    assert 0 < int((want == 0).sum()) < want.numel()
    cu = torch.arange(0, 25, 6)
    flat = (x.flatten() for x in (OLD, rollout, every, MASK))
    packed = ppo_fast.off_policy_mask(*flat, delta=0.3, cu_seqlens=cu)
    assert torch.equal(packed, want.flatten())
    at_the_bound = ppo_fast.off_policy_mask(
        OLD[:1] * 0, OLD[:1] * 0 + 0.25, -OLD[:1].abs(), delta=0.25
    )
    assert bool((at_the_bound == 1).all())


BAD_MASKS: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "advantages must be a tensor, got float", {"advantages": 1.0}),
    (ValueError, rf"advantages {SHAPE} \(4,\)", {"advantages": OLD[:, 0]}),
    (TypeError, "advantages must be float32, .* got torch.int64", {"advantages": MASK.long()}),
    (TypeError, "advantages must not mix float64", {"advantages": OLD[:, :1].float()}),
    (ValueError, rf"rollout_logprobs {SHAPE} \(2, 6\)", {"rollout_logprobs": OLD[:2]}),
    (TypeError, "delta must be a number, got str", {"delta": "0.1"}),
    (ValueError, r"delta must be in \[-inf, inf\], got nan", {"delta": math.nan}),
    (
        ValueError,
        "cu_seqlens must be given for flat inputs with off_policy_mask, got None",
        {"logprobs": OLD[0], "rollout_logprobs": OLD[0], "advantages": OLD[0]},
    ),
]


@pytest.mark.parametrize("kind, words, change", BAD_MASKS, ids=[r[1][:40] for r in BAD_MASKS])
def test_off_policy_masks_that_do_not_fit(
    kind: type[Exception], words: str, change: dict[str, Any]
) -> None:
    given: dict[str, Any] = {
        "logprobs": OLD,
        "rollout_logprobs": ROLLOUT,
        "advantages": OLD,
        "delta": 0.1,
    }
    with pytest.raises(kind, match=f"^off_policy_mask: {words}"):
        ppo_fast.off_policy_mask(**(given | change))
