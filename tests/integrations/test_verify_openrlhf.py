"""`ppo-fast verify openrlhf`: what differs today, and faults planted in copies of its losses."""

from __future__ import annotations

from typing import Any

import pytest
from trainers import needs_version

needs_version("openrlhf", "0.11.2")

import openrlhf_imports  # noqa: F401
from openrlhf.models import loss as losses
from openrlhf.models import utils
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from verify_runs import keys_of, keys_with

from ppo_fast.referee.verify import Report, verify

PARTS = {
    "policy_loss": {"mask.multiply", "ratio.clamp"},
    "value_loss": {"mask.multiply"},
    "kl": {"kl.clamp"},
    "gae": {"gae.zero", "mask.multiply"},
    "whiten": {"whiten.biased", "mask.multiply"},
    "group_norm_advantages": set(),
    "dr_grpo_advantages": set(),
    "rloo_advantages": set(),
    "logprobs": set(),
    "entropy": {"entropy.inf"},
}


@pytest.fixture(scope="module")
def report() -> Report:
    return verify("openrlhf")


@pytest.mark.parametrize("part", PARTS)
def test_openrlhf_as_it_is(report: Report, part: str) -> None:
    assert report.version == "0.11.2" and len(report.parts) == len(PARTS)
    assert keys_of(report, part) == PARTS[part]


def test_sequences() -> None:
    """GSPO is averaged over sequences, those without a token left out, as its comment says."""
    report = verify("openrlhf", {"policy_loss_type": "gspo"})
    assert keys_of(report, "policy_loss") == {"denominator.empty-rows", "mask.multiply"}
    documented = {one.key: one.documented for one in report.findings}
    assert documented["denominator.empty-rows"] is not None


POLICY, VALUE = losses.PolicyLoss.forward, losses.ValueLoss.forward


@pytest.mark.parametrize(
    ("part", "function", "before", "after", "options", "found"),
    [
        ("policy_loss", POLICY, "batch_num_tokens=batch_num_tokens", "batch_num_tokens=None", {},
         {"denominator.micro-batch"}),
        ("policy_loss", POLICY, "loss = -torch.min(surr1, surr2)",
         "loss = -torch.max(surr1, surr2)", {}, {"clip.min"}),
        ("policy_loss", POLICY, "self.dual_clip * advantages)", "-self.dual_clip * advantages)",
         {"dual_clip": 3.0}, {"unknown"}),
        ("value_loss", VALUE, "torch.max(surr1, surr2)", "surr1", {}, {"value.larger"}),
        ("value_loss", VALUE, "return 0.5 * loss", "return loss", {}, {"value.factor"}),
        ("kl", utils.compute_approx_kl, "k3_log_ratio = log_ratio", "k3_log_ratio = (-log_ratio)",
         {}, {"kl.-k3"}),
        ("gae", RemoteExperienceMaker.get_advantages_and_returns, "gamma * lambd * lastgaelam",
         "gamma * lastgaelam", {}, {"gae.lam", "gae.zero"}),
    ],
)  # fmt: skip
def test_a_planted_fault_is_named(
    part: str, function: Any, before: str, after: str, options: dict[str, Any], found: set[str]
) -> None:
    keys = keys_with("openrlhf", part, function, before, after, **options)
    assert found <= keys <= found | PARTS[part]
