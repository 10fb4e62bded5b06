"""Calls of SkyRL's losses on SkyRL and on ppo_fast, compared."""

from __future__ import annotations

from functools import partial
from typing import Any

import both_sides
import skyrl_imports  # noqa: F401
from both_sides import B, T, mask_of, normal
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

from ppo_fast.integrations import skyrl

assert_all_alike = partial(both_sides.assert_all_alike, skyrl.patched)

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
