"""TRL's PPOTrainer: ten updates on ppo_fast against ten of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from trainers import needs

needs("trl_ppo")

import trl_ppo_run
from trainer_sides_helpers import prepared, updates
from trl.experimental.ppo import ppo_trainer
from trl.trainer import utils

from benchmarks.loop.equal_work import Work, differences
from ppo_fast import integrations
from ppo_fast.integrations import trl_ppo

TIMES = ("eps",)


@pytest.mark.parametrize(
    "options",
    [{}, {"kl_estimator": "k3", "gamma": 0.9, "lam": 0.8, "temperature": 0.6, "cliprange": 0.02}],
    ids=["defaults", "options"],
)
def test_a_run_is_the_same(options: dict[str, Any]) -> None:
    theirs = trl_ppo_run.run(**options)
    with trl_ppo.patched() as calls:
        ours = trl_ppo_run.run(**options)
    tiny.assert_same_run(ours, theirs, 10, TIMES)
    # 10 updates of 2 roll-outs (2 log-probs each), 2 epochs, 4 micro-batches
    assert {op: n.fused for op, n in calls.items()} == {
        "logprobs": 120,
        "whiten": 10,
        "gae": 10,
        "value_loss": 80,
        "policy_loss": 80,
    }
    assert not any(n.left for n in calls.values())


def test_it_is_patched_at_every_import_site_and_put_back() -> None:
    original, train = utils.selective_log_softmax, ppo_trainer.PPOTrainer.train
    places = trl_ppo.apply()
    assert {
        "trl.trainer.utils.selective_log_softmax",
        "trl.experimental.ppo.ppo_trainer.selective_log_softmax",
        "trl.experimental.ppo.ppo_trainer.masked_whiten",
        "trl.experimental.ppo.ppo_trainer.PPOTrainer.train",
    } <= set(places)
    assert ppo_trainer.selective_log_softmax is utils.selective_log_softmax is not original
    with pytest.raises(integrations.NeverReachedError, match="logprobs, whiten, gae, value_loss"):
        trl_ppo.revert()
    assert ppo_trainer.selective_log_softmax is utils.selective_log_softmax is original
    assert ppo_trainer.PPOTrainer.train is train


def test_several_tokens_a_row_are_left_to_trl() -> None:
    logits, index = torch.randn(2, 3, 7), torch.randint(7, (2, 3, 2))
    theirs = utils.selective_log_softmax(logits, index)
    with (
        pytest.warns(RuntimeWarning, match="several tokens a row"),
        trl_ppo.patched(("logprobs",)) as calls,
    ):
        assert torch.equal(utils.selective_log_softmax(logits, index), theirs)
    assert (calls["logprobs"].fused, calls["logprobs"].left) == (0, 1)


def test_a_trainer_that_is_older_but_known() -> None:
    """GRPO's tests run with later versions; its source is that of theirs."""
    from ppo_fast.integrations import trl_grpo

    with pytest.warns(RuntimeWarning, match=r"trl_grpo: trl 1\.1\d\.0 is patched although not"):
        trl_grpo.apply()
    with pytest.raises(integrations.NeverReachedError, match="loss, logprobs"):
        trl_grpo.revert()


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_it_does_the_work_of_the_loop_in_the_benchmark(tmp_path: Path, critic: str) -> None:
    work = Work("ppo", 4, 3, epochs=2, minibatches=2, micro_batch=2, critic=critic)
    folder = prepared(tmp_path)
    theirs, ours = (updates(side, work, folder, 3) for side in ("trl-ppo", "ppo_fast"))
    for own, other in zip(ours, theirs, strict=True):
        assert differences(own.counts, other.counts) == []
        assert other.counts.trained_tokens == other.counts.value_tokens == 2 * 4 * 3
        assert other.counts.logprobs == 2 * 4 * 3 and other.counts.optimizer_steps == 4
        assert min(other.phases.values()) > 0 and 0.0 <= other.reward <= 1.0


def test_a_micro_batch_below_the_minibatch_is_refused(tmp_path: Path) -> None:
    """TRL would step the optimiser after each, and not after the minibatch."""
    work = Work("ppo", 4, 3, minibatches=2, micro_batch=1, critic="shared")
    with pytest.raises(ValueError, match="micro_batch must be a minibatch for TRL's PPO, got 1"):
        updates("trl-ppo", work, tmp_path, 1)
