"""Triton's kernels of divergence: gradients in bf16 over fp32 logits, tilings, launches."""

from __future__ import annotations

import math

import aot
import launches
import pytest
import torch
from conftest import usable
from divergence_rows import Rows, assert_agrees, given, make, results
from torch import Tensor

from ppo_fast._boundary import calls_divergence
from ppo_fast.teacher import KINDS
from ppo_fast.testing import same_bits

NAN = math.nan
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(params=["triton"])
def kernel(request: pytest.FixtureRequest) -> str:
    return usable(request.param)


def assert_narrowed(kernel: str, rows: Rows, kind: str, logits: Tensor) -> Tensor:
    """The gradient written over `logits`, a copy of the rows', is the wide one, rounded."""
    s, softmax, t = given(kernel, rows, kind, 0.3)
    _, kl = calls_divergence.divergence_fwd(kernel, rows.logits, s, softmax, t)
    grads = (rows.g, rows.h, rows.c)
    wide = calls_divergence.divergence_bwd(kernel, rows.logits, s, softmax, t, kl, grads)
    assert rows.logits.shape[-1] == 1 or bool(wide.any())
    calls_divergence.divergence_bwd_bf16_(kernel, logits, s, softmax, t, kl, grads)
    assert same_bits(logits.view(torch.bfloat16)[..., : logits.shape[-1]], wide.bfloat16())
    return wide


# Rows within a step, of whole steps (512 and 2048), of more, and of several segments.
@pytest.mark.parametrize("vocab", [1, 37, 512, 2048, 2056, 9001, 70001])
@every_kind
def test_half_the_width(kernel: str, device: str, kind: str, vocab: int) -> None:
    """With rows masked and rows without a gradient."""
    rows = make(device, (4,) if vocab < 10000 else (2,), vocab)
    mask = torch.ones(rows.g.shape, dtype=torch.bool, device=device)
    mask[1] = False
    for x in (rows.g, rows.h, rows.c):
        x[2:3] = 0.0
    assert_narrowed(kernel, rows._replace(mask=mask), kind, rows.logits.clone())


@pytest.mark.parametrize("extra", [1, 2, 4])
def test_rows_of_half_the_width_start_anywhere(kernel: str, device: str, extra: int) -> None:
    """And nothing beside them is written."""
    rows = make(device, (2, 2), 2053)
    buffer = torch.full((2, 2, 2053 + extra), NAN, device=device)
    view = buffer[..., extra:]
    view.copy_(rows.logits)
    assert_narrowed(kernel, rows, "jsd", view)
    assert bool(buffer[..., :extra].isnan().all())


@every_kind
def test_bad_rows_of_half_the_width(kernel: str, device: str, kind: str) -> None:
    rows = make(device, vocab=90)
    rows.logits[0, 5] = NAN
    rows.teacher[2, 7] = math.inf
    wide = assert_narrowed(kernel, rows, kind, rows.logits.clone())
    assert wide.isnan().all(-1).tolist() == [True, False, True, False, False]


def test_other_logits_are_refused(kernel: str, device: str) -> None:
    rows = make(device, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="logits must be float32"):
        assert_narrowed(kernel, rows, "reverse", rows.logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [512, 2048, 2049, 2050, 4096, 34824])
def test_every_tiling(kernel: str, device: str, vocab: int, dtype: torch.dtype) -> None:
    """Of either tiling rows of whole steps, and others; one beyond a segment by a step."""
    rows = make(device, (2,), vocab, dtype)
    assert_agrees(results(kernel, rows, "mixed", 0.3), rows, "mixed", 0.3)


def test_a_row_of_several_segments_has_its_own_bits(kernel: str, device: str) -> None:
    """Alone, and over its logits."""
    rows = make(device, (2,), 33001)
    whole = results(kernel, rows, "jsd", 0.3)
    for name, x in results(kernel, rows.row(1), "jsd", 0.3).items():
        assert same_bits(x, whole[name][1:]), name
    s, softmax, t = given(kernel, rows, "jsd", 0.3)
    calls_divergence.divergence_bwd_(
        kernel, rows.logits, s, softmax, t, whole["kl"], (rows.g, rows.h, rows.c)
    )
    assert same_bits(rows.logits, whole["dz"])


def test_counters_are_zero_again(
    kernel: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And rows that are not live leave them alone."""
    from ppo_fast.kernels import divergence

    count = torch.zeros(8, dtype=torch.int32, device=device)
    monkeypatch.setattr(divergence, "row_counters", lambda like, rows: count)
    rows = make(device, (3,), 70001)
    mask = torch.tensor([True, False, True], device=device)
    rows = rows._replace(mask=mask)
    s, softmax, t = given(kernel, rows, "jsd", 0.3)
    once, again = (
        calls_divergence.divergence_fwd(kernel, rows.logits, s, softmax, t) for _ in range(2)
    )
    assert all(same_bits(x, y) for x, y in zip(once, again, strict=True))
    assert bool(once[0][mask].all()) and not bool(count.any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_kind
def test_launches_are_registered(kernel: str, device: str, kind: str, dtype: torch.dtype) -> None:
    """One reads both rows, two form the gradient; narrow rows, wide ones, and of two segments."""
    from ppo_fast.kernels import common

    if device != "cpu" or not common.INTERPRETED:
        pytest.skip("the interpreter's launches are what is watched")
    for vocab in (33, 40000):
        rows = make(device, (1,), vocab, dtype)
        one = rows._replace(temperature=0.7, teacher_temperature=0.7, mask=rows.g.bool())
        s, softmax, t = given(kernel, rows, kind, 0.3)
        with launches.watch() as launched:
            calls_divergence.divergence_fwd(kernel, rows.logits, s, softmax, t)
        assert launched == {"divergence_kernel"}
        with launches.watch() as launched:
            results(kernel, one, kind, 0.3)
            for grads in ((None, rows.h, rows.c), (rows.g, None, rows.c)):
                short = t._replace(logits=rows.teacher[..., :33])
                logits = rows.logits[..., :33]
                calls_divergence.divergence_bwd(kernel, logits, s, softmax, short, rows.c, grads)
                if dtype == torch.float32:
                    args = (s, softmax, short, rows.c, grads)
                    calls_divergence.divergence_bwd_bf16_(kernel, logits.clone(), *args)
        tables = (aot.table(stem) for stem in ("divergence", "divergence_grad"))
        own = {e.kernel.__name__ for table in tables for e in table}
        assert launched == own | {"segments_kernel"}
