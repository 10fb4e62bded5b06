"""optimal_token_baseline: verl's own function, a scalar loop, masks, groups, weights."""

from __future__ import annotations

import collections
import math
from typing import Any

import pytest
import torch
from installed import functions, source
from torch import Tensor

import ppo_fast
from ppo_fast import testing

EPS = torch.finfo(torch.float64).eps
NAN = math.nan
# Groups of 1, 2, 3 and 6 whose members are interleaved.
IDS = torch.tensor([5, -3, 5, 7, 7, -3, 9, 5, 7, 7, 7, 7])
ROWS, STEPS = len(IDS), 9


def verl() -> Any:
    name = "compute_optimal_token_baseline_advantage"
    tree = source("verl==0.9.1", "trainer/ppo/core_algos.py")
    return getattr(functions(tree, name, defaultdict=collections.defaultdict), name)


def batch(lengths: list[int] | None = None, vocab: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """Rewards, and log-probabilities and ln Σπ² of real distributions, ragged on the right."""
    rng = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(ROWS, STEPS, vocab, generator=rng, dtype=torch.float64)
    tokens = torch.randint(vocab, (ROWS, STEPS, 1), generator=rng)
    logp = logits.log_softmax(-1)
    ends = torch.tensor(lengths or torch.randint(1, STEPS + 1, (ROWS,), generator=rng).tolist())
    return {
        "rewards": torch.randn(ROWS, STEPS, generator=rng, dtype=torch.float64),
        "logprobs": logp.gather(-1, tokens)[..., 0],
        "log_sum_sq_probs": (2 * logp).logsumexp(-1),
        "group_ids": IDS,
        "mask": torch.arange(STEPS) < ends[:, None],
    }


def theirs(t: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    out: tuple[Tensor, Tensor] = verl()(
        t["rewards"],
        t["mask"].double(),
        t["group_ids"].tolist(),
        t["logprobs"],
        t["log_sum_sq_probs"].exp(),
        **options,
    )
    return out


def assert_equal(ours: Any, want: tuple[Tensor, Tensor], t: dict[str, Tensor]) -> None:
    """Sums of T rewards and of T·n weights of 0 to 2 in fp64, and their quotient."""
    keep = t["mask"]
    size = float(t["rewards"].abs().sum(1).max())
    for got, exact in zip(ours, want, strict=True):
        off = (got - exact)[keep].abs()
        assert bool((off <= 8 * STEPS * 6 * EPS * size).all()), float(off.max())
        assert not bool(got[~keep].any())


LENGTHS: dict[str, list[int] | None] = {
    "ragged": None,
    "one longest": [3, 2, 9, 1, 2, 8, 9, 5, 3, 4, 9, 4],
    "equal": [9] * 12,
    "empty ones": [0, 0, 9, 4, 0, 0, 0, 0, 2, 0, 0, 0],
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_verl(lengths: list[int] | None, weighted: bool) -> None:
    t = batch(lengths)
    weights = 0.5 + torch.rand(ROWS, STEPS, generator=torch.Generator().manual_seed(1)).double()
    ours = ppo_fast.optimal_token_baseline(**t, is_weights=weights if weighted else None)
    want = theirs(t, rollout_is_weights=weights if weighted else None)
    assert_equal(ours, want, t)
    assert ours.advantages.dtype == torch.float64 and bool(ours.advantages.any())


def looped(t: dict[str, Tensor], weights: Tensor) -> list[list[float]]:
    """The formula, a token at a time."""
    rewards, mask = t["rewards"].tolist(), t["mask"].tolist()
    pi, squares = t["logprobs"].exp().tolist(), t["log_sum_sq_probs"].exp().tolist()
    ids, scale = t["group_ids"].tolist(), weights.tolist()
    steps = range(STEPS)

    def gain(i: int, t: int) -> float:
        return math.fsum(rewards[i][u] for u in steps if u >= t and mask[i][u])

    def energy(i: int, t: int) -> float:
        return math.fsum(
            (1 - 2 * pi[i][u] + squares[i][u]) * scale[i][u] ** 2
            for u in steps
            if u <= t and mask[i][u]
        )

    out = [[0.0] * STEPS for _ in ids]
    for i, step in ((i, step) for i in range(ROWS) for step in steps if mask[i][step]):
        live = [j for j in range(ROWS) if ids[j] == ids[i] and mask[j][step]]
        weight = math.fsum(energy(j, step) for j in live) + 1e-8
        base = math.fsum(gain(j, step) * energy(j, step) for j in live) / weight
        out[i][step] = gain(i, step) - (base if len(live) > 1 else 0.0)
    return out


def test_the_formula_of_a_token_at_a_time() -> None:
    """Masks with holes, where verl counts columns: a step has the responses that are there."""
    t = batch(seed=4)
    t["mask"] = torch.rand(ROWS, STEPS, generator=torch.Generator().manual_seed(5)) < 0.6
    weights = 0.5 + torch.rand(ROWS, 1, generator=torch.Generator().manual_seed(2)).double()
    ours = ppo_fast.optimal_token_baseline(**t, is_weights=weights)
    want = torch.tensor(looped(t, weights.expand(ROWS, STEPS)), dtype=torch.float64)
    assert_equal(ours[:1], (want,), t)


def test_a_lone_response_has_no_baseline() -> None:
    """Nor has the end of the longest one: its advantage is what it still earns."""
    t = batch(LENGTHS["one longest"])
    out = ppo_fast.optimal_token_baseline(**t)
    assert torch.equal(out.advantages[6], out.returns[6])  # alone in group 9
    assert torch.equal(out.advantages[2, 5:], out.returns[2, 5:])  # the next one has 5 tokens
    assert bool((out.advantages[2, :5] != out.returns[2, :5]).all())


def test_certain_tokens_weigh_nothing() -> None:
    """π = 1 up to the rounding of fp32, where 1 − 2π + Σπ² has any sign: no baseline explodes."""
    t = batch([9] * 12)
    noise = torch.tensor([0.0, -6e-8, -1.2e-7, -3e-8] * 27).view(ROWS, STEPS)
    out = ppo_fast.optimal_token_baseline(
        t["rewards"].float(), noise, 1.7 * noise.flip(-1), IDS, t["mask"]
    )
    assert bool((out.advantages - out.returns).abs().max() <= out.returns.abs().max())


def test_the_weights_are_squared_norms() -> None:
    """w is the squared norm of the gradient of ln π by the logits, by autograd."""
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    logp = logits.log_softmax(-1)
    (slope,) = torch.autograd.grad(logp[..., 2].sum(), logits)
    w = slope.square().sum(-1).cumsum(-1)
    rewards = torch.randn(2, 3, dtype=torch.float64)
    gain = rewards.flip(-1).cumsum(-1).flip(-1)
    want = gain - (gain * w).sum(0) / (w.sum(0) + 1e-8)
    out = ppo_fast.optimal_token_baseline(
        rewards, logp[..., 2], (2 * logp).logsumexp(-1), torch.tensor([4, 4])
    )
    assert bool(((out.advantages - want).abs() <= 1e3 * EPS * (1 + want.abs())).all())
    assert not out.advantages.requires_grad and not out.returns.requires_grad


def test_masked_slots_reach_nothing_and_a_nan_stays_in_its_group() -> None:
    t = batch()
    want = ppo_fast.optimal_token_baseline(**t)
    names = ("rewards", "logprobs", "log_sum_sq_probs")
    dirty = t | {k: t[k].masked_fill(~t["mask"], NAN) for k in names}
    got = ppo_fast.optimal_token_baseline(**dirty, is_weights=torch.ones(ROWS, 1).double())
    assert all(testing.same_bits(a, b) for a, b in zip(got, want, strict=True))
    for name in names:
        bad = t[name].clone()
        bad[1, 0] = NAN
        out = ppo_fast.optimal_token_baseline(**(t | {name: bad})).advantages
        others = t["group_ids"] != -3
        assert testing.same_bits(out[others], want.advantages[others])
        assert bool(out[1, 0].isnan())


def test_no_mask_is_a_mask_of_ones_and_order_is_free() -> None:
    t = batch([9] * 12)
    want = ppo_fast.optimal_token_baseline(**t)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))
    some = {k: x[order] for k, x in t.items() if k != "mask"}
    got = ppo_fast.optimal_token_baseline(**some)
    assert bool(((got.advantages - want.advantages[order]).abs() <= 1e-13).all())
    flags = ppo_fast.optimal_token_baseline(**(t | {"mask": t["mask"].float() * 2}))
    assert all(testing.same_bits(a, b) for a, b in zip(flags, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_precisions(dtype: torch.dtype) -> None:
    """Computed in fp64 of the rounded inputs, and rounded once to fp32."""
    t = {k: x.to(dtype) if x.is_floating_point() else x for k, x in batch().items()}
    out = ppo_fast.optimal_token_baseline(**t)
    wide = {k: x.double() if x.is_floating_point() else x for k, x in t.items()}
    want = ppo_fast.optimal_token_baseline(**wide)
    for got, exact in zip(out, want, strict=True):
        assert got.dtype == torch.float32 and torch.equal(got, exact.float())


def test_no_rows_and_no_steps() -> None:
    for shape in ((0, 4), (3, 0)):
        x = torch.zeros(shape)
        out = ppo_fast.optimal_token_baseline(x, x, x, torch.zeros(shape[0], dtype=torch.int32))
        assert out.advantages.shape == out.returns.shape == shape


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_from_a_fused_head(backend: str) -> None:
    """The head's own ln Σπ², its logits never whole, which verl refuses with fused kernels."""
    call = testing.token_stats_call((ROWS, STEPS), 50, 16, mask="right", ignored=False)
    if backend == "triton":
        call = testing.token_stats_call((ROWS, STEPS), 5, 4, mask="right", ignored=False)
    stats = testing.run(call, backend)
    exact = testing.run(testing.promoted(call), "reference")
    rewards = batch()["rewards"]
    names = ("logprobs", "log_sum_sq_probs")
    ours = ppo_fast.optimal_token_baseline(
        rewards.float(), *(stats[k] for k in names), IDS, call.tensors["mask"]
    )
    t = {"rewards": rewards.float().double(), "group_ids": IDS, "mask": call.tensors["mask"]}
    want = theirs(t | {k: exact[k] for k in names})
    # ∂B/∂w is bounded by |G| T / ΣW, and π and Σπ² are off by their logarithms' errors.
    keep = t["mask"]
    w = 1 - 2 * exact["logprobs"].exp() + exact["log_sum_sq_probs"].exp()
    least = float(w[keep].min())
    error = max(float((stats[k] - exact[k])[keep].abs().max()) for k in names)
    size = float(want[1].abs().max())
    bound = 2 * size * 4 * STEPS * error / least + 4 * torch.finfo(torch.float32).eps * size
    assert bool(((ours.advantages - want[0])[keep].abs() <= bound).all())
    assert error > 0 and least > 0


def test_bad_input_is_named() -> None:
    t = batch()
    op = ppo_fast.optimal_token_baseline
    with pytest.raises(ValueError, match=r"rewards must have shape \(B, T\), got \(9,\)"):
        op(**(t | {"rewards": t["rewards"][0]}))
    with pytest.raises(ValueError, match=r"logprobs must have shape .*got \(12, 8\)"):
        op(**(t | {"logprobs": t["logprobs"][:, 1:]}))
    with pytest.raises(TypeError, match=r"logprobs must not mix float64.*got torch.float32"):
        op(**(t | {"logprobs": t["logprobs"].float()}))
    for name in ("logprobs", "log_sum_sq_probs"):
        with pytest.raises(TypeError, match=rf"{name} must be a tensor, got NoneType"):
            op(**(t | {name: None}))
    with pytest.raises(ValueError, match=r"group_ids must have shape .*12.*, got \(11,\)"):
        op(**(t | {"group_ids": IDS[1:]}))
    with pytest.raises(TypeError, match=r"group_ids must be int32 or int64, got torch\.float32"):
        op(**(t | {"group_ids": IDS.float()}))
    with pytest.raises(ValueError, match=r"mask must have shape .*got \(12, 1\)"):
        op(**(t | {"mask": t["mask"][:, :1]}))
    with pytest.raises(ValueError, match=r"is_weights must have shape .*got \(12, 2\)"):
        op(**t, is_weights=torch.ones(ROWS, 2).double())
    with pytest.raises(TypeError, match="is_weights must not mix float64"):
        op(**t, is_weights=torch.ones(ROWS, 1))
