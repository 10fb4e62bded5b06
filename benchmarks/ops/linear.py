"""Calls of the head: hidden states × head, or logits, and the loss of what comes out of them."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

import ppo_fast
from ppo_fast.testing import Call

LINEAR = "linear_token_logprobs"
LINEAR_LOSS = "linear_ppo_loss"
LOGITS_LOSS = "logits_ppo_loss"
LOSSES = (LINEAR_LOSS, LOGITS_LOSS)


def head_call(
    op: str,
    dims: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    options: dict[str, Any],
    scale: float = 3.0,
) -> Call:
    """Rows × vocabulary (× hidden size); the logits' standard deviation is `scale`."""
    torch.manual_seed(0)
    rows, vocab, *width = dims
    tensors = {"tokens": torch.randint(vocab, (rows,), device=device)}
    if width:
        weight = torch.randn(vocab, *width, device=device) * (scale / math.sqrt(*width))
        tensors["hidden"] = torch.randn(rows, *width, device=device).to(dtype)
        tensors["weight"] = weight.to(dtype)
    else:
        tensors["logits"] = torch.randn(dims, device=device).mul_(scale).to(dtype)
    if op == LINEAR:
        cotangents = {k: torch.randn(rows, device=device) for k in ("logprobs", "entropy")}
        return Call(op, tensors, {}, cotangents)
    tensors |= _policy(_logprobs(tensors), options)
    return Call(op, tensors, dict(options), {"loss": torch.ones((), device=device)})


def _logprobs(tensors: dict[str, Tensor]) -> Tensor:
    if isinstance(tensors["tokens"], FakeTensor):
        return torch.empty(tensors["tokens"].shape)
    with torch.no_grad():
        if "logits" in tensors:
            return ppo_fast.token_logprobs(tensors["logits"], tensors["tokens"]).logprobs
        return ppo_fast.linear_token_logprobs(**tensors).logprobs


def _policy(logprobs: Tensor, options: dict[str, Any]) -> dict[str, Tensor]:
    """A policy some steps from the one that sampled; no ratio where rounding decides on a clip."""
    ratio = torch.randn_like(logprobs).mul(0.15).exp()
    for bound in (1 - options["clip_low"], 1 + options["clip_high"]):
        ratio = torch.where((ratio - bound).abs() < 1e-2, bound + 3e-2, ratio)
    return {
        "old_logprobs": logprobs - ratio.log(),
        "advantages": torch.randn_like(logprobs),
        "ref_logprobs": logprobs + 0.1 * torch.randn_like(logprobs),
        "mask": torch.ones_like(logprobs, dtype=torch.bool),
    }


def gemms(call: Call) -> Any:
    """The three products of a head's step, in chunks of the height that is fastest here."""
    hidden, weight = call.tensors["hidden"], call.tensors["weight"]
    rows, vocab = hidden.shape[0], weight.shape[0]
    dx, dw = torch.empty_like(hidden), torch.zeros_like(weight)

    def step(height: int, z: Tensor) -> list[Tensor]:
        for start in range(0, rows, height):
            x = hidden[start : start + height]
            part = z[: len(x)]
            torch.mm(x, weight.t(), out=part)
            torch.mm(part, weight, out=dx[start : start + height])
            torch.addmm(dw, part.t(), x, beta=float(start > 0), out=dw)
        return [dx, dw]

    def chunk(height: int) -> Any:
        z = torch.empty(height, vocab, dtype=hidden.dtype, device=hidden.device)
        return lambda: step(height, z)

    return [chunk(height) for height in sorted({min(rows, h) for h in (512, 1024, 2048)})]


def product(hidden: Tensor, weight: Tensor) -> list[Tensor]:
    """The forward's one product."""
    return [F.linear(hidden, weight)]
