"""TRL: log-probability and entropy in one pass over the logits, and over hidden × head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.ops import teacher
from benchmarks.ops.case import Case
from benchmarks.peers.base import (
    BF16_LOGITS,
    Bound,
    Provider,
    batched,
    leaves,
    needs,
    pair,
    timed,
)
from ppo_fast.testing import Call

_PACKAGE = "trl==1.16.0"
# The width of a chunk of the vocabulary in its trainers.
_CHUNK = 32768


def of(case: Case) -> Iterator[Provider]:
    """Its Triton kernels on a GPU, its PyTorch functions on a CPU."""
    if case.is_call:
        return
    if case.op == "token_logprobs":
        module = "trl.kernels" if case.device == "cuda" else "trl.trainer.utils"
        yield Provider("trl", _logits, needs(module, _PACKAGE))
    if case.op == "linear_token_logprobs":
        rounded = 0.0 if case.dtype == "fp32" else BF16_LOGITS
        yield Provider("trl", _linear, needs("trl.kernels", _PACKAGE), roundings=rounded)
    if case.op == "linear_token_stats":
        rounded = 0.0 if case.dtype == "fp32" else BF16_LOGITS
        needed = needs("trl.kernels", _PACKAGE)
        yield Provider("trl", _stats, needed, roundings=rounded, computes="5 of 6 statistics")
    if case.op in ("linear_divergence", "linear_token_divergence"):
        yield Provider("trl", _divergence, needs("trl.kernels.chunked_divergence", _PACKAGE))


def _logits(case: Case, call: Call) -> Bound:
    if case.device == "cuda":
        from trl.kernels import selective_log_softmax_and_entropy
    else:
        from trl.trainer.utils import selective_log_softmax_and_entropy
    tensors, inputs = leaves(case, call)

    def run() -> Any:
        out = selective_log_softmax_and_entropy(
            batched(tensors["logits"]), batched(tensors["tokens"])
        )
        return tuple(x.flatten() for x in out)

    return timed(case, call, run, inputs, pair("logprobs", "entropy"))


def _linear(case: Case, call: Call) -> Bound:
    from trl.kernels import ChunkedLogProbFunction

    t = call.tensors

    def run() -> Any:
        return ChunkedLogProbFunction.apply(
            t["hidden"], t["weight"], None, t["tokens"], 1.0, _CHUNK, None, 1.0, ("entropy",)
        )[:2]

    return Bound(run, pair("logprobs", "entropy"))


def _stats(case: Case, call: Call) -> Bound:
    from trl.kernels import ChunkedLogProbFunction

    t = call.tensors
    names = pair("logprobs", "entropy", "log_sum_sq_probs", "mean_logit", "is_top1")
    head = (t["hidden"], t["weight"], None, t["tokens"], 1.0, _CHUNK)
    return Bound(lambda: ChunkedLogProbFunction.apply(*head), names)


def _divergence(case: Case, call: Call) -> Bound:
    """By both heads' tiles of 4096 rows and 32768 of the vocabulary, formed anew each time."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    t, inputs = leaves(case, call)
    heads = (t["hidden"], t["weight"], None, t["teacher_hidden"], t["teacher_weight"], None)
    beta = teacher.beta_of(call)
    mean = case.op == "linear_divergence"
    names = pair(*(("loss",) if mean else ()), "divergence", "entropy")

    def run() -> Any:
        rows, entropy = ChunkedDivergenceFunction.apply(*heads, beta)
        return (rows.mean(), rows, entropy) if mean else (rows, entropy)

    return timed(case, call, run, inputs, names)
