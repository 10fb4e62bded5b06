"""Ways to take a head over a support: this library's dense one, and plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import ppo_fast
from benchmarks.ops import support
from benchmarks.ops.case import Case
from benchmarks.ops.inputs import logprobs_inputs, policy_loss_inputs
from benchmarks.peers import eager
from benchmarks.peers.base import Bound, Named, Provider, leaves, pair, timed
from benchmarks.peers.ours import bind_backend
from benchmarks.peers.pytorch import with_stats
from ppo_fast import Support
from ppo_fast.testing import Call

_INPUTS = {"linear_ppo_loss": policy_loss_inputs, "linear_token_logprobs": logprobs_inputs}
# The gathered rows of the head, in bytes, of which the backward holds as much again.
_LARGEST = 2**29
_WHOLE = (
    "ppo_fast's head over the whole vocabulary, another result, which is held to its own gate:"
    " what a caller without supports pays"
)


def of(case: Case) -> Iterator[Provider]:
    """The head over the whole vocabulary, the way not taken over the support, PyTorch's two."""
    if case.device != "cpu":
        return
    yield Provider("dense-head", _on_cpu, _no_kernels, computes=_WHOLE, asked=_asked)
    is_sparse = Support(support.sampled(case.shape)[0]).is_sparse(case.shape.dims[1])
    other = "dense" if is_sparse else "sparse"
    yield Provider(
        f"ppo_fast-cpu-{other}",
        _other,
        _no_kernels,
        computes=f"the same by Support(sparse={not is_sparse})",
    )
    yield Provider("eager", _plain(eager.masked_logprobs), plain=True)
    yield Provider("gather", _plain(eager.gathered_logprobs), lambda: _too_large(case), plain=True)
    if case.differentiates and not support.is_frozen(case):
        yield Provider("fill", _fill, ceiling=True)


def _no_kernels() -> str | None:
    return ppo_fast.backends()["cpu"]


def _asked(case: Case) -> Call:
    return support.whole(case, _INPUTS[case.op])


def _on_cpu(case: Case, call: Call) -> Bound:
    return bind_backend(case, call, "cpu")


def _other(case: Case, call: Call) -> Bound:
    given: Any = call.options["support"]
    way = given.is_sparse(call.tensors["weight"].shape[0])
    forced = Support(given.ids, given.offsets, sparse=not way)
    return bind_backend(case, call.option(support=forced), "cpu")


def _too_large(case: Case) -> str | None:
    rows, _, width = case.shape.dims
    found = support.kept(case)
    size = rows * width * 4 * (found.ids if found else 0)
    if size <= _LARGEST:
        return None
    return f"its copy of the kept rows alone takes {size / 2**30:.1f} GiB"


def _plain(head: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Case, Call], Bound]:
    """The op by a head in plain PyTorch."""

    def bind(case: Case, call: Call) -> Bound:
        tensors, inputs = leaves(case, call)
        ids = support.ids_of(call)
        if call.op == "linear_token_logprobs":
            named: Callable[[Any], Named] = pair("logprobs", "entropy")
            return timed(case, call, lambda: head(**tensors, ids=ids), inputs, named)
        names = ("clip_low", "clip_high", "entropy_coef", "kl_coef", "kl_clamp")
        options = {k: call.options[k] for k in names}

        def run() -> Any:
            return eager.of_support(head, **tensors, ids=ids, **options)

        return timed(case, call, run, inputs, with_stats(eager.PPO_STATS, head=True))

    return bind


def _fill(case: Case, call: Call) -> Bound:
    """One write of the weight's gradient, which is zero but for the kept rows."""
    weight = call.tensors["weight"]
    return Bound(lambda: torch.empty_like(weight).zero_(), lambda out: {}, moved=weight.nbytes)
