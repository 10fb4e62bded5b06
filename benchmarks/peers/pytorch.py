"""Plain PyTorch: the functions of `eager`, as they are and compiled, and the ceilings."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops import teacher
from benchmarks.ops.case import Case
from benchmarks.peers import ceilings, eager
from benchmarks.peers.base import (
    BF16_LOGITS,
    Bound,
    Named,
    Provider,
    leaves,
    pair,
    single,
    timed,
)
from benchmarks.peers.layout import SequenceRows
from ppo_fast import TokenStats
from ppo_fast.testing import Call

# About six launches a step: beyond this many a call takes seconds on a GPU.
_MOST_STEPS = 16384
_LINEAR = (
    "linear_token_logprobs",
    "linear_token_stats",
    "linear_ppo_loss",
    "linear_token_divergence",
    "linear_divergence",
)


def of(case: Case) -> Iterator[Provider]:
    """Eager and compiled, or the loop, and the ceiling: what no such op can be faster than."""
    if case.is_call:
        return
    if case.op in ("gae", "rlhf_advantages"):
        bind = _gae_loop if case.op == "gae" else _rlhf_loop
        yield Provider("loop", bind, lambda: _too_long(case), plain=True)
    elif case.op in _PLAIN:
        yield _function(case, "eager")
        yield _function(case, "compile", compiled=True)
    if case.op == "linear_token_logprobs":
        yield Provider(
            "linear-ce",
            _linear_ce,
            _no_linear_ce,
            roundings=_rounded(case),
            computes="log-prob only, no entropy; in chunks, never whole logits",
        )
    yield from _ceilings(case)


def _ceilings(case: Case) -> Iterator[Provider]:
    """The head's products, or the traffic of what the op reads and writes."""
    heads_step = case.op != "linear_token_logprobs" and case.differentiates
    if case.op in _LINEAR and heads_step:
        if case.dtype == "fp32":
            yield Provider("gemms", _gemms, ceiling=True)
    elif case.op in ("linear_token_logprobs", "linear_token_stats"):
        yield _ceiling("gemm", ceilings.product)
    elif case.op == "linear_token_divergence":
        yield _ceiling("gemms", ceilings.products)
    elif case.op == "divergence" and case.differentiates:
        yield _ceiling("copy", ceilings.copy_and_read)
    elif case.op in ("token_logprobs", "divergence") and not case.differentiates:
        yield _ceiling("read", ceilings.read)
    elif case.op not in _LINEAR:
        yield _ceiling("copy", ceilings.copy)


def _rounded(case: Case) -> float:
    return BF16_LOGITS if case.op in _LINEAR and case.dtype != "fp32" else 0.0


def _too_long(case: Case) -> str | None:
    steps = case.shape.dims[1]
    if case.device == "cpu" or steps <= _MOST_STEPS:
        return None
    return f"a loop of {steps:,} steps takes seconds a call on a GPU"


def _no_linear_ce() -> str | None:
    if hasattr(F, "linear_cross_entropy"):
        return None
    return f"torch {torch.__version__} has no linear_cross_entropy; it came with 2.13"


def with_stats(names: tuple[str, ...], *, head: bool = False) -> Callable[[Any], Named]:
    """The loss and the means; of a head, "entropy" is the tokens' own, not their mean."""

    def named(out: Any) -> Named:
        means = dict(zip(names, out[1], strict=True))
        return {
            "loss": out[0],
            **{k: x for k, x in means.items() if not (head and k == "entropy")},
        }

    return named


def _weights_with_stats(out: Any) -> Named:
    weights, mask, stats = out
    means = dict(zip(eager.ROLLOUT_STATS, stats, strict=True))
    return {"weights": weights, "mask": mask, **means}


# Each op's function, the options it takes, and the names of its results.
_PLAIN: dict[str, tuple[Callable[..., Any], tuple[str, ...], Callable[[Any], Named]]] = {
    "token_logprobs": (eager.token_logprobs, (), pair("logprobs", "entropy")),
    "linear_token_logprobs": (eager.linear_token_logprobs, (), pair("logprobs", "entropy")),
    "ppo_loss": (
        eager.ppo_loss,
        ("clip_low", "clip_high", "entropy_coef", "kl_coef", "kl_clamp"),
        with_stats(eager.PPO_STATS),
    ),
    "linear_ppo_loss": (
        eager.linear_ppo_loss,
        ("clip_low", "clip_high", "entropy_coef", "kl_coef", "kl_clamp"),
        with_stats(eager.PPO_STATS, head=True),
    ),
    "logits_ppo_loss": (
        eager.logits_ppo_loss,
        ("clip_low", "clip_high", "entropy_coef", "kl_coef", "kl_clamp"),
        with_stats(eager.PPO_STATS, head=True),
    ),
    "linear_token_stats": (eager.linear_token_stats, (), pair(*TokenStats._fields)),
    "divergence": (eager.divergence, (), pair("loss", "divergence", "entropy")),
    "linear_divergence": (eager.linear_divergence, (), pair("loss", "divergence", "entropy")),
    "linear_token_divergence": (eager.linear_token_divergence, (), pair("divergence", "entropy")),
    "value_loss": (eager.value_loss, ("clip",), with_stats(eager.VALUE_STATS)),
    "whiten": (eager.whiten, (), single("out")),
    "rollout_weights": (eager.rollout_weights, ("high", "reject"), _weights_with_stats),
}


def _function(case: Case, name: str, compiled: bool = False) -> Provider:
    """The op's function, eager or compiled (forward and, traced, backward)."""

    def bind(case: Case, call: Call) -> Bound:
        plain, accepted, named = _PLAIN[call.op]
        if case.op == "linear_ppo_loss" and teacher.kind_of(case):
            plain = eager.linear_ppo_loss_with_teacher
        function: Any = torch.compile(plain, dynamic=False) if compiled else plain
        tensors, inputs = leaves(case, call)
        given = call.options
        if "correction" in given:
            given = {"high": given["correction"].high, "reject": dict(given["correction"].reject)}
        options = {k: v for k, v in given.items() if k in accepted}
        if teacher.kind_of(case):
            options |= teacher.options_of(call)
        return timed(case, call, lambda: function(**tensors, **options), inputs, named)

    return Provider(name, bind, plain=True, roundings=_rounded(case))


def _gae_loop(case: Case, call: Call) -> Bound:
    rows, (gamma, lam) = SequenceRows(call), (call.options[k] for k in ("gamma", "lam"))
    return Bound(
        lambda: eager.gae_loop(rows.rewards, rows.values, gamma=gamma, lam=lam),
        rows.named("advantages", "returns"),
    )


def _rlhf_loop(case: Case, call: Call) -> Bound:
    t, o = call.tensors, call.options
    options = {k: o[k] for k in ("kl_coef", "gamma", "lam")}
    names = pair("advantages", "returns", "rewards", "kl")
    return Bound(lambda: eager.rlhf_advantages(**t, **options), names)


def _linear_ce(case: Case, call: Call) -> Bound:
    t = call.tensors
    options = torch.nn.LinearCrossEntropyOptions()

    def run() -> Tensor:
        return F.linear_cross_entropy(
            t["hidden"], t["weight"], t["tokens"], reduction="none", options=options
        )

    return Bound(run, lambda out: {"logprobs": -out})


def _gemms(case: Case, call: Call) -> Bound:
    def seconds(chunk: Callable[[], Any]) -> float:
        chunk()
        start = time.perf_counter()
        chunk()
        return time.perf_counter() - start

    best = min(ceilings.gemms(call), key=seconds)
    return Bound(best, lambda out: {})


def _ceiling(name: str, function: Callable[..., list[Tensor]]) -> Provider:
    def bind(case: Case, call: Call) -> Bound:
        tensors = [x for key, x in call.tensors.items() if key not in ("tokens", "cu_seqlens")]
        moved = sum(x.nbytes for x in (*tensors, *function(*tensors)))
        return Bound(lambda: function(*tensors), lambda out: {}, moved=moved)

    return Provider(name, bind, ceiling=True)
