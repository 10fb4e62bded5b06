"""Each case's inputs as an op call, and the bytes and operations that it cannot do without.

Packed sequences' offsets, 8 bytes a sequence, are not counted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from benchmarks.ops.case import BACKWARD, BOTH, DTYPES, PACKED, TIME_MAJOR, Case, Shape
from benchmarks.ops.linear import LINEAR, LINEAR_LOSS, LOGITS_LOSS, LOSSES, head_call
from ppo_fast.testing import Call, gae_call, rlhf_call, value_call, whiten_call

# The settings RLHF trainers use; the same for every provider.
PPO_OPTIONS: dict[str, Any] = {
    "clip_low": 0.2, "clip_high": 0.2, "entropy_coef": 0.01, "kl_coef": 0.05, "kl_clamp": 10.0,
    "reduction": "token-mean",
}  # fmt: skip
GAE_OPTIONS: dict[str, Any] = {"gamma": 0.99, "lam": 0.95}


class Cost(NamedTuple):
    """The least traffic (each input read and each output written once a pass) and arithmetic."""

    bytes: int
    flops: int


def make_call(case: Case) -> Call:
    """The case's inputs on its device, the same in every process there."""
    dims, dtype = case.shape.dims, DTYPES[case.dtype]
    if case.op == "token_logprobs":
        call = _logprobs_call(dims, dtype, case.device)
    elif case.op in (LINEAR, *LOSSES):
        call = head_call(case.op, dims, dtype, case.device, PPO_OPTIONS)
    elif case.op == "ppo_loss":
        call = _ppo_call(dims, dtype)
    elif case.op == "value_loss":
        call = value_call(dims, dtype=dtype, mask=None).replace(mask=_responses(dims))
    elif case.op == "gae":
        call = _gae_call(case.shape, dtype)
    elif case.op == "rlhf_advantages":
        call = rlhf_call(dims, dtype=dtype, bootstrap=False, **GAE_OPTIONS)
        call = call.replace(mask=_responses(dims))
    else:
        call = whiten_call(dims, dtype=dtype, mask=None).replace(mask=_responses(dims))
    return on(call if case.differentiates else call._replace(cotangents={}), case.device)


def on(call: Call, device: str) -> Call:
    """The call with its tensors on a device."""
    tensors, cotangents = (
        {name: x.to(device) for name, x in group.items()}
        for group in (call.tensors, call.cotangents)
    )
    return call._replace(tensors=tensors, cotangents=cotangents)


def _logprobs_call(dims: tuple[int, ...], dtype: torch.dtype, device: str) -> Call:
    """Logits are drawn where they stay: a GPU's would take a CPU ten seconds."""
    torch.manual_seed(0)
    rows = dims[0]
    logits = torch.randn(dims, device=device).mul_(3.0).to(dtype)
    tokens = torch.randint(dims[1], (rows,), device=device)
    cotangents = {name: torch.randn(rows, device=device) for name in ("logprobs", "entropy")}
    tensors = {"logits": logits, "tokens": tokens}
    return Call("token_logprobs", tensors, {"temperature": 1.0}, cotangents)


def _gae_call(shape: Shape, dtype: torch.dtype) -> Call:
    """Whole sequences; packed ones are cut at random places."""
    sequences, tokens = shape.dims
    if shape.layout == PACKED:
        call = gae_call((shape.numel,), dtype=dtype, mask=None, extras=(), **GAE_OPTIONS)
        generator = torch.Generator().manual_seed(1)
        cuts = torch.randperm(shape.numel - 1, generator=generator)[: sequences - 1] + 1
        ends = torch.tensor([0, shape.numel])
        return call.replace(cu_seqlens=torch.cat([cuts, ends]).sort().values)
    if shape.layout == TIME_MAJOR:
        options = {**GAE_OPTIONS, "time_major": True}
        return gae_call((tokens, sequences), dtype=dtype, mask=None, extras=(), **options)
    return gae_call((sequences, tokens), dtype=dtype, mask=None, extras=(), **GAE_OPTIONS)


def _responses(dims: tuple[int, ...]) -> torch.Tensor:
    """The mask of right-padded responses, each half to all of its row."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(dims[1] // 2, dims[1] + 1, (dims[0], 1), generator=generator)
    return torch.arange(dims[1]) < lengths


def _ppo_call(dims: tuple[int, ...], dtype: torch.dtype) -> Call:
    """A policy some steps from the one that sampled: a tenth of its ratios are clipped."""
    generator = torch.Generator().manual_seed(0)

    def normal(scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(dims, generator=generator) * scale).to(dtype)

    logprobs, ratio = -normal(2.0).abs(), normal(0.15).exp()
    # Statistics count clipped tokens: none may stand where rounding decides on which side.
    for bound in (1 - PPO_OPTIONS["clip_low"], 1 + PPO_OPTIONS["clip_high"]):
        ratio = torch.where((ratio - bound).abs() < 1e-3, bound + 1e-2, ratio)
    tensors = {
        "logprobs": logprobs,
        "old_logprobs": logprobs - ratio.log(),
        "advantages": normal(),
        "mask": _responses(dims),
        "entropy": normal().abs(),
        "ref_logprobs": logprobs + normal(0.1),
    }
    return Call("ppo_loss", tensors, dict(PPO_OPTIONS), {"loss": torch.ones(())})


def cost(case: Case) -> Cost:
    """Least bytes moved and operations (exp, log and division count one each)."""
    n, wide = case.shape.numel, DTYPES[case.dtype].itemsize
    rows = case.shape.dims[0]
    both = case.direction == BOTH
    if case.op == "token_logprobs":
        # Forward: the logits, 8 bytes of token and 8 of results a row; subtract, exp, add,
        # multiply, add. Backward: the logits again and their gradient; 8 more operations.
        forward = Cost(n * wide + rows * 16, 5 * n)
        backward = Cost(2 * n * wide + rows * 24, 8 * n)
        if case.direction == BACKWARD:
            return backward
        return Cost(*map(sum, zip(forward, backward, strict=True))) if both else forward
    if case.op == LOGITS_LOSS:
        # The logits and their gradient once; softmax and gradient.
        return Cost((2 if both else 1) * n * wide + rows * 32, (13 if both else 5) * n)
    if case.op in (LINEAR, LINEAR_LOSS):
        # Hidden states and head once, tokens and results; the product and the softmax of it.
        # Backward: both gradients, and two more products.
        vocab, width = case.shape.dims[1:]
        moved = (rows + vocab) * width * wide
        passes = 3 if both and case.op == LINEAR_LOSS else 4 if both else 1
        return Cost((2 if both else 1) * moved + rows * 32,
                    passes * 2 * n * width + (13 if both else 5) * n)  # fmt: skip
    if case.op == "ppo_loss":
        # Five floats and a mask byte in, two gradients out.
        return Cost(n * (5 * wide + 1 + (8 if both else 0)), 60 * n)
    if case.op == "value_loss":
        return Cost(n * (3 * wide + 1 + (4 if both else 0)), 20 * n)
    if case.op == "gae":
        return Cost(n * (2 * wide + 8), 8 * n)
    if case.op == "rlhf_advantages":
        return Cost(n * (3 * wide + 1 + 16), 14 * n)
    return Cost(n * (wide + 1 + 4), 3 * n)


def gradient_mb(case: Case) -> float:
    """What a head's gradients by hidden states and weight take of a peak, in MB."""
    if case.op != LINEAR_LOSS or not case.differentiates:
        return 0.0
    rows, vocab, width = case.shape.dims
    return (rows + vocab) * width * DTYPES[case.dtype].itemsize / 2**20
