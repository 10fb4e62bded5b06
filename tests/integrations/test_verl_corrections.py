"""verl's rollout correction: bypass mode on ppo_fast, and its options as `Correction`."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from both_sides import B, T, mask_of, normal
from torch import Tensor
from trainers import needs

needs("verl")
os.environ["VERL_USE_EXTERNAL_PLUGINS"] = "none"  # the tests say when it is patched

from verl.trainer.config.algorithm import RolloutCorrectionConfig
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.rollout_corr_helper import (
    SUPPORTED_ROLLOUT_RS_OPTIONS,
    compute_rollout_correction_and_rejection_mask,
)
from verl.workers.config import PolicyLossConfig
from verl_calls import MODES, assert_all_alike, config

import ppo_fast
from ppo_fast import testing
from ppo_fast.surrogates import reinforce

WHOLE = {"drops": "all", "count": "kept"}
IS = {"high": 2.0}
ICEPOP = {"form": "mask", "low": 0.5, "high": 5.0}
GEO = {"seq-mean-k1": (0.999, 1.001)}
K3 = {"seq-mean-k3": 0.01}
# docs/corrections.md's table.
PRESETS: dict[str, Any] = {
    "decoupled_token_is": ppo_fast.Correction("token", **IS),
    "decoupled_seq_is": ppo_fast.Correction("sequence", **IS),
    "decoupled_token_icepop": ppo_fast.Correction("token", **ICEPOP),
    "decoupled_seq_is_rs": ppo_fast.Correction(
        "sequence", **IS, reject={"seq-sum-k1": (0.5, 2.0)}, **WHOLE
    ),
    "decoupled_geo_rs": ppo_fast.Correction(None, reject=GEO, **WHOLE),
    "decoupled_geo_rs_seq_tis": ppo_fast.Correction("sequence", **IS, reject=GEO, **WHOLE),
    "decoupled_geo_rs_token_tis": ppo_fast.Correction("token", **IS, reject=GEO, **WHOLE),
    "decoupled_k3_rs": ppo_fast.Correction(None, reject=K3, **WHOLE),
    "decoupled_k3_rs_seq_tis": ppo_fast.Correction("sequence", **IS, reject=K3, **WHOLE),
    "decoupled_k3_rs_token_tis": ppo_fast.Correction("token", **IS, reject=K3, **WHOLE),
    "bypass_ppo_clip": None,
    "bypass_ppo_clip_geo_rs": ppo_fast.Correction(None, ratio="current", reject=GEO, **WHOLE),
    "bypass_ppo_clip_k3_rs": ppo_fast.Correction(None, ratio="current", reject=K3, **WHOLE),
    "bypass_pg_is": ppo_fast.Correction("sequence", **IS, ratio="current"),
    "bypass_pg_token_icepop": ppo_fast.Correction("token", **ICEPOP, ratio="current"),
    "bypass_pg_geo_rs": ppo_fast.Correction(None, ratio="current", reject=GEO, **WHOLE),
    "bypass_pg_geo_rs_seq_tis": ppo_fast.Correction(
        "sequence", **IS, ratio="current", reject=GEO, **WHOLE
    ),
    "bypass_pg_geo_rs_token_tis": ppo_fast.Correction(
        "token", **IS, ratio="current", reject=GEO, **WHOLE
    ),
    "disabled": None,
}


def logprobs() -> tuple[Tensor, Tensor, Tensor]:
    """Current, old and rollout ones: rows near the rollout's, further away, and far beyond ±20."""
    rollout = 0.7 * normal(B, T, seed=1) - 2
    spread = torch.tensor([0.3, 0.001, 0.0005, 1.0, 0.5], dtype=torch.float64)[:, None]
    old = rollout + spread * normal(B, T, seed=4)
    old[0, 1], old[0, 2] = rollout[0, 1] + 30.0, rollout[0, 2] - 30.0
    return old + 0.3 * spread * normal(B, T, seed=5), old, rollout


def verls(options: RolloutCorrectionConfig, old: Tensor, rollout: Tensor) -> tuple[Any, Tensor]:
    """verl's weights, or None, and mask."""
    proto, mask, _ = compute_rollout_correction_and_rejection_mask(
        old_log_prob=old,
        rollout_log_prob=rollout,
        response_mask=mask_of("float"),
        rollout_is=options.rollout_is,
        rollout_is_threshold=options.rollout_is_threshold,
        rollout_is_batch_normalize=options.rollout_is_batch_normalize,
        rollout_rs=options.rollout_rs,
        rollout_rs_threshold=options.rollout_rs_threshold,
    )
    return None if proto is None else proto.batch["rollout_is_weights"], mask


def same(ours: ppo_fast.RolloutWeights, weights: Tensor | None, mask: Tensor) -> None:
    """fp64's budget: sums of T differences of at most 30, and their exponential."""
    assert torch.equal(ours.mask, mask != 0)
    if weights is not None:
        bound = weights * (1.0 + 30.0 * T)
        testing.assert_within_budget(ours.weights, weights, condition=bound, ops=8 + T)


def test_every_preset_is_in_the_table() -> None:
    made = [
        name
        for name, value in vars(RolloutCorrectionConfig).items()
        if isinstance(value, classmethod)
    ]
    assert sorted(made) == sorted(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_weights_and_mask_of_a_preset(name: str) -> None:
    options = getattr(RolloutCorrectionConfig, name)()
    _, old, rollout = logprobs()
    correction = PRESETS[name]
    assert (correction is None) == (options.rollout_is is None and options.rollout_rs is None)
    ours = ppo_fast.rollout_weights(old, rollout, mask_of("bool"), correction=correction)
    weights, mask = verls(options, old, rollout)
    same(ours, weights, mask)
    if options.rollout_rs is not None:
        assert 0 < int(mask.sum()) < int(mask_of("bool").sum()), "some are rejected, some not"


@pytest.mark.parametrize("rejection", sorted(SUPPORTED_ROLLOUT_RS_OPTIONS))
@pytest.mark.parametrize("bound", [1.02, 1.5, 4.0])
def test_rejections(rejection: str, bound: float) -> None:
    """Every option alone, and with token_k1; k1 with one number and with two."""
    _, old, rollout = logprobs()
    key = rejection.replace("_", "-")
    pairs: list[tuple[str, Any]] = [(str(bound), bound)]
    if key.endswith("k1"):
        pairs.append((f"0.9_{bound}", (0.9, bound)))
    for theirs, ours in pairs:
        for more in [{}] if key == "token-k1" else [{}, {"token-k1": (0.5, 3.0)}]:
            both = bool(more)
            options = RolloutCorrectionConfig(
                rollout_is=None,
                rollout_rs=rejection + ",token_k1" * both,
                rollout_rs_threshold=theirs + ",0.5_3.0" * both,
            )
            correction = ppo_fast.Correction(None, reject={key: ours} | more)
            found = ppo_fast.rollout_weights(old, rollout, mask_of("bool"), correction=correction)
            same(found, *verls(options, old, rollout))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_normalised_weights(level: str) -> None:
    _, old, rollout = logprobs()
    options = RolloutCorrectionConfig(rollout_is=level, rollout_is_batch_normalize=True)
    correction = ppo_fast.Correction(level, high=2.0)
    found = ppo_fast.rollout_weights(
        old, rollout, mask_of("bool"), correction=correction, normalize=True
    )
    weights, mask = verls(options, old, rollout)
    assert torch.equal(found.mask, mask != 0)
    # verl adds 1e-8 to the counts that it divides by: fp32's budget.
    testing.assert_within_budget(
        found.weights, weights, condition=weights, ops=8 + B * T, compute=torch.float32
    )


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "disabled"])
def test_a_preset_inside_the_loss(name: str) -> None:
    """verl's weights, mask and loss in turn, against one call with `correction`: fp64's budget,
    but for the 1e-8 that verl adds to |y|."""
    options = getattr(RolloutCorrectionConfig, name)()
    new, old, rollout = logprobs()
    new.requires_grad_()
    advantages, mask = normal(B, T, seed=2), mask_of("float")
    for mode in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum"):
        policy_loss = PolicyLossConfig(rollout_correction=options)
        given = config({}, policy_loss=policy_loss)
        if options.bypass_mode:
            arguments = (rollout, new, advantages, mask, mode, given, None)
            theirs, _ = core_algos.get_policy_loss_fn("bypass_mode")(*arguments)
        else:
            weights, kept = verls(options, old, rollout)
            arguments = (old, new, advantages, kept, mode, given, weights)
            theirs, _ = core_algos.compute_policy_loss_vanilla(*arguments)
        here: dict[str, Any] = {"old_logprobs": old, "dual_clip": 3.0}
        if options.bypass_mode:
            here["old_logprobs"] = rollout
        if options.bypass_mode and options.loss_type == "reinforce":
            here = {"old_logprobs": None, "variant": reinforce(ratio_cap=1.0)}
        ours = ppo_fast.ppo_loss(
            new,
            advantages=advantages,
            mask=mask,
            rollout_logprobs=rollout,
            correction=PRESETS[name],
            reduction=mode,
            **here,
        ).loss
        for x, y in zip(
            (ours.detach(), *torch.autograd.grad(ours, new)),
            (theirs.detach(), *torch.autograd.grad(theirs, new)),
            strict=True,
        ):
            testing.assert_within_budget(
                x, y, condition=60.0, ops=8 + B * T, compute=torch.float32
            )


@pytest.mark.parametrize("loss_type", ["ppo_clip", "reinforce"])
def test_bypass_mode(loss_type: str) -> None:
    """Loss, gradient and all metrics, those of the correction among them."""
    new, _, rollout = logprobs()
    new.requires_grad_()
    rejections: list[dict[str, Any]] = [
        {},
        {"rollout_rs": "token_k1", "rollout_rs_threshold": "0.7_1.3"},
        {"rollout_rs": "seq_mean_k3,seq_max_k2", "rollout_rs_threshold": "0.02,0.5"},
    ]
    weights: list[dict[str, Any]] = [
        {"rollout_is": None},
        {"rollout_is": "token", "rollout_is_threshold": "0.5_5.0"},
        {"rollout_is": "sequence", "rollout_is_batch_normalize": True},
    ]
    batches: list[dict[str, Any]] = [
        {},
        {"dp_size": 2, "batch_num_tokens": 71, "global_batch_size": 9},
    ]
    calls = []
    for mode in MODES:
        for reject in rejections:
            for weight in weights:
                for info in batches:
                    options = RolloutCorrectionConfig(
                        bypass_mode=True, loss_type=loss_type, **reject, **weight
                    )
                    given = config(info, policy_loss=PolicyLossConfig(rollout_correction=options))
                    calls.append(
                        lambda mode=mode, given=given: core_algos.get_policy_loss_fn(
                            "bypass_mode"
                        )(
                            old_log_prob=rollout,
                            log_prob=new,
                            advantages=normal(B, T, seed=2),
                            response_mask=mask_of("float"),
                            loss_agg_mode=mode,
                            config=given,
                        )
                    )
    assert_all_alike("policy_loss", calls, new, size=4e4)
