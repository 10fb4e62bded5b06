"""TRL's experimental trainers that the adapter for GRPO reaches: the table of its page."""

from __future__ import annotations

import importlib
import sys

import pytest
import tiny
import torch
from trainers import needs_version

needs_version("trl", "1.16.0")

import trl_grpo_run
from trl.trainer import utils

from ppo_fast import integrations, testing
from ppo_fast.integrations import trl_grpo

TIMES = ("step_time", "epoch")
ON_LOGITS = {
    "a2po.a2po_trainer": "selective_log_softmax",
    "cpo.cpo_trainer": "selective_log_softmax",
    "orpo.orpo_trainer": "selective_log_softmax",
    "sdft.sdft_trainer": "selective_log_softmax",
    "sdft.loss_utils": "selective_log_softmax",
    "sdpo.sdpo_trainer": "selective_log_softmax",
    "sdpo.loss_utils": "selective_log_softmax",
    "tpo.tpo_trainer": "selective_log_softmax_and_entropy",
}


def test_experimental_trainers_on_logits() -> None:
    """The modules that import the functions by name, and CPO's and ORPO's call of it."""
    modules = {f"trl.experimental.{name}": key for name, key in ON_LOGITS.items()}
    held = {name: getattr(importlib.import_module(name), key) for name, key in modules.items()}
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 6, 11), torch.randint(11, (3, 6))
    labels[0, :4] = -100
    trainers = [
        vars(importlib.import_module(f"trl.experimental.{name}"))[f"{name.upper()}Trainer"]
        for name in ("cpo", "orpo")
    ]
    theirs = [each.get_batch_logps(logits, labels.clone()) for each in trainers]
    with trl_grpo.patched(("logprobs",)) as calls:
        for name, key in modules.items():
            assert getattr(sys.modules[name], key) is getattr(utils, key) is not held[name]
        ours = [each.get_batch_logps(logits, labels.clone()) for each in trainers]
        assert calls["logprobs"].fused == 2
    for a, b in zip(ours, theirs, strict=True):
        testing.assert_within_budget(a, b, condition=5 * 12.0, ops=4 * 11 + 5)
    assert {name: getattr(sys.modules[name], key) for name, key in modules.items()} == held


def test_experimental_gmpo(monkeypatch: pytest.MonkeyPatch) -> None:
    """A subclass of GRPOTrainer with a loss of its own: the head is reached, the loss is not."""
    from trl.experimental import gmpo

    monkeypatch.setattr("trl.GRPOTrainer", gmpo.GMPOTrainer)
    monkeypatch.setattr("trl.GRPOConfig", gmpo.GMPOConfig)
    theirs = trl_grpo_run.run()
    with trl_grpo.patched(("linear_logprobs",)) as calls:
        ours = trl_grpo_run.run()
    tiny.assert_same_run(ours, theirs, 12, TIMES)
    assert calls["linear_logprobs"].fused >= 24
    with (
        pytest.raises(integrations.NeverReachedError, match="trl_grpo: loss: patched and never"),
        trl_grpo.patched(),
    ):
        trl_grpo_run.run(max_steps=1)
