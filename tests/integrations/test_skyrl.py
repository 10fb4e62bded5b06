"""SkyRL: policy losses, critic loss, GAE, log-probabilities and entropies, against its own."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from both_sides import B, T, assert_near, mask_of, normal
from torch import Tensor
from trainers import needs

needs("skyrl")
import skyrl_imports  # noqa: F401
from skyrl.backends.skyrl_train.utils import ppo_utils, torch_utils
from skyrl.train.config import AlgorithmConfig
from skyrl.train.config.config import DPPOConfig
from skyrl_calls import CORRECTED, CORRECTIONS, LOSSES, OWN, assert_all_alike, call_of

from ppo_fast import integrations
from ppo_fast.integrations import skyrl


@pytest.mark.parametrize("name", LOSSES)
def test_policy_losses(name: str) -> None:
    """By the registry: every kind of mask, with and without rollout log-probabilities."""
    new = (0.3 * normal(B, T) - 2).requires_grad_()
    calls = [call_of(name, new, loss_mask=mask_of(kind)) for kind in ("float", "int")]
    if name not in ("clip_cov", "kl_cov"):  # which want a mask
        calls.append(call_of(name, new, loss_mask=None))
    if name != "rollout_is":
        calls.append(call_of(name, new, rollout_logprobs=None))
    if name not in ("sapo", "kl_cov", "importance_sampling"):  # which clip nothing
        assert 0.05 < calls[0]()[1]["clip_ratio"] < 0.9
    assert_all_alike("policy_loss", calls, new, size=100.0)


@pytest.mark.parametrize("name", CORRECTED)
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_off_policy_corrections(name: str, correction: str) -> None:
    """Weights of tokens and sequences, rejected tokens and sequences, and their metrics."""
    new = (0.3 * normal(B, T) - 2).requires_grad_()
    assert_all_alike("policy_loss", [call_of(name, new, correction)], new, size=100.0)


def test_the_corrections_reject_and_weight() -> None:
    """Losses that differ: the test above would compare nothing where nothing is rejected."""
    new = 0.3 * normal(B, T) - 2
    losses = [float(call_of("regular", new, name)()[0]) for name in CORRECTIONS]
    for one, other in itertools.combinations(losses, 2):
        assert abs(one - other) > 1e-4


@pytest.mark.parametrize("kind", ["binary_tv", "binary_kl"])
@pytest.mark.parametrize("rollout", [True, False])
def test_dppo(kind: str, rollout: bool) -> None:
    """Each divergence over rollout or old log-probabilities; a token without advantage is kept."""
    new = (0.3 * normal(B, T) - 2).requires_grad_()
    own = DPPOConfig(dppo_type=kind, delta_low=0.003, delta_high=0.004)
    given = {} if rollout else {"rollout_logprobs": None}
    call = call_of("dppo", new, dppo=own, **given)
    share = call()[1]["clip_ratio"]
    assert 0.05 < share < 0.6
    assert_all_alike("policy_loss", [call], new, size=100.0)


def test_cispo_over_rollout_logprobs() -> None:
    """Old log-probabilities are not read, and may be missing; NaN stands for that here."""
    new = (0.3 * normal(B, T) - 2).requires_grad_()
    own = replace(OWN["cispo"], cispo_anchor="rollout")
    call = call_of("cispo", new, cispo=own, old_log_probs=None)
    assert_all_alike("policy_loss", [call], new, size=100.0)


def test_rollout_is_without_old_logprobs() -> None:
    new = (0.3 * normal(B, T) - 2).requires_grad_()
    call = call_of("rollout_is", new, old_log_probs=None)
    assert 0.05 < call()[1]["clip_ratio"] < 0.9
    assert_all_alike("policy_loss", [call], new, size=100.0)


@pytest.mark.parametrize("name", [n for n in CORRECTED if n not in ("rollout_is", "cispo")])
def test_log_ratios_beyond_the_clamps(name: str) -> None:
    """±20 of a token, 10 of gspo's sequence: ratios that are capped."""
    new = -0.1 * normal(B, T).abs()
    old = new - 15.0
    old[2, :4], new[2, 4:8] = new[2, :4] - 25.0, old[2, 4:8] - 25.0
    new.requires_grad_()
    call = call_of(name, new, old_log_probs=old, rollout_logprobs=None)
    assert_all_alike("policy_loss", [call], new, size=5e8 * T)  # e^20


@pytest.mark.parametrize("name", LOSSES)
def test_a_mask_that_keeps_nothing(name: str) -> None:
    new = (0.3 * normal(B, T) - 2).requires_grad_()
    call = call_of(name, new, loss_mask=torch.zeros(B, T))
    assert_all_alike("policy_loss", [call], new, size=1.0)


@pytest.mark.parametrize("name", LOSSES)
def test_what_masked_slots_hold_is_not_read(name: str) -> None:
    """NaN there is NaN in SkyRL, which multiplies by the mask."""
    new, keep = 0.3 * normal(B, T) - 2, mask_of("bool")
    with skyrl.patched(("policy_loss",)):
        loss, metrics = call_of(name, new)()
        other, others = call_of(name, torch.where(keep, new, torch.nan))()
    assert torch.equal(loss, other)
    if name != "cispo":
        assert metrics == others


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "seq_mean_token_sum_norm"])
def test_a_mini_batch_in_micro_batches(reduction: str) -> None:
    """The reduction is in the advantages, so that micro-batches add up: as SkyRL's own do."""
    new = (0.3 * normal(B, T) - 2).requires_grad_()
    mask = mask_of("float")
    scaled = ppo_utils.apply_loss_reduction_to_advantages_minibatch(
        normal(B, T, seed=2), mask, reduction, micro_batch_size=2, max_seq_len=3 * T
    )

    def total(rows: list[slice]) -> Tensor:
        old = 0.3 * normal(B, T, seed=1) - 2
        given = [
            call_of(
                "regular",
                new[r],
                advantages=scaled[r],
                loss_mask=mask[r],
                old_log_probs=old[r],
                rollout_logprobs=None,
            )
            for r in rows
        ]
        return sum(call()[0] for call in given)  # type: ignore[return-value]

    theirs = total([slice(0, B)])
    with skyrl.patched(("policy_loss",)) as counts:
        ours = total([slice(0, 2), slice(2, 4), slice(4, B)])
    assert (counts["policy_loss"].fused, counts["policy_loss"].left) == (3, 0)
    assert_near(ours, theirs, size=10.0)
    (a,), (b,) = torch.autograd.grad(ours, new), torch.autograd.grad(theirs, new)
    assert_near(a, b, size=10.0)


def test_clip_cov_drops_as_many_tokens() -> None:
    """A random choice, as SkyRL's: of the same number, by torch's seed, another at every call."""
    new = (0.3 * normal(B, T) - 2).requires_grad_()
    own, advantages = replace(OWN["clip_cov"], clip_ratio=0.1), normal(B, T, seed=2) / B
    call = call_of("clip_cov", new, clip_cov=own, advantages=advantages)

    def dropped() -> tuple[int, ...]:
        loss, metrics = call()
        (gradient,) = torch.autograd.grad(loss, new)
        assert metrics["clip_ratio"] == pytest.approx(count / int(mask_of("bool").sum()), rel=1e-6)
        return tuple(gradient.flatten().nonzero().flatten().tolist())

    count = int(0.1 * int(mask_of("bool").sum()))
    theirs = dropped()
    with skyrl.patched(("policy_loss",)) as counts:
        chosen = []
        for seed in (0, 0, 1, 2, 3):
            torch.manual_seed(seed)
            chosen.append(dropped())
    assert (counts["policy_loss"].fused, counts["policy_loss"].left) == (5, 0)
    assert len({*chosen[1:]}) > 1
    assert {len(tokens) for tokens in chosen} == {len(theirs)}


def test_a_dual_clip_that_is_left_to_skyrl() -> None:
    """Its own result, and one warning."""
    new = 0.3 * normal(B, T) - 2
    call = call_of("dual_clip", new, clip_ratio_c=0.9)
    theirs = call()
    warned = pytest.warns(RuntimeWarning, match="left to skyrl: clip_ratio_c 0.9")
    with warned, skyrl.patched(("policy_loss",)) as counts:
        assert call() == theirs == call()
    assert (counts["policy_loss"].fused, counts["policy_loss"].left) == (0, 2)


@pytest.mark.parametrize(
    ("name", "missing", "error"),
    [("kl_cov", "loss_mask", TypeError), ("rollout_is", "rollout_logprobs", AssertionError)],
)
def test_errors_that_are_skyrls_own(name: str, missing: str, error: type[Exception]) -> None:
    """In the first call, which is compared, and in later ones, which are left."""
    new = 0.3 * normal(B, T) - 2
    call = call_of(name, new, **{missing: None})
    with pytest.raises(error) as theirs:
        call()
    with skyrl.patched(("policy_loss",)) as counts:
        with pytest.raises(error, match=re.escape(str(theirs.value))):
            call()
        call_of(name, new)()
        with pytest.raises(error), pytest.warns(RuntimeWarning, match=f"no {missing}"):
            call()
    assert (counts["policy_loss"].fused, counts["policy_loss"].left) == (1, 1)


@pytest.mark.parametrize("clip", [0.2, None])
@pytest.mark.parametrize("kind", ["bool", "float", "none"])
def test_value_loss(clip: float | None, kind: str) -> None:
    values = normal(B, T).requires_grad_()
    old, returns = normal(B, T, seed=1), normal(B, T, seed=2)
    mask = None if kind == "none" else mask_of(kind)
    own = AlgorithmConfig(value_clip=clip)
    call = lambda: ppo_utils.ppo_critic_loss(values, old, returns, own, mask)  # noqa: E731
    assert_all_alike("value_loss", [call], values, size=40.0)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_gae(gamma: float) -> None:
    """Through masked slots; over the kept ones: SkyRL leaves whitened numbers at the others."""
    rewards, values, mask = normal(B, T), normal(B, T, seed=1), mask_of("float")

    def call() -> tuple[Tensor, ...]:
        advantages, returns = ppo_utils.compute_advantages_and_returns(
            token_level_rewards=rewards,
            response_mask=mask,
            index=None,
            adv_estimator="gae",
            config=AlgorithmConfig(),
            values=values,
            gamma=gamma,
            lambd=0.95,
        )
        return advantages[mask != 0], returns

    assert_all_alike("gae", [call], size=60.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logprobs(dtype: torch.dtype) -> None:
    logits = (3 * normal(2, 70, 13)).to(dtype).requires_grad_()
    labels = torch.randint(13, (2, 70), generator=torch.Generator().manual_seed(0))
    call = lambda: torch_utils.logprobs_from_logits(logits, labels)  # noqa: E731
    assert_all_alike("logprobs", [call], logits, size=20.0, terms=13)


@pytest.mark.parametrize("masked", [False, True])
def test_entropy(masked: bool) -> None:
    """With and without a gradient; chunks that do not divide the sequence."""
    logits = (3 * normal(B, T, 13)).float().requires_grad_()
    mask = mask_of("int") if masked else None

    def call(**given: Any) -> Any:
        return lambda: torch_utils.chunked_entropy_from_logits(
            logits, attention_mask=mask, chunk_size=4, **given
        )

    assert_all_alike("entropy", [call(requires_grad=True)], logits, size=20.0, terms=13)
    assert_all_alike("entropy", [call()], size=20.0, terms=13)
    with skyrl.patched(("entropy",)):
        assert not call()().requires_grad


def test_both_from_the_same_logits() -> None:
    """SkyRL asks for an in-place backward of logits that the entropies' backward reads too."""
    weight = normal(13, 13).float().requires_grad_()
    labels = torch.randint(13, (B, T), generator=torch.Generator().manual_seed(0))

    def step() -> Tensor:
        logits = normal(B, T, 13, seed=1).float() @ weight
        logits.div_(0.7)
        logprobs = torch_utils.logprobs_from_logits(logits, labels, inplace_backward=True)
        entropy = torch_utils.chunked_entropy_from_logits(logits, requires_grad=True)
        total = logprobs.sum() - 0.1 * entropy.sum()
        return torch.autograd.grad(total, weight)[0]

    theirs = step()
    with skyrl.patched(("logprobs", "entropy")):
        assert_near(step(), theirs, size=100.0, terms=13 + B * T)


def test_it_is_patched_in_the_registries_and_put_back() -> None:
    registered = ppo_utils.PolicyLossRegistry._functions
    originals = dict(registered)
    places = skyrl.apply()
    registry = "skyrl.backends.skyrl_train.utils.ppo_utils.PolicyLossRegistry._functions"
    assert {f"{registry}[{name!r}]" for name in LOSSES} <= set(places)
    assert [n for n in registered if registered[n] is originals[n]] == ["cross_entropy"]
    with pytest.raises(integrations.NeverReachedError, match="policy_loss, value_loss, gae"):
        skyrl.revert()
    assert registered == originals
    assert ppo_utils.ppo_policy_loss.__wrapped__ is registered["dual_clip"]
