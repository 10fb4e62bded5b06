"""This library's backends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import ppo_fast
from benchmarks.ops import teacher
from benchmarks.ops.adapter import is_adapted
from benchmarks.ops.case import Case
from benchmarks.ops.registry import OPS
from benchmarks.ops.support import kept
from benchmarks.peers.base import Bound, Provider, leaves, pair, restore, timed
from ppo_fast import surrogates
from ppo_fast._backend import bf16_dot
from ppo_fast.testing import Call, arguments, output

# The reference's recurrence launches about 25 kernels a step.
_MOST_STEPS = {"cpu": 16384, "cuda": 1024}


def of(case: Case) -> Iterator[Provider]:
    """The backends of the case's device, then the reference."""
    # Neither supports nor teachers nor the statistics have CUDA C++.
    lacks = kept(case) or teacher.kind_of(case) or case.op == "linear_token_stats"
    on_gpu = ("triton",) if lacks else ("cuda", "triton")
    backends = ("cpu",) if case.device == "cpu" else on_gpu
    for backend in backends:
        yield _backend(case, backend)
        if OPS[case.op].inplace and case.differentiates:
            yield _backend(case, backend, inplace=True)
        if case.op == "linear_ppo_loss" and teacher.kind_of(case):
            yield _apart(case, backend)
        elif case.op == "linear_ppo_loss" and not kept(case) and not is_adapted(case):
            yield _surrogate(case, backend)
        if backend == "cpu" and case.op.startswith("linear_") and case.dtype == "bf16":
            yield _with_fp32_operands()
    yield _backend(case, "reference")


def _backend(case: Case, backend: str, *, inplace: bool = False) -> Provider:
    def missing() -> str | None:
        steps = case.shape.dims[1]
        if backend == "reference" and case.op == "gae" and steps > _MOST_STEPS[case.device]:
            return f"a loop over {steps:,} steps takes too long to be timed"
        if backend == "reference" and kept(case):
            return "it counts every id of every row: `eager` is what plain PyTorch takes"
        return ppo_fast.backends()[backend]

    def bind(case: Case, call: Call) -> Bound:
        return bind_backend(case, call, backend, inplace)

    return Provider(
        f"ppo_fast-{backend}" + ("-inplace" if inplace else ""),
        bind,
        missing,
        plain=backend == "reference",
    )


def _with_fp32_operands() -> Provider:
    """The head without the CPU's dot products of bf16: its operands become fp32 in pieces."""

    def bind(case: Case, call: Call) -> Bound:
        bound = bind_backend(case, call, "cpu")

        def run() -> Any:
            with patch("ppo_fast._backend.bf16_dot", lambda: False):
                return bound.call()

        return replace(bound, call=run)

    def missing() -> str | None:
        reason = ppo_fast.backends()["cpu"]
        if reason is None and not bf16_dot():
            return "this CPU has no dot products of bf16: it is what ppo_fast-cpu does"
        return reason

    return Provider("ppo_fast-cpu-fp32-operands", bind, missing)


def _surrogate(case: Case, backend: str) -> Provider:
    """The clipped loss as a function of one's own, which the head runs on each chunk of rows."""

    def bind(case: Case, call: Call) -> Bound:
        options = dict(call.options)
        names = ("clip_low", "clip_high", "dual_clip")
        own = surrogates.clip(**{name: options[name] for name in names if name in options})
        options.pop("dual_clip", None)
        return bind_backend(case, call._replace(options=options | {"variant": own}), backend)

    return Provider(f"ppo_fast-{backend}-surrogate", bind, lambda: ppo_fast.backends()[backend])


def _apart(case: Case, backend: str) -> Provider:
    """The policy's loss and the divergence by a call each, which forms the student's logits and
    gradients twice: seven products where both at once take four."""

    def bind(case: Case, call: Call) -> Bound:
        tensors, inputs = leaves(case, call)
        names = {name: x for name, x in tensors.items() if name.startswith("teacher_")}
        heads = {k: x for k, x in tensors.items() if k in ("hidden", "weight", "mask")} | names
        policy = {k: x for k, x in tensors.items() if k not in names}
        options = {k: v for k, v in call.options.items() if k != "teacher"}
        own = {k: call.options[k] for k in ("teacher", "reduction")}

        def run() -> Any:
            loss, *_, logprobs, entropy = ppo_fast.linear_ppo_loss(
                **policy, **options, backend=backend
            )
            found = ppo_fast.linear_divergence(**arguments(heads | own), backend=backend)
            return loss + found.loss, logprobs, entropy

        return timed(case, call, run, inputs, pair("loss", "logprobs", "entropy"))

    return Provider(
        f"ppo_fast-{backend}-apart",
        bind,
        lambda: ppo_fast.backends()[backend],
        computes="the same by linear_ppo_loss and linear_divergence, the statistics by the first",
    )


def bind_backend(case: Case, call: Call, backend: str, inplace: bool = False) -> Bound:
    """The op on a backend, with the gradients that the case takes."""
    tensors, inputs = leaves(case, call)
    op = getattr(ppo_fast, call.op)
    options = dict(call.options, backend=backend)
    if inplace:
        options[OPS[call.op].inplace] = True
    prepare = restore(tensors, call, "logits") if inplace else None
    return timed(
        case, call, lambda: op(**arguments(tensors | options)), inputs, output, prepare=prepare
    )
