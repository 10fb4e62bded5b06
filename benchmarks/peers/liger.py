"""Liger: its log-softmax of the sampled tokens, its cross-entropy, and its fused head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops import teacher
from benchmarks.ops.case import Case
from benchmarks.peers.base import (
    BF16_LOGITS,
    Bound,
    Provider,
    leaves,
    needs,
    pair,
    restore,
    single,
    timed,
)
from ppo_fast.testing import Call

_PACKAGE = "liger-kernel==0.8.5"
_MEAN_ALONE = "the mean alone, no row's divergence or entropy"
# Rows of a chunk of its losses in PyTorch, which it compiles.
_ROWS = 1024


def of(case: Case) -> Iterator[Provider]:
    """Triton kernels on a GPU; the heads have a PyTorch fallback for a CPU."""
    rounded = 0.0 if case.dtype == "fp32" else BF16_LOGITS
    if case.op == "linear_token_logprobs":
        missing = needs("liger_kernel.ops.fused_linear_scaled_cross_entropy", _PACKAGE)
        yield Provider("liger", _head, missing, roundings=rounded)
    if case.op == "linear_divergence":
        yield _heads(case, rounded)
    if case.device != "cuda":
        return
    if case.op == "divergence" and case.differentiates:
        missing = needs("liger_kernel.transformers.functional", _PACKAGE, gpu=True)
        yield Provider("liger", _jsd, missing, computes=f"{_MEAN_ALONE}, of PyTorch's log-softmax")
    if case.op == "token_logprobs" and case.differentiates:
        yield Provider(
            "liger",
            _cross_entropy,
            needs("liger_kernel.transformers.functional", _PACKAGE, gpu=True),
            computes="log-prob only; the forward forms the gradient, in place",
            roundings=rounded,  # to the logits' precision in the forward, and again scaled
        )
    elif case.op == "token_logprobs":
        missing = needs("liger_kernel.ops.grpo_loss", _PACKAGE, gpu=True)
        yield Provider("liger", _selective, missing, computes="log-prob only, no entropy")


def _selective(case: Case, call: Call) -> Bound:
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    # It wants the logits of one position more than there are tokens.
    logits = torch.cat([call.tensors["logits"], call.tensors["logits"][:1]])[None]
    tokens = call.tensors["tokens"][None]
    return Bound(
        lambda: fused_selective_log_softmax(logits, tokens, 1.0), lambda out: {"logprobs": out[0]}
    )


def _cross_entropy(case: Case, call: Call) -> Bound:
    from liger_kernel.transformers.functional import liger_cross_entropy

    tensors, inputs = leaves(case, call)

    def run() -> Tensor:
        # Its kernel writes to the logits, which autograd forbids of a leaf: a view of one.
        logits = tensors["logits"].view_as(tensors["logits"])
        return -liger_cross_entropy(logits, tensors["tokens"], reduction="none")

    again = restore(tensors, call, "logits")
    named = single("logprobs")
    return timed(case, call, run, inputs, named, only="logprobs", prepare=again)


def _head(case: Case, call: Call) -> Bound:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction,
    )

    t = call.tensors

    def run() -> Any:
        loss, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(
            t["hidden"], t["weight"], t["tokens"], 1.0, -100, 1, True
        )
        return -loss, entropy

    return Bound(run, pair("logprobs", "entropy"))


def _heads(case: Case, rounded: float) -> Provider:
    """Both heads: fused with its kernels on a GPU, chunks of compiled PyTorch on a CPU."""
    on_gpu = case.device == "cuda"
    module = "ops.fused_linear_jsd" if on_gpu else "chunked_loss.jsd_loss"
    missing = needs(f"liger_kernel.{module}", _PACKAGE, gpu=on_gpu)
    bind = _fused_heads if on_gpu else _chunked_heads
    return Provider("liger", bind, missing, roundings=rounded, computes=_MEAN_ALONE)


def _chunked_heads(case: Case, call: Call) -> Bound:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

    t, inputs = leaves(case, call)
    heads = (t["hidden"], t["weight"], t["teacher_hidden"], t["teacher_weight"])
    labels, beta = t["mask"].long(), teacher.beta_of(call)  # none of them is ignored

    def run() -> Tensor:
        loss: Tensor = LigerFusedLinearJSDFunction.apply(
            *heads, labels, None, None, 0.0, 1.0, beta, -100, 1.0, True, _ROWS, False
        )
        return loss

    return timed(case, call, run, inputs, single("loss"))


def _fused_heads(case: Case, call: Call) -> Bound:
    from liger_kernel.transformers.functional import liger_fused_linear_jsd

    t, inputs = leaves(case, call)
    heads = (t["hidden"], t["weight"], t["teacher_hidden"], t["teacher_weight"])
    beta = teacher.beta_of(call)
    return timed(
        case,
        call,
        lambda: liger_fused_linear_jsd(*heads, jsd_beta=beta, accum_dtype=torch.float32),
        inputs,
        single("loss"),
    )


def _jsd(case: Case, call: Call) -> Bound:
    from liger_kernel.transformers.functional import liger_jsd

    t, inputs = leaves(case, call)
    beta = teacher.beta_of(call)

    def run() -> Tensor:
        both = (x.float().log_softmax(-1) for x in (t["logits"], t["teacher_logits"]))
        loss: Tensor = liger_jsd(*both, beta=beta)
        return loss

    return timed(case, call, run, inputs, single("loss"))
