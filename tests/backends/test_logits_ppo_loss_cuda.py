"""The CUDA kernels of logits_ppo_loss: clusters of every size, rows that follow each other through
the stages, rows that start anywhere, and fp32 rows whose gradient takes half their place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import one_pass_helpers
import pytest
import torch
from conftest import usable
from head_helpers import short_chunks
from one_pass_helpers import assert_narrowed, assert_same, fused, make, narrowed, op
from torch import Tensor

from ppo_fast import testing
from ppo_fast._boundary.schema import HANDLES
from ppo_fast.testing import linear_ppo_call, same_bits

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# By dtype, a V whose rows three of which fit one block, two, four, eight, and none.
SIZES = {
    torch.float32: (2049, 30000, 60000, 90001, 160001),
    torch.bfloat16: (2049, 60000, 120000, 200001, 320001),
}
OLDER = "import sys, test_logits_ppo_loss_cuda as t; t.save(sys.argv[1])"

pytestmark = pytest.mark.usefixtures("kernel")


@pytest.fixture(params=["cuda"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(one_pass_helpers, "BACKEND", usable(request.param))
    return request.param


@pytest.mark.parametrize("dtype", SIZES, ids=str)
@pytest.mark.parametrize("size", range(5))
def test_cluster_sizes(device: str, dtype: torch.dtype, size: int) -> None:
    vocab = SIZES[dtype][size]
    args = make(device, (2,), vocab, dtype=dtype, without=("mask",), entropy_coef=0.5)
    args.tokens[0] = vocab - 1
    assert_same(args)


@pytest.mark.parametrize("vocab", [2056, 4099])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows_follow_each_other(device: str, dtype: torch.dtype, vocab: int) -> None:
    """More rows than stages, some that do not count; of an odd V, each starts elsewhere."""
    args = make(device, (11,), vocab, dtype=dtype)
    args.mask[:] = torch.arange(11, device=device) % 4 != 1
    args.weights[5] = 0.0
    whole = assert_same(args)
    order = torch.tensor([7, 1, 5, 0], device=device)
    picked = {
        k: x[order]
        for k, x in args._asdict().items()
        if isinstance(x, Tensor) and x.dim() and k != "moments"
    }
    for x, y in zip(fused(args._replace(**picked)), whole, strict=True):
        assert same_bits(x, y[order])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("vocab", [37, 2051, 9001])
def test_the_gradient_may_start_elsewhere_than_its_row(
    device: str, dtype: torch.dtype, vocab: int
) -> None:
    """All but the last token of several odd sequences, into a contiguous gradient."""
    args = make(device, (3, 2), vocab, dtype=dtype)
    longer = torch.cat([args.logits, args.logits[:, :1]], 1)
    got, want = (op("logits_ppo_loss")(*a) for a in (args._replace(logits=longer[:, :-1]), args))
    assert all(same_bits(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("vocab", [60000, 90000, 160001])
def test_gradients_of_half_the_width(device: str, vocab: int) -> None:
    """Of clusters of every size, and beyond."""
    assert_narrowed(make(device, (2,), vocab, without=("moments",)))


@pytest.mark.parametrize("variant", ["clip", "linear"])
@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
def test_the_heads_middle_is_one_launch(
    device: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, variant: str
) -> None:
    """Its gradients are within budget, and no kernel of softmax or gradient has run."""
    short_chunks(monkeypatch)
    for name in ("logprobs_fwd", "logprobs_bwd_"):
        monkeypatch.delitem(HANDLES[name], "cuda")
    call = linear_ppo_call(
        (5, 7), device=device, dtype=dtype, variant=variant, log_ratio_clamp=3.0
    )
    testing.assert_agrees(call, "cuda")


@pytest.mark.parametrize("options", [{"softcap": 4.0}, {"dtype": torch.float16}], ids=str)
def test_heads_whose_middle_is_several(
    device: str, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    short_chunks(monkeypatch)
    call = linear_ppo_call((5, 7), device=device, log_ratio_clamp=3.0, **options)
    testing.assert_agrees(call, "cuda")


def results() -> list[Tensor]:
    """Of both kernels' paths: a warp's rows, a block's and a cluster's."""
    out: list[Tensor] = []
    for vocab in (301, 9001, 50257):
        args = make("cuda" if torch.cuda.is_available() else "cpu", (3,), vocab)
        out += [*fused(args), *narrowed(args)]
    return [x.cpu() for x in out]


def save(path: str) -> None:
    """For another process: see below."""
    one_pass_helpers.BACKEND = usable("cuda")
    torch.save(results(), path)


@pytest.mark.case("D8")
def test_older_gpus_give_the_same_bits(device: str, tmp_path: Path) -> None:
    """Emulated at sm_80: rows are read twice there, which must not show."""
    if device != "cpu":
        pytest.skip("a GPU is as old as it is")
    path = str(tmp_path / "results")
    env = os.environ | {"PPO_FAST_CUDA_EMULATE": "80", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(
        [sys.executable, "-c", OLDER, path], env=env, cwd=Path(__file__).parent, check=True
    )
    for x, y in zip(torch.load(path), results(), strict=True):
        assert same_bits(x, y)
