"""token_logprobs in CUDA C++: slices streamed through shared memory or read where they stand, over
blocks or not, the same bits.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import usable
from torch import Tensor

import ppo_fast
from ppo_fast import _ext, testing

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and not _ext.EMULATED,
    reason="both paths run on one machine only where it is emulated",
)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def emulated() -> None:
    usable("cuda")


def results(logits: Tensor, tokens: Tensor, **options: Any) -> list[Tensor]:
    """Log-probabilities, entropies and gradients of both."""
    logits = logits.detach().requires_grad_()
    with testing.poisoned_allocations():
        out = ppo_fast.token_logprobs(logits, tokens, backend="cuda", **options)
        (1.5 * out.logprobs.sum() + 0.5 * out.entropy.sum()).backward()
    assert logits.grad is not None
    return [out.logprobs.detach(), out.entropy.detach(), logits.grad]


def same(xs: list[Tensor], ys: list[Tensor]) -> bool:
    return all(testing.same_bits(x, y) for x, y in zip(xs, ys, strict=True))


@pytest.mark.parametrize("vocab", [300, 513, 1999, 4097, 9001])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_streaming_keeps_the_bits(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, vocab: int
) -> None:
    """Rows streamed on sm_90 and read in place on sm_80; odd rows start anywhere."""
    g = torch.Generator().manual_seed(vocab)
    logits = (4 * torch.randn(5, vocab, generator=g)).to(dtype)
    tokens = torch.randint(vocab, (5,), generator=g)
    tokens[3] = -100
    streamed = results(logits, tokens)
    monkeypatch.setenv("PPO_FAST_CUDA_EMULATE", "80")
    assert same(results(logits, tokens), streamed)


@pytest.mark.parametrize("capability", ["90", "80"])
def test_a_row_keeps_its_bits_wherever_it_starts(
    monkeypatch: pytest.MonkeyPatch, capability: str
) -> None:
    """Every distance from 16 bytes, for the logits and for their gradient."""
    monkeypatch.setenv("PPO_FAST_CUDA_EMULATE", capability)
    vocab, tokens = 4099, torch.tensor([4098, 7])
    logits = torch.randn(2, vocab, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    aligned = results(logits, tokens)
    for shift in range(1, 9):
        memory = torch.full((2, vocab + 16), float("nan"), dtype=logits.dtype)
        row = memory[:, shift : shift + vocab]
        row.copy_(logits)
        assert same(results(row, tokens), aligned), shift


@pytest.mark.parametrize("capability", ["90", "80"])
def test_in_place_is_the_gradient(monkeypatch: pytest.MonkeyPatch, capability: str) -> None:
    """Odd rows share 16 bytes with their neighbours; nothing beside the gradient is written."""
    monkeypatch.setenv("PPO_FAST_CUDA_EMULATE", capability)
    memory = torch.randn(7, 4103, generator=torch.Generator().manual_seed(5))
    before, tokens = memory.clone(), torch.arange(0, 3500, 500)
    logits = memory[:, 1:4100]
    want = results(logits.clone(), tokens)[2]
    leaf = logits.detach().requires_grad_()
    out = ppo_fast.token_logprobs(leaf, tokens, inplace_backward=True, backend="cuda")
    (1.5 * out.logprobs.sum() + 0.5 * out.entropy.sum()).backward()
    assert testing.same_bits(memory[:, 1:4100], want)
    assert testing.same_bits(memory[:, :1], before[:, :1])
    assert testing.same_bits(memory[:, 4100:], before[:, 4100:])


def test_slices_too_long_to_stream() -> None:
    """64 slices at the most: those of a long row do not fit shared memory."""
    vocab = 64 * 4096 + 5
    call = testing.logprobs_call((1,), vocab, mask=None)
    testing.assert_agrees(call, "cuda")
