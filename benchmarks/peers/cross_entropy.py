"""Cross-entropy kernels that trainers negate: flash-attn's, quack's, cut-cross-entropy's."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from benchmarks.ops.case import Case
from benchmarks.peers.base import Bound, Provider, leaves, needs, single, timed
from ppo_fast.testing import Call

_LESS = "log-prob only, no entropy"


def of(case: Case) -> Iterator[Provider]:
    """Triton and CuTe kernels: on a GPU."""
    if case.device != "cuda":
        return
    if case.op == "token_logprobs":
        missing = needs("flash_attn.ops.triton.cross_entropy", "flash-attn", gpu=True)
        yield Provider("flash-attn", _flash_attn, missing, computes=_LESS)
        missing = needs("quack.cross_entropy", "quack-kernels==0.6.5", gpu=True)
        yield Provider("quack", _quack, missing, computes=_LESS)
    elif case.op == "linear_token_logprobs":
        missing = needs("cut_cross_entropy", "cut-cross-entropy==25.1.1", gpu=True)
        yield Provider("cut-cross-entropy", _cut, missing, computes=_LESS)


def _flash_attn(case: Case, call: Call) -> Bound:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    tensors, inputs = leaves(case, call)

    def run() -> Tensor:
        return -cross_entropy_loss(tensors["logits"], tensors["tokens"])[0]

    return timed(case, call, run, inputs, single("logprobs"), only="logprobs")


def _quack(case: Case, call: Call) -> Bound:
    from quack.cross_entropy import cross_entropy

    tensors, inputs = leaves(case, call)

    def run() -> Tensor:
        return -cross_entropy(tensors["logits"], tensors["tokens"], reduction="none")

    return timed(case, call, run, inputs, single("logprobs"), only="logprobs")


def _cut(case: Case, call: Call) -> Bound:
    from cut_cross_entropy import linear_cross_entropy

    t = call.tensors
    return Bound(
        lambda: linear_cross_entropy(t["hidden"], t["weight"], t["tokens"], reduction="none"),
        lambda out: {"logprobs": -out.float()},
    )
