"""Kernels of logprobs: gradients in bf16 over fp32 logits, which are the wide ones, rounded, where
the rows start; and the merge of a row's segments by the last of its programs.
"""

from __future__ import annotations

from types import SimpleNamespace

import launches
import one_pass_helpers
import pytest
import torch
from conftest import usable
from one_pass_helpers import half_width, make
from torch import Tensor

from ppo_fast._boundary import calls
from ppo_fast._boundary.schema import backends_of
from ppo_fast.testing import same_bits

pytestmark = pytest.mark.usefixtures("kernel")


@pytest.fixture(params=backends_of("logprobs_bwd_bf16_"))
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(one_pass_helpers, "BACKEND", usable(request.param))
    return request.param


def assert_narrowed(
    kernel: str, args: one_pass_helpers.Args, logits: Tensor, g: Tensor | None, h: Tensor | None
) -> None:
    """The gradient written over `logits`, a copy of the args', is the wide one, rounded."""
    s = args.scoring()
    softmax = calls.logprobs_fwd(kernel, logits, s)
    wide = calls.logprobs_bwd(kernel, logits, s, softmax, g, h)
    assert args.logits.shape[-1] == 1 or bool(wide.any())
    calls.logprobs_bwd_bf16_(kernel, logits, s, softmax, g, h)
    assert same_bits(half_width(logits), wide.bfloat16())


@pytest.mark.parametrize("vocab", [1, 37, 2048, 2056, 9001, 70001])
def test_vocabularies(kernel: str, device: str, vocab: int) -> None:
    """Rows of several segments too, with rows masked and rows without a gradient."""
    args = make(device, (5,) if vocab < 10000 else (2,), vocab)
    g = args.advantages.clone()
    h = args.weights.clone()
    g[3:4], h[3:4] = 0.0, 0.0
    assert_narrowed(kernel, args, args.logits.clone(), g, h)


@pytest.mark.parametrize("extra", [1, 2, 4])
def test_rows_start_anywhere(kernel: str, device: str, extra: int) -> None:
    """And nothing beside them is written."""
    args = make(device, (2, 2), 2053)
    buffer = torch.full((2, 2, 2053 + extra), float("nan"), device=device)
    view = buffer[..., extra:]
    view.copy_(args.logits)
    assert_narrowed(kernel, args, view, args.advantages, None)
    assert bool(buffer[..., :extra].isnan().all())


def test_bad_rows(kernel: str, device: str) -> None:
    args = make(device, (4,), 40)
    args.logits[0, 5] = float("inf")
    args.tokens[2] = 40
    assert_narrowed(kernel, args, args.logits.clone(), args.advantages, args.weights)


def test_other_logits_are_refused(kernel: str, device: str) -> None:
    args = make(device, dtype=torch.bfloat16)
    s = args.scoring()
    softmax = calls.logprobs_fwd(kernel, args.logits, s)
    with pytest.raises((ValueError, RuntimeError), match="logits must be float32"):
        calls.logprobs_bwd_bf16_(kernel, args.logits, s, softmax, args.advantages, None)


@pytest.mark.parametrize("kernel", ["triton"], indirect=True)
@pytest.mark.parametrize("vocab", [1, 16, 33, 40000])
def test_launches_are_registered(kernel: str, device: str, vocab: int) -> None:
    if device != "cpu":
        pytest.skip("the interpreter's launches are what is watched")
    args = make(device, (2,), vocab)
    with launches.watch() as launched:
        assert_narrowed(kernel, args, args.logits.clone(), args.advantages, args.weights)
    assert "dlogits_kernel" in launched


@pytest.mark.parametrize("kernel", ["triton"], indirect=True)
def test_counters_are_zero_again(
    kernel: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And rows that are not live leave them alone."""
    from ppo_fast.kernels import logprobs

    given = torch.zeros(8, dtype=torch.int32, device=device)
    monkeypatch.setattr(logprobs, "row_counters", lambda like, rows: given)
    args = make(device, (3,), 70001)
    once, again = (calls.logprobs_fwd(kernel, args.logits, args.scoring()) for _ in range(2))
    assert all(same_bits(x, y) for x, y in zip(once, again, strict=True))
    assert bool(once.logprobs[[0, 2]].all()) and not bool(once.logprobs[1])
    assert not bool(given.any())


@pytest.mark.parametrize("kernel", ["triton"], indirect=True)
def test_one_launch(kernel: str, device: str) -> None:
    if device != "cpu":
        pytest.skip("the interpreter's launches are what is watched")
    args = make(device, (2,), 40000)
    with launches.watch() as launched:
        calls.logprobs_fwd(kernel, args.logits, args.scoring())
    assert launched == {"segments_kernel"}


@pytest.mark.parametrize("kernel", ["triton"], indirect=True)
def test_launches_of_few_rows_count_in_memory_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets of counters for streams and captured launches, on 16 bytes; many rows get their own."""
    from ppo_fast.kernels import common

    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None))
    sets = common._Counters(torch.device("cpu")).free_rows
    assert len(sets) == common.ROW_SETS and not any(bool(x.any()) for x in sets)
    assert all(len(x) == common.ROW_COUNTERS and x.data_ptr() % 16 == 0 for x in sets)
    many = common.ROW_COUNTERS + 1
    assert len(common.row_counters(torch.zeros(1), many)) == many
