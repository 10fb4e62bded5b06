"""Liger: its log-softmax of the sampled tokens, its cross-entropy, and its fused head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

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


def of(case: Case) -> Iterator[Provider]:
    """Triton kernels on a GPU; the head has a PyTorch fallback for a CPU."""
    rounded = 0.0 if case.dtype == "fp32" else BF16_LOGITS
    if case.op == "linear_token_logprobs":
        missing = needs("liger_kernel.ops.fused_linear_scaled_cross_entropy", _PACKAGE)
        yield Provider("liger", _head, missing, roundings=rounded)
    if case.device != "cuda":
        return
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
