"""Group advantages against their formulae, spelled out group by group."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

import ppo_fast

ON_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_CUDA)])
BASELINES = ("grpo", "rloo", "reinforce++", "dr_grpo")


def spelled_out(scores: list[float], ids: list[int], baseline: str) -> list[float]:
    centred = []
    for s, i in zip(scores, ids, strict=True):
        mine = [t for t, j in zip(scores, ids, strict=True) if j == i]
        if len(mine) < 2 or min(mine) == max(mine):
            centred.append(0.0)
        elif baseline == "rloo":
            centred.append(s - (math.fsum(mine) - s) / (len(mine) - 1))
        elif baseline == "grpo":
            centred.append((s - statistics.fmean(mine)) / (statistics.stdev(mine) + 1e-6))
        else:
            centred.append(s - statistics.fmean(mine))
    if baseline != "reinforce++":
        return centred
    mean, variance = statistics.fmean(centred), statistics.variance(centred)
    return [(x - mean) / math.sqrt(variance + 1e-8) for x in centred]


@on_devices
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_formulae(device: str, baseline: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(40, generator=generator).to(dtype)
    ids = torch.randint(-3, 9, (40,), generator=generator)
    out = ppo_fast.group_advantages(scores.to(device), ids.to(device), baseline=baseline)
    want = spelled_out(scores.double().tolist(), ids.tolist(), baseline)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # fp64 sums of 40 terms, then one rounding to the result's type.
    share = 1e-13 if dtype == torch.float64 else torch.finfo(torch.float32).eps
    torch.testing.assert_close(
        out.cpu().double(), torch.tensor(want, dtype=torch.float64), rtol=share, atol=share
    )


@on_devices
@pytest.mark.parametrize("baseline", BASELINES)
def test_lone_and_equal_scores_teach_nothing(device: str, baseline: str) -> None:
    # 0.1 three times: its fp64 mean is not exactly 0.1 by every order of summation.
    scores = torch.tensor([0.1, 5.0, 0.1, 0.1], device=device)
    out = ppo_fast.group_advantages(
        scores, torch.tensor([2, 7, 2, 2], device=device), baseline=baseline
    )
    assert out.tolist() == [0.0] * 4


@on_devices
@pytest.mark.parametrize("baseline", BASELINES)
def test_no_responses_and_one(device: str, baseline: str) -> None:
    for n in (0, 1):
        ids = torch.zeros(n, dtype=torch.int32, device=device)
        out = ppo_fast.group_advantages(torch.ones(n, device=device), ids, baseline=baseline)
        assert out.tolist() == [0.0] * n


@on_devices
@pytest.mark.parametrize("baseline", BASELINES)
def test_groups_may_be_interleaved_and_carry_any_label(device: str, baseline: str) -> None:
    scores = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0], device=device)
    ids = torch.tensor([0, 0, 0, 1, 1, 1], device=device)
    order = torch.tensor([3, 0, 4, 1, 5, 2], device=device)
    plain = ppo_fast.group_advantages(scores, ids, baseline=baseline)
    mixed = ppo_fast.group_advantages(scores[order], ids[order] * -(10**9), baseline=baseline)
    torch.testing.assert_close(mixed, plain[order], rtol=1e-6, atol=0)
    assert bool((plain != 0).all())


def test_scores_are_constants() -> None:
    scores = torch.randn(6, requires_grad=True)
    assert not ppo_fast.group_advantages(scores, torch.tensor([0, 0, 0, 1, 1, 1])).requires_grad


def test_bad_input_is_named() -> None:
    scores, ids = torch.ones(4), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"scores must have shape \(n,\), got \(2, 2\)"):
        ppo_fast.group_advantages(scores.view(2, 2), ids)
    with pytest.raises(ValueError, match=r"group_ids must have shape .*4.*, got \(3,\)"):
        ppo_fast.group_advantages(scores, ids[:3])
    with pytest.raises(TypeError, match=r"group_ids must be int32 or int64, got torch.float32"):
        ppo_fast.group_advantages(scores, scores)
    with pytest.raises(TypeError, match=r"scores must be float32.*got torch.int64"):
        ppo_fast.group_advantages(ids, ids)
    with pytest.raises(ValueError, match=r"baseline must be one of grpo, rloo.*got 'ppo'"):
        ppo_fast.group_advantages(scores, ids, baseline="ppo")
