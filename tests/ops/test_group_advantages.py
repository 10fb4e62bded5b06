"""Group advantages against their formulae, spelled out group by group."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

import ppo_fast

ON_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_CUDA)])
BASELINES = (
    "grpo",
    "grpo-batch-std",
    "grpo-passk",
    "rloo",
    "dr_grpo",
    "opo",
    "maxrl",
    "reinforce++",
)


def advantages(scores: Tensor, ids: Tensor, baseline: str, **options: Any) -> Tensor:
    """The op's, with responses of 3, 4, 5, ... tokens for the baseline that needs lengths."""
    if baseline == "opo":
        options["lengths"] = 3 + torch.arange(len(scores), device=scores.device)
    return ppo_fast.group_advantages(scores, ids, baseline=baseline, **options)


def one(scores: list[float], ids: list[int], k: int, baseline: str, eps: float) -> float:
    """A response's advantage but for whitening, from its definition."""
    members = [j for j in range(len(ids)) if ids[j] == ids[k]]
    mine, s = [scores[j] for j in members], scores[k]
    if len(mine) < 2 or min(mine) == max(mine):
        return 0.0
    mean, sigma = statistics.fmean(mine), statistics.stdev(mine)
    if baseline == "opo":
        return s - math.fsum((3 + j) * scores[j] for j in members) / sum(3 + j for j in members)
    if baseline == "grpo-passk":
        best, second = sorted(mine)[:-3:-1]
        return (best - second) / (sigma + eps) if s == best else 0.0
    return {
        "rloo": s - (math.fsum(mine) - s) / (len(mine) - 1),
        "grpo": (s - mean) / (sigma + eps),
        "grpo-batch-std": (s - mean) / (statistics.stdev(scores) + eps),
        "maxrl": (s - mean) / (mean + eps),
    }.get(baseline, s - mean)


def spelled_out(
    scores: list[float], ids: list[int], baseline: str, eps: float = 1e-6
) -> list[float]:
    centred = [one(scores, ids, k, baseline, eps) for k in range(len(ids))]
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
    out = advantages(scores.to(device), ids.to(device), baseline)
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
    out = advantages(scores, torch.tensor([2, 7, 2, 2], device=device), baseline)
    assert out.tolist() == [0.0] * 4


@on_devices
@pytest.mark.parametrize("baseline", BASELINES)
def test_no_responses_and_one(device: str, baseline: str) -> None:
    for n in (0, 1):
        ids = torch.zeros(n, dtype=torch.int32, device=device)
        out = advantages(torch.ones(n, device=device), ids, baseline)
        assert out.tolist() == [0.0] * n


@on_devices
@pytest.mark.parametrize("baseline", BASELINES)
def test_groups_may_be_interleaved_and_carry_any_label(device: str, baseline: str) -> None:
    scores = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0], device=device)
    ids = torch.tensor([0, 0, 0, 1, 1, 1], device=device)
    order = torch.tensor([3, 0, 4, 1, 5, 2], device=device)
    options: dict[str, Any] = {"baseline": baseline}
    lengths = 3 + torch.arange(6, device=device)
    of = (lambda x: options | {"lengths": x}) if baseline == "opo" else lambda x: options
    plain = ppo_fast.group_advantages(scores, ids, **of(lengths))
    mixed = ppo_fast.group_advantages(scores[order], ids[order] * -(10**9), **of(lengths[order]))
    torch.testing.assert_close(mixed, plain[order], rtol=1e-6, atol=0)
    assert (plain != 0).tolist() == [baseline != "grpo-passk" or i % 3 == 2 for i in range(6)]


@pytest.mark.parametrize("baseline", ["grpo", "grpo-batch-std", "grpo-passk", "maxrl"])
@pytest.mark.parametrize("eps", [0.0, 1e-4, 0.5])
def test_eps_is_what_the_divisor_gets(baseline: str, eps: float) -> None:
    scores = torch.tensor([0.0, 1.0, 1.5, 2.0, 0.5], dtype=torch.float64)
    ids = torch.tensor([0, 0, 0, 1, 1])
    out = advantages(scores, ids, baseline, eps=eps).tolist()
    assert out == pytest.approx(
        spelled_out(scores.tolist(), ids.tolist(), baseline, eps), abs=1e-14
    )


def gdpo_of(s: Tensor, ids: Tensor, weights: list[float], eps: float) -> list[float]:
    """Each score by itself as "grpo", their weighted sum, then over all responses."""
    parts = [spelled_out(s[:, k].tolist(), ids.tolist(), "grpo", eps) for k in range(s.shape[1])]
    total = [
        math.fsum(w * x for w, x in zip(weights, row, strict=True))
        for row in zip(*parts, strict=True)
    ]
    mean, sigma = statistics.fmean(total), statistics.stdev(total)
    return [(x - mean) / (sigma + eps) for x in total]


@on_devices
@pytest.mark.parametrize("eps", [1e-6, 1e-4])
def test_gdpo(device: str, eps: float) -> None:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    scores[:, 1] = 1.0  # a score that tells nothing
    ids = torch.randint(0, 5, (20,), generator=generator)
    weights = torch.tensor([0.3, 7.0, 1.5], dtype=torch.float64)
    args = scores.to(device), ids.to(device)
    out = ppo_fast.group_advantages(*args, baseline="gdpo", weights=weights.to(device), eps=eps)
    want = gdpo_of(scores, ids, weights.tolist(), eps)
    assert out.tolist() == pytest.approx(want, abs=1e-13)
    plain = ppo_fast.group_advantages(*args, baseline="gdpo", eps=eps)
    assert plain.tolist() == pytest.approx(gdpo_of(scores, ids, [1.0] * 3, eps), abs=1e-13)
    assert plain.dtype == torch.float64 and not plain.equal(out)


def test_gdpo_of_one_score_is_grpo_standardised() -> None:
    scores, ids = torch.tensor([1.0, 2.0, 4.0, 0.0]).double(), torch.tensor([0, 0, 1, 1])
    grpo = ppo_fast.group_advantages(scores, ids)
    out = ppo_fast.group_advantages(scores[:, None], ids, baseline="gdpo")
    assert out.tolist() == pytest.approx((grpo / (grpo.std() + 1e-6)).tolist(), abs=1e-14)
    for n in (0, 1):
        none = ppo_fast.group_advantages(torch.ones(n, 2), ids[:n], baseline="gdpo")
        assert none.tolist() == [0.0] * n
    same = ppo_fast.group_advantages(torch.full((4, 2), 0.1), ids, baseline="gdpo")
    assert same.tolist() == [0.0] * 4


def test_two_best_responses_lead_by_nothing() -> None:
    scores, ids = torch.tensor([1.0, 3.0, 3.0, 2.0]), torch.tensor([0, 0, 0, 0])
    assert advantages(scores, ids, "grpo-passk").tolist() == [0.0] * 4


def test_empty_responses_leave_opo_the_plain_score() -> None:
    """No token is there to learn from."""
    scores, ids = torch.tensor([1.0, 3.0]), torch.tensor([0, 0])
    lengths = torch.zeros(2, dtype=torch.int64)
    out = ppo_fast.group_advantages(scores, ids, baseline="opo", lengths=lengths)
    assert out.tolist() == [1.0, 3.0]


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
    with pytest.raises(ValueError, match=r"baseline must be one of grpo, .*rloo.*got 'ppo'"):
        ppo_fast.group_advantages(scores, ids, baseline="ppo")
    with pytest.raises(ValueError, match=r"eps must be in \[0, inf\], got -1"):
        ppo_fast.group_advantages(scores, ids, eps=-1)
    with pytest.raises(ValueError, match="lengths must be there for 'opo' alone, got them absent"):
        ppo_fast.group_advantages(scores, ids, baseline="opo")
    with pytest.raises(
        ValueError, match=r"scores must have shape \(n, R\) for 'gdpo', got \(4,\)"
    ):
        ppo_fast.group_advantages(scores, ids, baseline="gdpo")
    with pytest.raises(ValueError, match="weights must be there for 'gdpo' alone, got them given"):
        ppo_fast.group_advantages(scores, ids, weights=scores)
    with pytest.raises(ValueError, match=r"weights must have shape \(R,\) = \(2,\), got \(4,\)"):
        ppo_fast.group_advantages(scores.expand(2, 4).t(), ids, baseline="gdpo", weights=scores)
    with pytest.raises(ValueError, match="got them given with 'grpo'"):
        ppo_fast.group_advantages(scores, ids, lengths=ids)
    with pytest.raises(ValueError, match=r"lengths must have shape .*4.*, got \(3,\)"):
        ppo_fast.group_advantages(scores, ids, baseline="opo", lengths=ids[:3])
    with pytest.raises(TypeError, match=r"lengths must be int32 or int64, got torch.float32"):
        ppo_fast.group_advantages(scores, ids, baseline="opo", lengths=scores)


def test_prompt_weights_give_each_prompt_one_share() -> None:
    """The mean over prompts of the mean over their tokens (SkyRL's prompt mean), in two parts."""
    g = torch.Generator().manual_seed(0)
    ids = torch.tensor([7, 1, 7, 7, 4])
    lengths = torch.tensor([3, 5, 0, 2, 0])
    mask = torch.arange(5) < lengths[:, None]
    terms = torch.randn(5, 5, generator=g, dtype=torch.float64)
    weights = ppo_fast.prompt_weights(lengths.double(), ids)
    want = (terms[1].mean() + torch.cat([terms[0, :3], terms[3, :2]]).mean()) / 2
    total = 0.0
    for at in (slice(0, 2), slice(2, 5)):
        new = torch.zeros(at.stop - at.start, 5, dtype=torch.float64)
        loss, _ = ppo_fast.ppo_loss(
            new, None, -terms[at], mask[at], sequence_weights=weights[at], reduction="token-sum"
        )
        total += float(loss)
    assert abs(total - float(want)) < 1e-14
    with pytest.raises(ValueError, match=r"lengths must have shape \(n,\), got \(1, 5\)"):
        ppo_fast.prompt_weights(lengths[None], ids)
    with pytest.raises(TypeError, match=r"lengths must be numbers, got torch\.bool"):
        ppo_fast.prompt_weights(lengths > 0, ids)
    with pytest.raises(TypeError, match=r"group_ids must be int32 or int64, got torch\.float"):
        ppo_fast.prompt_weights(lengths, ids.float())
