"""Inputs that several ops share: trainers' settings, masks, policies, logits and heads."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

import ppo_fast
from benchmarks.ops.case import DTYPES, Case
from ppo_fast.testing import Call

# The settings RLHF trainers use; the same for every provider.
PPO_OPTIONS: dict[str, Any] = {
    "clip_low": 0.2,
    "clip_high": 0.2,
    "entropy_coef": 0.01,
    "kl_coef": 0.05,
    "kl_clamp": 10.0,
    "reduction": "token-mean",
}
GAE_OPTIONS: dict[str, Any] = {"gamma": 0.99, "lam": 0.95}

# The standard deviation of logits.
_SCALE = 3.0


def on(call: Call, device: str) -> Call:
    """The call with its tensors on a device."""
    tensors, cotangents = (
        {name: x.to(device) for name, x in group.items()}
        for group in (call.tensors, call.cotangents)
    )
    return call._replace(tensors=tensors, cotangents=cotangents)


def responses(dims: tuple[int, ...]) -> Tensor:
    """The mask of right-padded responses, each half to all of its row."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(dims[1] // 2, dims[1] + 1, (dims[0], 1), generator=generator)
    return torch.arange(dims[1]) < lengths


def off_the_bounds(ratio: Tensor, within: float, step: float) -> Tensor:
    """Ratios of which none is `within` a clip bound, where rounding would decide on its side."""
    for bound in (1 - PPO_OPTIONS["clip_low"], 1 + PPO_OPTIONS["clip_high"]):
        ratio = torch.where((ratio - bound).abs() < within, bound + step, ratio)
    return ratio


def logprobs_inputs(
    case: Case, tokens: Tensor | None = None, support: ppo_fast.Support | None = None
) -> Call:
    """Log-probabilities and entropies of tokens, from logits or from hidden states × head.

    Tokens are uniform over the vocabulary where none are given.
    """
    tensors = head_tensors(case, tokens)
    rows = case.shape.dims[0]
    cotangents = {k: torch.randn(rows, device=case.device) for k in ("logprobs", "entropy")}
    return Call(case.op, tensors, _over(support), cotangents)


def policy_loss_inputs(
    case: Case, tokens: Tensor | None = None, support: ppo_fast.Support | None = None
) -> Call:
    """The loss of a policy some steps from the one that sampled, from logits or from a head.

    Tokens are uniform over the vocabulary where none are given.
    """
    tensors = head_tensors(case, tokens)
    logprobs = _logprobs(tensors, _over(support))
    ratio = off_the_bounds(torch.randn_like(logprobs).mul(0.15).exp(), 1e-2, 3e-2)
    tensors |= {
        "old_logprobs": logprobs - ratio.log(),
        "advantages": torch.randn_like(logprobs),
        "ref_logprobs": logprobs + 0.1 * torch.randn_like(logprobs),
        "mask": torch.ones_like(logprobs, dtype=torch.bool),
    }
    options = PPO_OPTIONS | _over(support)
    return Call(case.op, tensors, options, {"loss": torch.ones((), device=case.device)})


def _over(support: ppo_fast.Support | None) -> dict[str, Any]:
    """The option of a support, if there is one."""
    return {} if support is None else {"support": support}


def head_tensors(case: Case, tokens: Tensor | None = None) -> dict[str, Tensor]:
    """Tokens, and logits or (with a hidden size) hidden states and weight."""
    torch.manual_seed(0)
    (rows, vocab, *width), dtype, device = case.shape.dims, DTYPES[case.dtype], case.device
    drawn = torch.randint(vocab, (rows,), device=device)
    tensors = {"tokens": drawn if tokens is None else tokens}
    if width:
        weight = torch.randn(vocab, *width, device=device) * (_SCALE / math.sqrt(*width))
        tensors["hidden"] = torch.randn(rows, *width, device=device).to(dtype)
        tensors["weight"] = weight.to(dtype)
    else:
        tensors["logits"] = torch.randn(rows, vocab, device=device).mul_(_SCALE).to(dtype)
    return tensors


def _logprobs(tensors: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
    if isinstance(tensors["tokens"], FakeTensor):
        return torch.empty(tensors["tokens"].shape)
    with torch.no_grad():
        if "logits" in tensors:
            return ppo_fast.token_logprobs(tensors["logits"], tensors["tokens"]).logprobs
        return ppo_fast.linear_token_logprobs(**tensors, **options).logprobs
