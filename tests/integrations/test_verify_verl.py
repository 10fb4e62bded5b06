"""`ppo-fast verify verl`: what differs today, and faults planted in copies of verl's functions."""

from __future__ import annotations

import os
from typing import Any

import pytest
from trainers import needs_version

needs_version("verl", "0.9.1")
# Its own plugin would replace what is to be judged.
os.environ["VERL_USE_EXTERNAL_PLUGINS"] = "none"

from verify_runs import keys_of, keys_with
from verl.trainer.ppo import core_algos
from verl.utils import torch_functional

from ppo_fast.integrations import NeverReachedError
from ppo_fast.integrations import verl as swaps
from ppo_fast.referee.verify import NotRunError, Report, verify

PARTS = {
    "policy_loss": set(),
    "value_loss": {"mask.late"},
    "kl": {"kl.clamp"},
    "gae": {"mask.multiply"},
    "grpo_advantages": set(),
    "dr_grpo_advantages": set(),
    "rloo_advantages": set(),
    "whiten": set(),
    "logprobs": set(),
    "entropy": {"entropy.inf"},
}


@pytest.fixture(scope="module")
def report() -> Report:
    return verify("verl")


@pytest.mark.parametrize("part", PARTS)
def test_verl_as_it_is(report: Report, part: str) -> None:
    assert report.version == "0.9.1" and len(report.parts) == len(PARTS)
    assert keys_of(report, part) == PARTS[part]


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"loss_mode": "gspo", "loss_agg_mode": "seq-mean-token-mean"},
         {"mask.multiply", "ratio.ceiling"}),
        ({"loss_mode": "cispo"}, {"mask.late"}),
        ({"loss_mode": "sapo"}, {"mask.multiply"}),
        ({"loss_mode": "gpg"}, {"mask.late"}),
        ({"loss_mode": "dro"}, {"mask.late"}),
        ({"loss_mode": "dppo_tv"}, {"mask.late"}),
        ({"loss_agg_mode": "seq-mean-token-sum-norm", "loss_scale_factor": 64}, {"mask.multiply"}),
        ({"clip_ratio_c": 1e9}, {"ratio.clamp"}),
    ],
    ids=lambda x: "-".join(map(str, x.values())) if isinstance(x, dict) else "",
)  # fmt: skip
def test_losses_of_verls_registry(options: dict[str, Any], found: set[str]) -> None:
    assert keys_of(verify("verl", options), "policy_loss") == found


def test_a_loss_without_a_formula_is_listed() -> None:
    report = verify("verl", {"loss_mode": "kl_cov"})
    assert "no formula here for loss_mode kl_cov" in dict(report.not_run)["policy_loss"]


VANILLA, VALUE = core_algos.compute_policy_loss_vanilla, core_algos.compute_value_loss
AGGREGATE = "loss_agg_mode=loss_agg_mode, **config.global_batch_info"


@pytest.mark.parametrize(
    ("part", "function", "before", "after", "found"),
    [
        ("policy_loss", VANILLA, AGGREGATE, "loss_agg_mode=loss_agg_mode", {"denominator.summed"}),
        (
            "policy_loss", VANILLA, "loss_mask=response_mask, loss_agg_mode",
            "loss_mask=response_mask | torch.nn.functional.pad(response_mask, (1, -1)),"
            " loss_agg_mode",
            {"mask.longer"},
        ),
        ("policy_loss", VANILLA, "where(advantages < 0, clip", "where(advantages > 0, clip",
         {"dual-clip.positive", "ratio.clamp"}),  # which the dual clip bounds no more
        ("policy_loss", VANILLA, "log_prob - old_log_prob", "old_log_prob - log_prob", {"ratio"}),
        ("value_loss", VALUE, "dp_size=dp_size", "dp_size=1", {"denominator.local", "mask.late"}),
        ("value_loss", VALUE, "vf_loss = 0.5 *", "vf_loss = 1.0 *", {"value.factor", "mask.late"}),
        (
            "whiten", torch_functional.masked_whiten, "masked_var(values, mask)",
            "masked_var(values, mask, unbiased=False)", {"whiten.biased"},
        ),
    ],
)  # fmt: skip
def test_a_planted_fault_is_named(
    part: str, function: Any, before: str, after: str, found: set[str]
) -> None:
    keys = keys_with("verl", part, function, before, after)
    assert keys == found


def test_a_k3_with_its_sign_turned_is_named() -> None:
    """The copy calls verl's own forward with the two policies in each other's place."""
    keys = keys_with(
        "verl", "kl", core_algos.kl_penalty, "kl_penalty_forward(logprob, ref_logprob,",
        "kl_penalty_forward(ref_logprob, logprob,",
    )  # fmt: skip
    assert keys == {"kl.-k3", "kl.clamp"}


def test_what_ppo_fast_patched_is_not_taken_for_verls() -> None:
    never = pytest.raises(NeverReachedError)  # as nothing calls what was patched
    with never, swaps.patched(("value_loss",)), pytest.raises(NotRunError, match="not verl's own"):
        verify("verl")
