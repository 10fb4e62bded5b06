"""Trainers' corrections, by their own installed code: verl, TRL."""

from __future__ import annotations

import math
import types
from typing import Any

import pytest
import torch
from installed import block, functions, source
from torch import Tensor

import ppo_fast
from ppo_fast import Correction, testing

VERL, TRL = "verl==0.9.1", "trl==1.16.0"
ROWS, STEPS = 8, 21
# x, its sum over a row, the exponential and the mean: the roundings of either side in fp64.
OPS = 2 * (STEPS + 4)
# verl's masked means add 1e-8 to the number of tokens, 3 at least.
COUNT = 1e-8 / 3


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """The trainer's and the sampler's log-probabilities, fp64, and a right-padded mask."""
    g = torch.Generator().manual_seed(0)
    old = -3 * torch.rand(ROWS, STEPS, generator=g, dtype=torch.float64)
    rollout = old + 0.1 * torch.randn(ROWS, STEPS, generator=g, dtype=torch.float64)
    mask = torch.arange(STEPS) < torch.randint(3, STEPS + 1, (ROWS, 1), generator=g)
    return old, rollout, mask


def verl(*names: str) -> types.SimpleNamespace:
    helpers = functions(source(VERL, "utils/torch_functional.py"), "masked_sum", "masked_mean")
    tree = source(VERL, "trainer/ppo/rollout_corr_helper.py")
    known: dict[str, Any] = {
        "math": math,
        "verl_F": helpers,
        "SAFETY_BOUND": 20.0,
        # Metrics that go through .item(); those of ours are compared below.
        "compute_rs_metrics": lambda **_: {},
        "compute_is_metrics": lambda **_: {},
        "TOKEN_LEVEL_ROLLOUT_RS_OPTIONS": {"token_k1", "token_k2", "token_k3"},
        "SUPPORTED_ROLLOUT_RS_OPTIONS": [key.replace("-", "_") for key in VERL_KEYS],
    }
    parsers = ("_parse_rollout_is_threshold", "_parse_rollout_rs_thresholds")
    return functions(tree, *parsers, *names, **known, Optional=None)


VERL_KEYS: dict[str, Any] = {
    "token-k1": (0.9, 1.1),
    "token-k2": 4e-3,
    "token-k3": 3e-3,
    "seq-sum-k1": (0.8, 1.3),
    "seq-sum-k2": 0.07,
    "seq-sum-k3": 0.07,
    "seq-mean-k1": (0.98, 1.02),
    "seq-mean-k2": 5e-3,
    "seq-mean-k3": 5e-3,
    "seq-max-k2": 0.02,
    "seq-max-k3": 0.02,
}


def assert_near(ours: Tensor, theirs: Tensor, x: Tensor, by_design: float = 0.0) -> None:
    """Both sides add |x| of a whole row at most; `by_design` is a relative error of theirs."""
    size = theirs.abs() * (1 + x.abs().sum(1).max() + by_design / (OPS * 2**-52))
    testing.assert_within_budget(ours, theirs, condition=size, ops=OPS)


@pytest.mark.case("N19")
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("threshold", ["1.1", "0.9_1.1"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_verl_weights(level: str, threshold: str, normalize: bool) -> None:
    """Truncated (one bound) and IcePop (two), batch normalisation."""
    old, rollout, mask = batch()
    x = old - rollout
    theirs, _ = verl("compute_rollout_correction_weights").compute_rollout_correction_weights(
        x, mask.double(), level, threshold, normalize
    )
    low, high = (0.9, 1.1) if "_" in threshold else (None, 1.1)
    c = Correction(level, "mask" if low else "truncate", low, high)
    for backend in ("reference", "cpu"):
        ours = ppo_fast.rollout_weights(
            old, rollout, mask, correction=c, normalize=normalize, backend=backend
        )
        # The mean of the sequences' weights is one of means.
        assert_near(ours.weights, theirs, x * mask, 2 * COUNT if normalize else 0.0)
    assert (theirs == 0).sum() > (~mask).sum() or low is None


@pytest.mark.case("N19")
@pytest.mark.parametrize(
    "keys", [*([key] for key in VERL_KEYS), ["token-k2", "seq-mean-k1"]], ids=str
)
def test_verl_rejections(keys: list[str]) -> None:
    old, rollout, mask = batch()
    bounds = [VERL_KEYS[key] for key in keys]
    texts = ["_".join(map(str, b)) if isinstance(b, tuple) else str(b) for b in bounds]
    theirs, _ = verl("compute_rollout_rejection_mask").compute_rollout_rejection_mask(
        old - rollout,
        mask.double(),
        ",".join(key.replace("-", "_") for key in keys),
        ",".join(texts),
    )
    c = Correction(None, reject=dict(zip(keys, bounds, strict=True)))
    for backend in ("reference", "cpu"):
        ours = ppo_fast.rollout_weights(old, rollout, mask, correction=c, backend=backend)
        assert torch.equal(ours.mask, theirs != 0)
    assert 0 < int((theirs != 0).sum()) < int(mask.sum())


def test_verl_one_number_is_a_pair() -> None:
    parse = verl()._parse_rollout_rs_thresholds
    pair = parse(["token_k1"], 1.25)["token_k1"]
    c = Correction(None, reject={"token-k1": 1.25})
    both = Correction(None, reject={"token-k1": (pair["lower"], pair["upper"])})
    for ours, theirs in zip(c.windows()[0][:2], both.windows()[0][:2], strict=True):
        assert (
            abs(ours - theirs) <= 2 * 2**-52
        )  # 1/c is rounded before its logarithm, or not formed


@pytest.mark.case("N19")
def test_verl_metrics() -> None:
    old, rollout, mask = batch()
    theirs = verl("compute_offpolicy_metrics").compute_offpolicy_metrics(
        old, rollout, mask.double()
    )
    names = {"ppl": "training_ppl"}
    for backend in ("reference", "cpu"):
        stats = ppo_fast.rollout_weights(old, rollout, mask, correction=None, backend=backend)
        ours = stats.stats.compute()
        for name in ("kl", "k3_kl", "chi2_token", "chi2_seq", "ppl", "rollout_ppl", "ppl_ratio"):
            want = theirs[names.get(name, name)]
            # Means of terms of size 1 at most, exponentials of means of at most 3.
            assert abs(ours[name] - want) <= 8 * COUNT * (1 + abs(want)), name
        assert abs(ours["log_ppl_diff"] - theirs["log_ppl_diff"]) <= 6 * COUNT


@pytest.mark.case("N19")
@pytest.mark.parametrize(
    "mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
)
@pytest.mark.parametrize("bounds", [(None, 1.1), (0.9, 1.1)], ids=str)
def test_trl_weights(mode: str, bounds: tuple[float | None, float]) -> None:
    """A token without a sampling log-probability has the ratio 1."""
    old, rollout, mask = batch()
    rollout[0, 1] = rollout[2, 0] = math.nan
    low, high = bounds
    trainer = types.SimpleNamespace(
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=low,
        vllm_importance_sampling_clip_max=high,
        use_vllm=True,
        vllm_importance_sampling_correction=True,
    )
    theirs = block(
        source(TRL, "trainer/grpo_trainer.py"),
        "per_token_logps_diff",
        "vllm_importance_sampling_ratio",
        self=trainer,
        math=math,
        mask=mask.double(),
        old_per_token_logps=old,
        sampling_per_token_logps=rollout,
    )["vllm_importance_sampling_ratio"]
    level, form = mode.split("_")
    c = Correction(level, form, low, high)
    x = torch.where(mask, old - rollout, 0.0).nan_to_num(0.0)
    for backend in ("reference", "cpu"):
        ours = ppo_fast.rollout_weights(old, rollout, mask, correction=c, backend=backend)
        assert_near(ours.weights[mask], theirs.expand_as(old)[mask], x)
        assert float(ours.stats.field("missing")) == 2 and bool(ours.mask[mask].all())


@pytest.mark.case("N19")
def test_trl_off_policy_mask() -> None:
    old, rollout, mask = batch()
    rollout[0, 1] = math.nan
    advantages = torch.linspace(-1, 0.5, ROWS, dtype=torch.float64)[:, None]
    theirs = functions(source(TRL, "trainer/grpo_trainer.py"), "get_off_policy_mask")
    for delta in (-0.01, 0.0, 0.02):
        want = theirs.get_off_policy_mask(advantages, old, rollout, mask.double(), delta)
        assert torch.equal(
            ppo_fast.off_policy_mask(old, rollout, advantages, mask, delta=delta), want
        )
        assert 0 < int(want.sum()) < ROWS
