"""Tests of the rollout benchmark: its count of tokens, and its refusal to time wrong results."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from loop_helpers import trainer

from benchmarks.loop.rollout import Workload
from ppo_fast.loop.data.sequences import Rollout


def test_both_providers_pass_the_gate_and_are_counted_alike(tmp_path: Path) -> None:
    t = trainer(tmp_path)
    work = Workload(t, 8, 6, list(range(0, 300, 4)))
    work.check()
    seqs = work.ours()
    assert work.count(seqs.response) == int(seqs.mask.sum()) < 48
    assert work.theirs().shape[0] == 8


def test_tokens_behind_the_first_eos_do_not_count(tmp_path: Path) -> None:
    work = Workload(trainer(tmp_path), 8, 6, [7, 9])
    assert work.count(torch.tensor([[1, 7, 0, 9], [9, 9, 9, 9], [1, 2, 3, 4]])) == 2 + 1 + 4


def test_wrong_logprobs_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Workload(trainer(tmp_path), 8, 6, [0])
    seqs, logprobs, _ = work._rollout(1.0)
    monkeypatch.setattr(work, "_rollout", lambda temperature: Rollout(seqs, logprobs + 0.01))
    with pytest.raises(AssertionError, match=r"log-probs are 1\.0e-02 off the training forward's"):
        work.check()
