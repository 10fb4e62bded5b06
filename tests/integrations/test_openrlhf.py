"""OpenRLHF: losses, log-probabilities, KL and advantages patched, against its own."""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from trainers import needs

needs("openrlhf")

import openrlhf_imports  # noqa: F401
from openrlhf.models import PolicyLoss, ValueLoss, actor
from openrlhf.models import utils as models_utils
from openrlhf.trainer.ppo_utils import experience_maker

import ppo_fast
from ppo_fast import integrations, testing
from ppo_fast.integrations import openrlhf

B, T, V = 5, 11, 13
VERSION = f"openrlhf {importlib.metadata.version('openrlhf')}"
# From 0.10.3: counts of the batch, a clamp of the log-ratio, sequences without a token left out.
COUNTS = "dp_size" in inspect.signature(PolicyLoss.forward).parameters
# From 0.11.1: the KL's other gradient. From 0.11.2: a correction by level, mode and gate.
UNBIASED = "unbiased_gradient" in inspect.signature(models_utils.compute_approx_kl).parameters
GATED = "is_correction_level" in inspect.signature(PolicyLoss).parameters
BATCHES = {
    "alone": {},
    "ranks": {"dp_size": 2, "batch_num_tokens": 71.0, "global_batch_size": 9.0},
    "tensors": {
        "dp_size": 4,
        "batch_num_tokens": torch.tensor(171.0),
        "global_batch_size": torch.tensor(19.0),
    },
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mask_of(empty: bool = COUNTS) -> Tensor:
    """Holes, padding, and a sequence that is left out, or has but one token."""
    mask = torch.ones(B, T)
    mask[0, 3:6], mask[1, 7:], mask[3] = 0, 0, 0
    if not empty:
        mask[3, 2] = 1
    return mask.double()


def of(batch: str) -> dict[str, Any]:
    """The batch's counts; skips where the losses do not take them."""
    if BATCHES[batch] and not COUNTS:
        pytest.skip(f"{VERSION}'s losses take no counts of the batch")
    return BATCHES[batch]


def assert_alike(op: str, call: Any, *leaves: Tensor, size: float, terms: int = B * T) -> None:
    """Results and gradients on both; fp32's budget, as OpenRLHF adds 1e-8 to counts."""
    runs = []
    for patched in (False, True):
        if patched:
            with openrlhf.patched((op,)) as calls:
                found = call()
            assert (calls[op].fused, calls[op].left) == (1, 0)
        else:
            found = call()
        results = list(found) if isinstance(found, tuple) else [found]
        total = sum(x.sum() for x in results if x is not None and x.requires_grad)
        runs.append([*results, *(torch.autograd.grad(total, leaves) if leaves else ())])
    for theirs, ours in zip(*runs, strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            testing.assert_within_budget(
                ours.detach().double(),
                theirs.detach().double(),
                condition=size,
                ops=8 + terms,
                compute=torch.float32,
            )


@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dual", [None, 2.0])
def test_policy_loss(by_token: bool, batch: str, dual: float | None) -> None:
    new = (0.7 * normal(B, T) - 2).requires_grad_()
    old, advantages = 0.7 * normal(B, T, seed=1) - 2, normal(B, T, seed=2)
    loss, given = PolicyLoss(0.1, 0.3, dual_clip=dual, token_level_loss=by_token), of(batch)
    assert_alike(
        "policy_loss",
        lambda: loss(new, old, advantages, action_mask=mask_of(), **given),
        new,
        size=4e3,
    )


@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("clip", [None, 0.4])
def test_value_loss(by_token: bool, batch: str, clip: float | None) -> None:
    values = normal(B, T).requires_grad_()
    old, returns = normal(B, T, seed=1), normal(B, T, seed=2)
    loss, given = ValueLoss(clip, token_level_loss=by_token), of(batch)
    assert_alike(
        "value_loss",
        lambda: loss(values, old, returns, action_mask=mask_of(), **given),
        values,
        size=40.0 * B * T,
    )


BY_GATE: dict[str, dict[str, Any]] = {
    "off": {},
    "token ratio": {"is_correction_level": "token", "is_correction_threshold": (0.7, 1.5)},
    "token clip": {
        "is_correction_level": "token",
        "is_correction_mode": "clip",
        "is_correction_threshold": (0.7, 1.5),
    },
    "seq ratio": {"is_correction_level": "seq", "is_correction_threshold": (0.9, 1.1)},
    "token binary_kl": {
        "is_correction_level": "token",
        "is_correction_gating": "binary_kl",
        "is_correction_threshold": (0.0, 0.03),
    },
    "seq binary_kl": {
        "is_correction_level": "seq",
        "is_correction_gating": "binary_kl",
        "is_correction_threshold": (0.0, 0.04),
    },
    "token tv": {
        "is_correction_level": "token",
        "is_correction_gating": "tv",
        "is_correction_threshold": (0.0, 0.05),
    },
    "seq tv": {
        "is_correction_level": "seq",
        "is_correction_gating": "tv",
        "is_correction_threshold": (0.0, 0.06),
    },
}
TYPED: dict[str, dict[str, Any]] = {
    "off": {},
    **{
        kind: {
            "enable_vllm_is_correction": True,
            "vllm_is_correction_type": kind,
            "vllm_is_truncated_threshold": bounds,
        }
        for kind, bounds in (
            ("tis", (0.7, 1.5)),
            ("icepop", (0.7, 1.5)),
            ("seq-mask-tis", (0.9, 1.1)),
        )
    },
}
GATES = BY_GATE if GATED else TYPED


def sampled() -> Tensor:
    """Rollout log-probabilities about the old ones, each row further apart."""
    apart = torch.tensor([0.05, 0.2, 0.4, 0.6, 0.9], dtype=torch.float64)[:, None]
    return 0.7 * normal(B, T, seed=1) - 2 + apart * normal(B, T, seed=3)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("kind", ["ppo", "gspo"])
@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize("batch", BATCHES)
def test_corrections(gate: str, kind: str, by_token: bool, batch: str) -> None:
    """Every level, mode and gate, and gspo, whose ratio is then to the rollout's policy."""
    new = (0.7 * normal(B, T) - 2).requires_grad_()
    old, advantages = 0.7 * normal(B, T, seed=1) - 2, normal(B, T, seed=2)
    given = of(batch)
    for dual in (None, 2.0):
        loss = PolicyLoss(0.1, 0.3, dual_clip=dual, policy_loss_type=kind, **GATES[gate])
        loss.token_level_loss = by_token  # gspo's own is False
        call = functools.partial(loss, new, old, advantages, rollout_log_probs=sampled())
        assert_alike(
            "policy_loss",
            lambda call=call: call(action_mask=mask_of(), **given),
            new,
            size=4e3,
        )
        if GATED and gate != "off" and kind == "ppo":
            assert 0 < call(action_mask=mask_of())[4] < 1, "some are filtered, some not"


RATIO_GATES = {
    ("token ratio" if GATED else "icepop"): ppo_fast.Correction("token", "mask", 0.7, 1.5),
    ("token clip" if GATED else "tis"): ppo_fast.Correction("token", "truncate", 0.7, 1.5),
    ("seq ratio" if GATED else "seq-mask-tis"): ppo_fast.Correction(
        "token", high=math.inf, reject={"seq-mean-ratio": (0.9, 1.1)}
    ),
}


@pytest.mark.parametrize(("gate", "correction"), RATIO_GATES.items())
@pytest.mark.parametrize("by_token", [True, False])
def test_ratio_gates_as_corrections(
    gate: str, correction: ppo_fast.Correction, by_token: bool
) -> None:
    """docs/corrections.md's table: the loss with `correction` is OpenRLHF's."""
    new = (0.7 * normal(B, T) - 2).requires_grad_()
    old, advantages = 0.7 * normal(B, T, seed=1) - 2, normal(B, T, seed=2)
    loss = PolicyLoss(token_level_loss=by_token, **GATES[gate])
    theirs = loss(new, old, advantages, action_mask=mask_of(), rollout_log_probs=sampled())[0]
    ours = ppo_fast.ppo_loss(
        new,
        old,
        advantages,
        mask_of(),
        rollout_logprobs=sampled(),
        correction=correction,
        reduction="token-mean" if by_token else "seq-mean-token-mean",
    ).loss
    for x, y in zip(
        (ours.detach(), *torch.autograd.grad(ours, new)),
        (theirs.detach(), *torch.autograd.grad(theirs, new)),
        strict=True,
    ):
        testing.assert_within_budget(x, y, condition=4e3, ops=8 + B * T, compute=torch.float32)


def test_log_ratios_beyond_the_clamp() -> None:
    """±20 from 0.10.3, none before."""
    new = (0.7 * normal(B, T) - 2).requires_grad_()
    old = new.detach() - 25.0 * normal(B, T, seed=1).sign()
    loss, size = PolicyLoss(), 3.0 * math.exp(20.0 if COUNTS else 25.0)
    call = functools.partial(loss, new, old, normal(B, T, seed=2), action_mask=mask_of())
    assert_alike("policy_loss", call, new, size=size)


@pytest.mark.parametrize("options", [{"token_level_loss": False}, {"policy_loss_type": "gspo"}])
@pytest.mark.skipif(COUNTS, reason=f"{VERSION} leaves out a sequence without a token")
def test_an_empty_sequence_makes_a_mean_of_sequences_nan(options: dict[str, Any]) -> None:
    x, a, mask = normal(B, T) - 2, normal(B, T, seed=2), mask_of(empty=True)
    by_sequence = {"token_level_loss": False}
    with openrlhf.patched(("policy_loss", "value_loss")) as calls:
        assert PolicyLoss(**options)(x, x, a, action_mask=mask)[0].isnan()
        assert ValueLoss(0.4, **by_sequence)(x, x, a, action_mask=mask).isnan()
        assert (calls["policy_loss"].fused, calls["value_loss"].fused) == (1, 1)


@pytest.mark.parametrize("gate", GATES)
def test_no_mask(gate: str) -> None:
    """The mean over all tokens, the one reduction that OpenRLHF has without a mask."""
    new = (0.7 * normal(B, T) - 2).requires_grad_()
    old, advantages = 0.7 * normal(B, T, seed=1) - 2, normal(B, T, seed=2)
    loss, value_loss = PolicyLoss(0.1, 0.3, **GATES[gate]), ValueLoss(0.4)
    call = functools.partial(loss, new, old, advantages, rollout_log_probs=sampled())
    assert_alike("policy_loss", call, new, size=4e3)
    assert_alike("value_loss", lambda: value_loss(new, old, advantages), new, size=40.0 * B * T)


OF_SEQUENCES = GATES["seq ratio" if GATED else "seq-mask-tis"]
REFUSED: list[tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = [
    ({"policy_loss_type": "no-such"}, {}, ValueError, "Invalid policy loss type"),
    ({"policy_loss_type": "gspo"}, {"action_mask": None}, TypeError, "NoneType"),
    (OF_SEQUENCES, {"rollout_log_probs": None}, TypeError, "NoneType"),
]
if COUNTS:  # before, the mean over all tokens
    no_mask = {"token_level_loss": False}, {"action_mask": None}, AttributeError, "NoneType"
    REFUSED.append(no_mask)


@pytest.mark.parametrize(("options", "given", "error", "why"), REFUSED)
def test_errors_are_openrlhfs_own(
    options: dict[str, Any], given: dict[str, Any], error: type[Exception], why: str
) -> None:
    x, a = normal(B, T) - 2, normal(B, T, seed=2)
    call = functools.partial(
        PolicyLoss(**options),
        x,
        x,
        a,
        **{"action_mask": mask_of(), "rollout_log_probs": x} | given,
    )
    with pytest.raises(error, match=why):
        call()
    with pytest.raises(error, match=why), openrlhf.patched(("policy_loss",)):
        call()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs(temperature: float) -> None:
    logits, labels = normal(2, 5, V).float(), torch.randint(V, (2, 5))
    assert_alike(
        "logprobs",
        lambda: actor.log_probs_from_logits(logits.clone(), labels, temperature),
        size=12.0,
        terms=V,
    )


def test_logprobs_gradient() -> None:
    logits = normal(2, 5, V).float().requires_grad_()
    labels = torch.randint(V, (2, 5))
    assert_alike(
        "logprobs", lambda: actor.log_probs_from_logits(logits, labels), logits, size=12.0, terms=V
    )


def test_entropy() -> None:
    logits = normal(2, 5, V).float().requires_grad_()
    assert_alike("entropy", lambda: actor.compute_entropy(logits), logits, size=12.0, terms=V)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("old", [False, True])
def test_kl(kind: str, unbiased: bool, old: bool) -> None:
    new, ref = (3 * normal(B, T)).requires_grad_(), 3 * normal(B, T, seed=1)
    given: dict[str, Any] = {"kl_estimator": kind}
    if UNBIASED:
        given |= {"unbiased_gradient": unbiased}
        given |= {"log_probs_old": normal(B, T, seed=2) if old else None}
    elif unbiased or old:
        pytest.skip(f"{VERSION}'s compute_approx_kl has one gradient")
    assert_alike(
        "kl",
        lambda: experience_maker.compute_approx_kl(new, ref, **given),
        new,
        size=400.0,
        terms=8,
    )


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_advantages(gamma: float) -> None:
    """Over the kept slots: OpenRLHF goes on through the others, ppo_fast leaves zeros."""
    rewards, values, mask = normal(B, T), normal(B, T, seed=1), mask_of()
    maker = experience_maker.RemoteExperienceMaker

    def call() -> tuple[Tensor, ...]:
        found = maker.get_advantages_and_returns(None, values, rewards, mask, gamma, 0.95)  # type: ignore[arg-type]
        return tuple(x[mask != 0] for x in found)

    assert_alike("advantages", call, size=60.0)


def test_it_is_patched_at_every_import_site_and_put_back() -> None:
    original = models_utils.log_probs_from_logits
    places = openrlhf.apply()
    assert {
        "openrlhf.models.loss.PolicyLoss.forward",
        "openrlhf.models.loss.ValueLoss.forward",
        "openrlhf.models.actor.log_probs_from_logits",
        "openrlhf.models.actor.compute_entropy",
        "openrlhf.trainer.ppo_utils.experience_maker.compute_approx_kl",
    } <= set(places)
    assert actor.log_probs_from_logits is models_utils.log_probs_from_logits is not original
    with pytest.raises(integrations.NeverReachedError, match="policy_loss, value_loss"):
        openrlhf.revert()
    assert actor.log_probs_from_logits is models_utils.log_probs_from_logits is original


@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize("micro", [1, 2, 5])
@pytest.mark.skipif(not COUNTS, reason=f"{VERSION}'s losses take no counts of the batch")
def test_micro_batches_add_up(by_token: bool, micro: int) -> None:
    """OpenRLHF's promise for `batch_num_tokens`, with the patched loss."""
    new, old = 0.3 * normal(B, T) - 2, 0.3 * normal(B, T, seed=1) - 2
    advantages, mask = normal(B, T, seed=2), mask_of()
    whole = {"batch_num_tokens": mask.sum(), "global_batch_size": (mask.sum(1) > 0).sum()}
    loss = PolicyLoss(token_level_loss=by_token)
    exact = loss(new, old, advantages, action_mask=mask, **whole)[0]
    with openrlhf.patched(("policy_loss",)):
        parts = [
            loss(
                *(x[i : i + micro] for x in (new, old, advantages)),
                action_mask=mask[i : i + micro],
                **whole,
            )[0]
            for i in range(0, B, micro)
        ]
    testing.assert_within_budget(
        torch.stack(parts).sum().double(),
        exact,
        condition=4e3,
        ops=8 + B * T,
        compute=torch.float32,
    )
