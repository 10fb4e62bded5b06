"""GAE of packages seldom installed: rl-triton's kernel, slime's chunks, OpenRLHF's loop."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from benchmarks.ops.case import Case
from benchmarks.peers.base import Bound, Provider, needs
from benchmarks.peers.layout import SequenceRows
from ppo_fast.testing import Call

_OPENRLHF = "openrlhf.trainer.ppo_utils.experience_maker"


def of(case: Case) -> Iterator[Provider]:
    """`gae`, each where its package is installed."""
    if case.op != "gae" or case.is_call:
        return
    if case.device == "cuda":
        missing = needs("rl_triton", "git+https://github.com/simonsays1980/rl-triton", gpu=True)
        yield Provider("rl-triton", _rl_triton, missing, computes="advantages only")
    missing = needs("slime.utils.ppo_utils", "git+https://github.com/THUDM/slime")
    yield Provider("slime", _slime, missing, computes="no moments")
    missing = needs(_OPENRLHF, "openrlhf==0.11.2")
    yield Provider("openrlhf", _openrlhf, missing, computes="no moments")


def _rl_triton(case: Case, call: Call) -> Bound:
    from rl_triton import compute_gae

    rows, (gamma, lam) = SequenceRows(call), (call.options[k] for k in ("gamma", "lam"))
    ends = rows.last().float()

    def run() -> Tensor:
        return compute_gae(rows.rewards, rows.values, ends, gamma=gamma, lambda_=lam)

    return Bound(run, lambda out: {"advantages": rows.back(out)})


def _slime(case: Case, call: Call) -> Bound:
    from slime.utils.ppo_utils import chunked_gae

    rows, (gamma, lam) = SequenceRows(call), (call.options[k] for k in ("gamma", "lam"))
    return Bound(
        lambda: chunked_gae(rows.rewards, rows.values, gamma, lam),
        rows.named("advantages", "returns"),
    )


def _openrlhf(case: Case, call: Call) -> Bound:
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

    # The method reads nothing of its object.
    function = RemoteExperienceMaker.get_advantages_and_returns
    rows, (gamma, lam) = SequenceRows(call), (call.options[k] for k in ("gamma", "lam"))
    return Bound(
        lambda: function(None, rows.values, rows.rewards, rows.exists, gamma, lam),
        rows.named("advantages", "returns"),
    )
