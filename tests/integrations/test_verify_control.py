"""`ppo-fast verify` of the control libraries and of TRL's PPO: what differs today."""

from __future__ import annotations

from typing import Any

import pytest
from trainers import needs_version
from verify_runs import keys_of, keys_with

from ppo_fast.referee.verify import verify

ONE_STEP = {"policy_loss": set(), "whiten": set()}
EXPECTED: dict[str, tuple[str, str, dict[str, set[str]]]] = {
    "sb3": (
        "stable_baselines3", "2.9.2", {"gae": set(), "value_loss": {"value.larger"}, **ONE_STEP}
    ),
    "torchrl": ("torchrl", "0.14.1", {"gae": set(), "vec_gae": set(), "policy_loss": set()}),
    "tianshou": ("tianshou", "2.0.1", {"gae": set(), "value_loss": set(), **ONE_STEP}),
    "skrl": (
        "skrl", "2.1.1",
        {"gae": {"gae.goes-on"}, "value_loss": {"value.larger"}, "policy_loss": set()},
    ),
    "cleanrl": (
        "cleanrl", "1.2.0", {"gae": {"gae.truncation"}, "value_loss": set(), **ONE_STEP}
    ),
    "trl_ppo": (
        "trl", "1.12.0",
        {
            "policy_loss": {"denominator.micro-batch", "mask.multiply"},
            "value_loss": {"denominator.micro-batch", "mask.multiply"},
            "gae": set(),
            "whiten": {"mask.multiply"},
            "logprobs": set(),
        },
    ),
}  # fmt: skip


def required(trainer: str) -> dict[str, set[str]]:
    package, version, parts = EXPECTED[trainer]
    try:
        needs_version(package, version)
    except pytest.skip.Exception as error:
        pytest.skip(str(error))
    return parts


@pytest.mark.parametrize("trainer", EXPECTED)
def test_the_trainer_as_it_is(trainer: str) -> None:
    parts = required(trainer)
    report = verify(trainer)
    assert {part.name: keys_of(report, part.name) for part in report.parts} == parts


@pytest.mark.parametrize(
    ("trainer", "options", "part", "found"),
    [
        ("skrl", {"time_limit_bootstrap": True}, "gae", set()),
        ("sb3", {"clip_range_vf": None}, "value_loss", set()),
        ("tianshou", {"dual_clip": 3.0}, "policy_loss", set()),
        ("tianshou", {"value_clip": False}, "value_loss", set()),
        ("cleanrl", {"clip_vloss": False}, "value_loss", set()),
    ],
)
def test_options(trainer: str, options: dict[str, Any], part: str, found: set[str]) -> None:
    required(trainer)
    assert keys_of(verify(trainer, options), part) == found


def test_planted_faults_in_skrl() -> None:
    required("skrl")
    from skrl.agents.torch.ppo.ppo import compute_gae

    keys = keys_with("skrl", "gae", compute_gae, "lambda_coefficient * advantage", "advantage")
    assert keys == {"gae.lam", "gae.goes-on"}
    keys = keys_with(
        "skrl", "gae", compute_gae, "advantages.std()", "advantages.std(correction=0)"
    )
    assert keys == {"whiten.biased", "gae.goes-on"}
