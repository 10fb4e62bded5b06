"""rlhf_advantages: accuracy, where the score stands, what it shares with gae."""

from __future__ import annotations

import pytest
import torch

import ppo_fast
from ppo_fast import testing
from ppo_fast._boundary.schema import ESTIMATORS, SCORE_AT
from ppo_fast.testing import rlhf_call, run

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("masked", ["carry", "zero"])
@pytest.mark.parametrize("place", SCORE_AT)
def test_within_budget(backend: str, device: str, place: str, masked: str) -> None:
    for mask in ("right", "left", "random", "row", "all"):
        call = rlhf_call((5, 19), mask=mask, score_at=place, masked=masked, device=device)
        testing.assert_agrees(call, backend)
    testing.assert_agrees(
        rlhf_call((61,), packed=True, mask="random", score_at=place, masked=masked, device=device),
        backend,
    )


@pytest.mark.parametrize("clamp", [None, 0.3])
@pytest.mark.parametrize("estimator", [*ESTIMATORS, "k1+", "k3+"])
def test_estimators(backend: str, device: str, estimator: str, clamp: float | None) -> None:
    call = rlhf_call(kl_estimator=estimator, kl_clamp=clamp, device=device)
    testing.assert_agrees(call, backend)
    if clamp is not None:
        assert float(run(call, backend)["kl"].abs().max()) <= torch.tensor(clamp)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("place", SCORE_AT)
def test_precisions(backend: str, device: str, place: str, dtype: torch.dtype) -> None:
    call = rlhf_call(dtype=dtype, score_at=place, reward_clip=(-0.5, 1.0), device=device)
    testing.assert_agrees(call, backend)


def by_hand(
    device: str, mask: list[list[int]], place: str, backend: str, **options: object
) -> dict[str, torch.Tensor]:
    """No KL, no values, γ = λ = 1, scores 1, 2, ...: rewards and returns are sums of scores."""
    keep = torch.tensor(mask, device=device)
    scores = torch.arange(1.0, len(mask) + 1, device=device)
    zero = torch.zeros(keep.shape, device=device)
    options = {"kl_coef": 0.0, "lam": 1.0, "score_at": place, "backend": backend, **options}
    return testing.output(ppo_fast.rlhf_advantages(scores, zero, zero, zero, keep, **options))


MASKS = [[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1], [0, 1, 1, 0]]


def test_last_token(backend: str, device: str) -> None:
    out = by_hand(device, MASKS, "last-token", backend)
    want = [[0, 1, 0, 0], [0, 0, 0, 2], [0] * 4, [0, 0, 0, 4], [0, 0, 5, 0]]
    assert out["rewards"].tolist() == want
    assert out["returns"].tolist() == [[1, 1, 0, 0], [2] * 4, [0] * 4, [0, 4, 0, 4], [0, 5, 5, 0]]
    assert testing.same_bits(out["advantages"], out["returns"]) and float(out["moments"][0]) == 10


def test_first_pad(backend: str, device: str) -> None:
    """The slot joins the recursion, carries a return, but no advantage and not the moments."""
    out = by_hand(device, MASKS, "first-pad", backend)
    assert out["rewards"].tolist() == [
        [0, 0, 1, 0],
        [0, 0, 0, 2],
        [0] * 4,
        [0, 0, 0, 4],
        [0, 0, 0, 5],
    ]
    assert out["returns"].tolist() == [[1, 1, 1, 0], [2] * 4, [0] * 4, [0, 4, 0, 4], [0, 5, 5, 5]]
    assert out["advantages"].tolist() == [
        [1, 1, 0, 0],
        [2] * 4,
        [0] * 4,
        [0, 4, 0, 4],
        [0, 5, 5, 0],
    ]
    assert float(out["moments"][0]) == 10 and not bool(out["kl"].any())


def test_first_pad_reads_its_value(backend: str, device: str) -> None:
    call = rlhf_call((1, 5), score_at="first-pad", kl_coef=0.0, bootstrap=False, device=device)
    call = call.replace(mask=torch.tensor([[1, 1, 0, 0, 0]], device=device))
    t, out = call.tensors, run(call, backend)
    assert torch.allclose(out["returns"][0, 2], t["scores"][0], atol=1e-6)
    delta = 0.99 * t["values"][0, 2] - t["values"][0, 1]
    tail = 0.99 * 0.95 * (t["scores"][0] - t["values"][0, 2])
    assert torch.allclose(out["advantages"][0, 1], delta + tail, atol=1e-5)


def test_first_pad_stays_in_its_segment(backend: str, device: str) -> None:
    """Packed, full and short sequences: a full one's score stays on its last token."""
    cu = torch.tensor([0, 3, 3, 6], device=device)
    mask = torch.tensor([1, 1, 1, 1, 1, 0], device=device)
    zero = torch.zeros(6, device=device)
    out = ppo_fast.rlhf_advantages(
        torch.tensor([1.0, 2.0, 3.0], device=device),
        zero,
        zero,
        zero,
        mask,
        kl_coef=0.0,
        score_at="first-pad",
        cu_seqlens=cu,
        backend=backend,
    )
    assert out.rewards.tolist() == [0, 0, 1, 0, 0, 3]


def test_reward_clip_is_on_the_score_before_the_kl(backend: str, device: str) -> None:
    call = rlhf_call((6, 5), mask="all", reward_clip=(-0.1, 0.2), device=device)
    out = run(call, backend)
    score = out["rewards"][:, -1] + 0.2 * out["kl"][:, -1]
    want = call.tensors["scores"].clamp(-0.1, 0.2)
    assert torch.allclose(score, want, atol=1e-6)


def test_kl_is_unscaled_and_subtracts_from_the_reward(backend: str, device: str) -> None:
    call = rlhf_call((3, 6), device=device)
    t, keep = call.tensors, call.tensors["mask"]
    out = run(call.replace(scores=torch.zeros_like(t["scores"])), backend)
    gap = torch.where(keep, t["logprobs"] - t["ref_logprobs"], 0.0)
    assert torch.allclose(out["kl"], gap, atol=1e-7)
    assert torch.allclose(out["rewards"], -0.2 * gap, atol=1e-7)


def test_it_is_gae_of_its_rewards(backend: str, device: str) -> None:
    for packed in (False, True):
        call = rlhf_call((40,) if packed else (4, 10), mask="random", packed=packed, device=device)
        out = run(call, backend)
        shared = {
            k: v
            for k, v in call.tensors.items()
            if k in ("values", "mask", "bootstrap", "cu_seqlens")
        }
        again = testing.Call("gae", {"rewards": out["rewards"], **shared}, {"gamma": 0.99}, {})
        gae = run(again, backend)
        assert all(testing.same_bits(out[k], gae[k]) for k in ("advantages", "returns", "moments"))


def test_unused_scores_are_unread(backend: str, device: str) -> None:
    """A sequence without tokens has no slot for its score, even NaN."""
    call = rlhf_call((3, 6), mask="row", device=device)
    scores = call.tensors["scores"].clone()
    scores[0] = float("nan")
    a, b = run(call, backend), run(call.replace(scores=scores), backend)
    assert all(testing.same_bits(a[k], b[k]) for k in a)


def test_tensor_kl_coef_is_its_number(backend: str, device: str) -> None:
    call = rlhf_call(kl_coef=0.25, device=device)
    a = run(call, backend)
    b = run(call.option(kl_coef=torch.tensor(0.25, device=device)), backend)
    assert all(testing.same_bits(a[k], b[k]) for k in a)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)], ids=str)
@pytest.mark.parametrize("place", SCORE_AT)
def test_empty(backend: str, device: str, place: str, shape: tuple[int, int]) -> None:
    out = run(rlhf_call(shape, mask="all", score_at=place, device=device), backend)
    assert out["advantages"].shape == shape and out["moments"].tolist() == [0.0, 0.0, 0.0]
