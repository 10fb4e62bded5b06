"""Out of memory halves the micro-batches once; a gradient that is not finite changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_helpers import batch_of, gradients, trainer, weights
from rich.console import Console
from transformers import AutoModelForCausalLM

from ppo_fast.loop import Trainer
from ppo_fast.loop.model.agent import NonFiniteGradientError
from ppo_fast.loop.model.memory import OutOfMemoryStopError, halves
from ppo_fast.loop.update import accumulate

QUIET = Console(quiet=True)
FORWARDS = 4  # of a scoring pass over 8 rows, 2 at a time; a minibatch then has 2


def refused() -> None:
    """A request that the CPU's allocator refuses."""
    torch.empty(2**60)


def refused_by_cuda() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def failing(t: Trainer, calls: set[int], fail: Any = refused, backward: bool = False) -> list[int]:
    """Let the training forward (or its backward) fail at `calls`, counted from 0; rows of each."""
    original, rows = t.agent.policy.hidden, []

    def hidden(seqs: Any, frozen_out: Any) -> torch.Tensor:
        rows.append(len(seqs.tokens))
        fails = len(rows) - 1 in calls
        if fails and not backward:
            fail()
        out = original(seqs, frozen_out)
        if fails:
            out.register_hook(lambda grad: fail())
        return out

    t.agent.policy.hidden = hidden  # type: ignore[method-assign]
    return rows


@pytest.mark.case("R6")
@pytest.mark.parametrize("fail", [refused, refused_by_cuda])
def test_out_of_memory_in_scoring_gives_the_halved_run(tmp_path: Path, fail: Any) -> None:
    t = trainer(tmp_path / "halved", dtype=torch.float64)
    rows = failing(t, {1}, fail)
    want = trainer(tmp_path / "small", dtype=torch.float64, micro_batch=1)
    ours, theirs = t.step(), want.step()
    assert t.agent.memory.halved and not want.agent.memory.halved
    assert rows == [2, 2] + 8 * [1] + 16 * [1]  # two epochs
    assert all(map(torch.equal, weights(t), weights(want)))
    assert ours["loss"] == theirs["loss"] and ours["steps"] == theirs["steps"] == 4


@pytest.mark.case("R6")
@pytest.mark.parametrize("fail", [refused, refused_by_cuda])
@pytest.mark.parametrize("backward", [False, True])
def test_out_of_memory_in_a_minibatch_repeats_it_from_no_gradient(
    tmp_path: Path, fail: Any, backward: bool
) -> None:
    """It fails in the second micro-batch, when the first's gradient is already there."""
    t = trainer(tmp_path / "halved", dtype=torch.float64)
    rows = failing(t, {FORWARDS + 1}, fail, backward)
    want = trainer(tmp_path / "small", dtype=torch.float64, micro_batch=1)
    ours, theirs = t.step(), want.step()
    assert t.agent.memory.halved and rows == FORWARDS * [2] + [2, 2] + 16 * [1]
    for a, b in zip(weights(t), weights(want), strict=True):
        # Adam's 4 steps of lr 1e-3 divide a rounding of 2**-53 by |g| + 1e-5.
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert ours["n_tokens"] == theirs["n_tokens"]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-12)


def test_a_repeated_minibatch_has_the_halved_gradient(tmp_path: Path) -> None:
    t = trainer(tmp_path, dtype=torch.float64)
    _, batch, plan = batch_of(t)
    small = [[half for rows in part for half in halves(rows)] for part in plan]
    accumulate(t.agent, batch, small[0], 0.0, t.backend)
    want = gradients(t)
    t.agent.discard()
    failing(t, {1})
    t.agent.memory.run(lambda: accumulate(t.agent, batch, plan[0], 0.0, t.backend))
    assert all(map(torch.equal, gradients(t), want))


@pytest.mark.case("R6")
def test_out_of_memory_again_stops_the_run(tmp_path: Path) -> None:
    """In a later update, even: what is finished stays."""
    t = trainer(tmp_path)
    rows = failing(t, {1})
    t.step()
    failing(t, {0})
    kept = weights(t)
    message = r"out of memory although micro-batches were halved: lower micro_batch \(.*allocate"
    with pytest.raises(OutOfMemoryStopError, match=message):
        t.run(QUIET)
    assert rows[-1] == 1 and not gradients(t)
    assert all(map(torch.equal, weights(t), kept))
    assert [json.loads(x)["update"] for x in (tmp_path / "log.jsonl").open()] == [0]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_out_of_memory_of_a_sharded_rank_stops_at_once(tmp_path: Path) -> None:
    t = trainer(tmp_path)
    t.agent.memory.sharded = True
    rows = failing(t, {0})
    with pytest.raises(OutOfMemoryStopError, match=r"under fsdp2: lower micro_batch \("):
        t.step()
    assert len(rows) == 1 and not t.agent.memory.halved


def test_another_error_is_not_taken_for_it(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    t = trainer(tmp_path)
    rows = failing(t, {1}, fail)
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2 shapes cannot be multiplied$"):
        t.step()
    assert len(rows) == 2 and not t.agent.memory.halved


def poisoned(t: Trainer, steps: set[int], value: float) -> None:
    """Put `value` in the gradient at optimiser steps `steps`, which must change nothing then."""
    original, count = t.agent.step, iter(range(10**6))

    def everything() -> list[torch.Tensor]:
        state = t.agent.optimizer.state
        moments = [x.clone() for p in t.agent.parameters for x in state.get(p, {}).values()]
        return weights(t) + moments

    def step() -> float | None:
        if next(count) not in steps:
            return original()
        t.agent.parameters[0].grad.view(-1)[0] = value
        before = everything()
        try:
            norm = original()
        finally:
            assert all(map(torch.equal, before, everything())) and not gradients(t)
        assert norm is None
        return norm

    t.agent.step = step  # type: ignore[method-assign]


@pytest.mark.case("R7")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_gradient_that_is_not_finite_is_skipped(tmp_path: Path, value: float) -> None:
    t = trainer(tmp_path)
    poisoned(t, {0, 2}, value)
    record = t.step()
    assert (record["skipped"], record["steps"], t.agent.skips) == (2, 2, 0)
    assert 0 < record["grad_norm"] < torch.inf and all(w.isfinite().all() for w in weights(t))
    assert [json.loads(x)["skipped"] for x in (tmp_path / "log.jsonl").open()] == [2]
    assert t.step()["skipped"] == 0


def test_an_update_whose_every_step_is_skipped_is_logged(tmp_path: Path) -> None:
    t = trainer(tmp_path, epochs=1, minibatches=1)
    poisoned(t, {0}, torch.nan)
    before = weights(t)
    record = t.step()
    assert (record["skipped"], record["steps"]) == (1, 0) and "loss" not in record
    assert all(map(torch.equal, before, weights(t)))


def test_a_finite_gradient_in_between_resets_the_count(tmp_path: Path) -> None:
    t = trainer(tmp_path)
    poisoned(t, {0, 1, 3, 4, 6, 7}, torch.nan)
    assert [t.step()["skipped"] for _ in range(3)] == [3, 3, 0]


@pytest.mark.case("R7")
def test_three_in_a_row_stop_the_run_and_leave_what_is_finished(tmp_path: Path) -> None:
    t = trainer(tmp_path)
    poisoned(t, {3, 4, 5}, torch.nan)  # an update has 4 steps
    message = "the gradient's norm was nan in 3 optimiser steps in a row, all skipped"
    with pytest.raises(NonFiniteGradientError, match=message):
        t.run(QUIET)
    lines = [json.loads(x) for x in (tmp_path / "log.jsonl").open()]
    assert [(x["update"], x["skipped"]) for x in lines] == [(0, 1)]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    pairs = zip(saved.parameters(), t.agent.policy.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
