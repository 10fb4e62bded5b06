"""`ppo-fast verify trl`: what differs today, and faults planted in copies of GRPO's loss."""

from __future__ import annotations

from typing import Any

import pytest
from trainers import needs_version

needs_version("trl", "1.16.0")

from trl.trainer.grpo_trainer import GRPOTrainer
from verify_runs import keys_of, keys_with

from ppo_fast.referee.verify import Report, verify

LOSS = GRPOTrainer._compute_loss
# A NaN in a padded slot: TRL multiplies by the mask.
MASK = {"mask.multiply"}


@pytest.fixture(scope="module")
def report() -> Report:
    return verify("trl")


@pytest.mark.parametrize(
    ("part", "found"),
    [
        ("policy_loss", MASK),
        ("group_advantages", set()),
        ("logprobs", set()),
        ("entropy", {"entropy.inf"}),
    ],
)
def test_grpo_as_it_is(report: Report, part: str, found: set[str]) -> None:
    assert report.version.startswith("1.16") and len(report.parts) == 4
    assert keys_of(report, part) == found


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"loss_type": "grpo", "beta": 0.04}, MASK),
        ({"loss_type": "bnpo", "entropy_coef": 0.01}, {"denominator.micro-batch", *MASK}),
        ({"loss_type": "dapo", "entropy_coef": 0.01}, {"entropy.micro-batch", *MASK}),
        ({"loss_type": "dr_grpo"}, MASK),
        ({"loss_type": "luspo"}, MASK),
        ({"loss_type": "sapo"}, MASK),
        ({"loss_type": "cispo", "epsilon_high": 5.0}, {"clip.itself", *MASK}),
        ({"loss_type": "grpo", "importance_sampling_level": "sequence", "delta": 4.0}, MASK),
    ],
    ids=lambda x: "-".join(map(str, x.values())) if isinstance(x, dict) else "",
)
def test_loss_types(options: dict[str, Any], found: set[str]) -> None:
    assert keys_of(verify("trl", options), "policy_loss") == found


def test_bnpos_denominator_is_documented() -> None:
    report = verify("trl", {"loss_type": "bnpo"})
    documented = {one.key: one.documented for one in report.findings}
    assert "normalised over the local batch" in str(documented["denominator.micro-batch"])
    assert documented["mask.multiply"] is None


def test_scaling_by_the_batch() -> None:
    for scale in ("batch", "none"):
        assert not keys_of(verify("trl", {"scale_rewards": scale}), "group_advantages")


@pytest.mark.parametrize(
    ("before", "after", "options", "found"),
    [
        (
            "loss = (per_token_loss * mask).sum() / normalizer",
            "loss = (per_token_loss * mask).sum() / mask.sum() / normalizer * normalizer"
            " / self.current_gradient_accumulation_steps",
            {},
            {"denominator.micro-batch"},
        ),
        (
            "loss = (per_token_loss * mask).sum() / normalizer",
            "loss = (per_token_loss * (mask | torch.nn.functional.pad(mask, (1, -1)))).sum()"
            " / normalizer",
            {},
            {"mask.longer"},
        ),
        (
            "torch.exp(ref_per_token_logps - per_token_logps)"
            " - (ref_per_token_logps - per_token_logps) - 1",
            "torch.exp(per_token_logps - ref_per_token_logps)"
            " - (per_token_logps - ref_per_token_logps) - 1",
            {"beta": 0.04},
            {"kl.-k3"},
        ),
        (
            "per_token_loss + self.beta * per_token_kl",
            "per_token_loss - self.beta * per_token_kl",
            {"beta": 0.04},
            {"kl.sign"},
        ),
        (
            "(entropies * effective_mask).sum() / effective_mask.sum().clamp(min=1.0) /",
            "entropies.mean() /",
            {"entropy_coef": 0.01},
            {"entropy.mask"},
        ),
        (
            "torch.clamp(coef_1, 1 - self.epsilon_low, 1 + self.epsilon_high)",
            "torch.clamp(coef_1, 1 - self.epsilon_high, 1 + self.epsilon_low)",
            {"epsilon_high": 0.28},
            {"clip.swapped"},
        ),
        (
            "per_token_loss = -torch.min(per_token_loss1, per_token_loss2)",
            "per_token_loss = torch.min(per_token_loss1, per_token_loss2)",
            {},
            {"sign"},
        ),
    ],
)
def test_a_planted_fault_is_named(
    before: str, after: str, options: dict[str, Any], found: set[str]
) -> None:
    keys = keys_with("trl", "policy_loss", LOSS, before, after, **options)
    assert found <= keys <= found | MASK
