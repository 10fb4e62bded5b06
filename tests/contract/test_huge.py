"""Offsets above 2³¹ elements, in sparse files: what is never touched takes no memory.

A kernel that forms an offset in 32 bits reads elsewhere, and here everything else is zeros.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import ppo_fast
from ppo_fast import testing
from ppo_fast.testing import Call, run, same_bits

FAR = 2**30 + 3  # the third row starts beyond 2^31 elements
OPS: dict[str, dict[str, object]] = {
    "token_logprobs": {"temperature": 0.7, "inplace_backward": True},
    "ppo_loss": {},
    "value_loss": {},
    "gae": {"extras": ("next_values", "terminated", "truncated", "rho", "c", "lam")},
    "rlhf_advantages": {},
    "whiten": {},
}


def sparse(folder: Path, n: int, dtype: torch.dtype) -> Tensor:
    """n zeros in a file that takes no room on the disk, as a tensor."""
    name = str(folder / f"{len(list(folder.iterdir()))}.bin")
    return torch.from_file(name, shared=True, size=n, dtype=dtype)


def far_apart(folder: Path, x: Tensor) -> Tensor:
    """x with its first dimension's rows FAR elements apart."""
    if x.dim() < 2:
        return x
    strides = (FAR, *x[0].contiguous().stride())
    room = FAR * (len(x) - 1) + x[0].numel()
    out = sparse(folder, room, x.dtype).as_strided(x.shape, strides)
    out.copy_(x)
    return out


@pytest.mark.case("L1", "L2")
@pytest.mark.parametrize("op", OPS)
def test_rows_far_apart(tmp_path: Path, kernel: str, op: str) -> None:
    """The same bits as rows side by side, gradients too."""
    shape = (3, 2) if op == "token_logprobs" else (3, 9)
    call = testing.FACTORIES[op](shape, **OPS[op])
    spread = {k: far_apart(tmp_path, v) for k, v in call.tensors.items()}
    far = run(Call(op, spread, call.options, call.cotangents), kernel)
    for name, x in run(call, kernel).items():
        assert same_bits(far[name], x), name


@pytest.mark.case("L1")
def test_more_than_int32_logits(tmp_path: Path) -> None:
    """16,800 rows of 128,256 logits, of which those that the mask drops are never read."""
    rows, vocab = 16_800, 128_256
    logits = sparse(tmp_path, rows * vocab, torch.bfloat16).view(rows, vocab)
    live = [0, rows // 2, rows - 1]
    call = testing.logprobs_call((3,), vocab, dtype=torch.bfloat16, mask=None, temperature=0.7)
    mask = torch.zeros(rows, dtype=torch.bool)
    tokens = torch.zeros(rows, dtype=torch.int64)
    mask[live], tokens[live] = True, call.tensors["tokens"]
    for row, x in zip(live, call.tensors["logits"], strict=True):
        logits[row] = x
    far = ppo_fast.token_logprobs(logits, tokens, mask=mask, temperature=0.7, backend="cpu")
    near = ppo_fast.token_logprobs(**call.tensors, temperature=0.7, backend="cpu")
    assert same_bits(far.logprobs[mask], near.logprobs)
    assert same_bits(far.entropy[mask], near.entropy)
    touched = sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir())
    assert touched < 4 * vocab * 2, "masked rows were written"


@pytest.mark.case("L2")
@pytest.mark.long
def test_more_than_int32_elements() -> None:
    """One value 2^31 + 9 times over: counts and sums are exact."""
    n = 2**31 + 9
    x = torch.full((1,), 0.5).expand(n)
    count, mean, spread = torch.ops.ppo_fast.moments.cpu(x, None).tolist()
    assert (count, mean, spread) == (n, 0.5, 0.0)
    loss = ppo_fast.value_loss(
        x, None, torch.zeros(1).expand(n), clip=None, reduction="token-sum", backend="cpu"
    )
    assert loss.stats.field("vf_n_tokens") == n
    assert float(loss.loss) == float(torch.tensor(n * 0.125))
