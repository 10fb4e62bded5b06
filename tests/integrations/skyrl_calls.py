"""Calls of SkyRL's losses on SkyRL and on ppo_fast, compared."""

from __future__ import annotations

from typing import Any

import pytest
import skyrl_imports  # noqa: F401
import torch
from skyrl.backends.skyrl_train.utils import ppo_utils
from skyrl.train.config import AlgorithmConfig
from skyrl.train.config.config import (
    CISPOConfig,
    ClipCovConfig,
    DPPOConfig,
    KLCovConfig,
    OffPolicyCorrectionConfig,
    SAPOConfig,
)
from torch import Tensor

from ppo_fast import testing
from ppo_fast.integrations import skyrl

B, T = 5, 11
LOSSES = [name for name in ppo_utils.PolicyLossRegistry._functions if name != "cross_entropy"]
CORRECTED = [n for n in LOSSES if n not in ("clip_cov", "kl_cov", "importance_sampling")]
# Such that every option acts on a few tokens; the correction's own, by name.
OWN = {
    "eps_clip_low": 0.1,
    "eps_clip_high": 0.3,
    "clip_ratio_c": 1.4,
    "sapo": SAPOConfig(tau_pos=1.1, tau_neg=1.3),
    "cispo": CISPOConfig(cispo_eps_clip_low=0.2, cispo_eps_clip_high=0.4),
    "dppo": DPPOConfig(delta_low=0.02, delta_high=0.03),
    "clip_cov": ClipCovConfig(clip_ratio=1.0, clip_cov_lb=0.002, clip_cov_ub=0.1),
    "kl_cov": KLCovConfig(kl_cov_frac=0.1, ppo_kl_coef=0.7),
}
CORRECTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "token": {"tis_ratio_type": "token", "token_tis_ratio_clip_high": 1.2},
    "sequence": {"tis_ratio_type": "sequence", "sequence_tis_ratio_clip_high": 1.5},
    "geometric": {
        "sequence_mask_metric": "geometric",
        "geo_mask_low": 0.97,
        "geo_mask_high": 1.03,
        "tis_ratio_type": "token",
    },
    "product": {
        "sequence_mask_metric": "product",
        "product_mask_low": 0.7,
        "product_mask_high": 1.5,
        "tis_ratio_type": "sequence",
    },
    "outlier": {"outlier_token_is_threshold_high": 1.25},
    "tokens": {"token_mask_is_threshold_low": 0.8, "token_mask_is_threshold_high": 1.3},
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mask_of(kind: str) -> Tensor:
    """Holes (tool tokens), a whole sequence left out, padding on the right."""
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, 3:6], mask[1, 7:], mask[3] = False, False, False
    return mask.to({"bool": torch.bool, "int": torch.int64, "float": torch.float64}[kind])


def config(name: str, correction: str = "none", **given: Any) -> AlgorithmConfig:
    own = OffPolicyCorrectionConfig(**CORRECTIONS[correction])
    return AlgorithmConfig(policy_loss_type=name, off_policy_correction=own, **OWN | given)


def call_of(name: str, new: Tensor, correction: str = "none", **given: Any) -> Any:
    """A loss of the registry, as SkyRL's workers call it; an advantage is 0."""
    options = {k: given.pop(k) for k in [*given] if k in AlgorithmConfig.__dataclass_fields__}
    old, advantages = 0.3 * normal(B, T, seed=1) - 2, normal(B, T, seed=2) / B
    advantages[2, 3] = advantages[4, :] = 0.0
    arguments = {
        "log_probs": new,
        "old_log_probs": old,
        "advantages": advantages,
        "config": config(name, correction, **options),
        "loss_mask": mask_of("float"),
        "rollout_logprobs": old + 0.2 * normal(B, T, seed=3),
    } | given
    return lambda: ppo_utils.PolicyLossRegistry.get(name)(**arguments)


def assert_near(ours: Any, theirs: Any, size: float, terms: int = B * T) -> None:
    """fp32's budget for fp64 inputs: SkyRL's ratios are of fp32."""
    assert type(ours) is type(theirs)
    if isinstance(ours, Tensor):
        testing.assert_within_budget(
            ours.detach().double(),
            theirs.detach().double(),
            condition=size,
            ops=8 + terms,
            compute=torch.float32,
        )
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_near(ours[key], theirs[key], size, terms)
    else:
        assert ours is theirs is None or ours == pytest.approx(
            theirs, rel=1e-6, abs=1e-7, nan_ok=True
        )


def assert_all_alike(
    op: str, calls: list[Any], *leaves: Tensor, size: float, terms: int = B * T
) -> None:
    """Results and gradients on SkyRL and on ppo_fast, under one patch: none may be left."""
    theirs = [_results(call, leaves) for call in calls]
    with skyrl.patched((op,)) as counts:
        ours = [_results(call, leaves) for call in calls]
    assert (counts[op].fused, counts[op].left) == (len(calls), 0)
    for a, b in zip(ours, theirs, strict=True):
        for x, y in zip(a, b, strict=True):
            assert_near(x, y, size, terms)


def _results(call: Any, leaves: tuple[Tensor, ...]) -> list[Any]:
    found = call()
    results = list(found) if isinstance(found, tuple) else [found]
    total = sum(x.sum() for x in results if isinstance(x, Tensor) and x.requires_grad)
    return [*results, *(torch.autograd.grad(total, leaves) if leaves else ())]
