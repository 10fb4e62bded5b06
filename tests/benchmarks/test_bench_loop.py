"""Each op's share of a training step: forward and backward, nothing else, nothing changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ppo_fast
from benchmarks.harness.measure import Outcome
from benchmarks.loop import bench_update, watch
from benchmarks.ops.case import Case, Shape
from ppo_fast import testing


class Foreign(torch.autograd.Function):
    """Passes a gradient on, and takes its time over it."""

    @staticmethod
    def forward(ctx: Any, late: list[float], x: torch.Tensor) -> torch.Tensor:
        ctx.late = late
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor]:
        ctx.late[0] += 100.0
        return None, grad


def test_only_the_op_s_own_nodes_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves by 1 when read, and by 100 in each node around the op."""
    now = [0.0]

    def read() -> float:
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr(watch.time, "perf_counter", read)
    x = torch.randn(3, 7, requires_grad=True)
    tokens = torch.tensor([0, 3, 6])
    with watch.watched(torch.device("cpu")) as seconds:
        out = ppo_fast.token_logprobs(Foreign.apply(now, x), tokens, backend="reference")
        (Foreign.apply(now, out.logprobs) + out.entropy).sum().backward()
    assert now[0] > 200.0
    assert list(seconds) == ["token_logprobs"]
    assert seconds["token_logprobs"] == 2.0  # from read to read: once forward, once backward


@pytest.mark.parametrize("op", ["token_logprobs", "ppo_loss", "value_loss"])
def test_watching_changes_no_bit(backend: str, device: str, op: str) -> None:
    call = testing.FACTORIES[op]((2, 5), device=device)
    want = testing.run(call, backend)
    with watch.watched(torch.device(device)) as seconds:
        got = testing.run(call, backend)
    assert seconds[op] > 0.0
    assert all(testing.same_bits(got[name], want[name]) for name in want)


def test_shares_are_of_each_provider_s_own_step() -> None:
    case = Case("ppo_update", "step", Shape("tiny", (8, 6)))
    parts = {
        "step": {"a": Outcome("ok", "", [2.0, 4.0, 3.0]), "b": Outcome("ok", "", [6.0])},
        "gae": {"a": Outcome("ok", "", [1.5]), "b": Outcome("ok", "", [1.5])},
    }
    rows = bench_update.loop_rows(case, parts)
    found = {(row["direction"], row["provider"]): row["share"] for row in rows}
    assert found == {("step", "a"): 1.0, ("step", "b"): 1.0, ("gae", "a"): 0.5, ("gae", "b"): 0.25}
