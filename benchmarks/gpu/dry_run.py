"""A dry run of the GPU cases on shapes alone: `python -m benchmarks.gpu.dry_run`.

Inputs become tensors of the meta device, which have a shape and no memory. Every provider is
bound to them; what is made of PyTorch's ops or this library's also runs, forward and backward.
Other peers launch kernels, so binding is as far as they get.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from benchmarks.ops import support
from benchmarks.ops.case import Case
from benchmarks.ops.registry import FULL, GOALS, make_call
from benchmarks.peers import Provider, providers_of
from ppo_fast.testing import Call

GPU = tuple(case for case in FULL if case.device == "cuda")
_RUNS_ON_SHAPES = ("ppo_fast-triton", "ppo_fast-cuda", "eager")


def shapes_of(case: Case) -> Call:
    """The case's call on tensors without memory."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        call = make_call(replace(case, device="cpu"))

    def bare(x: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")

    return support.moved(tree_map_only(Tensor, bare, call), bare)


def rehearse(provider: Provider, case: Case, call: Call) -> str:
    """Fate of a provider: "ran", "bound", or the reason why not."""
    reason = provider.missing()
    if reason is not None and "need a GPU" not in reason:  # nothing here does
        return f"skipped: {reason}"
    try:
        bound = provider.bind(case, call)
    except ImportError as error:
        return f"skipped: {error}"
    except NotImplementedError as error:
        if "meta tensor" not in str(error):
            raise
        return "not bound: it reads its inputs to prepare"
    if not provider.name.startswith(_RUNS_ON_SHAPES):
        return "bound"
    if bound.prepare is not None:
        bound.prepare()
    bound.call()
    return "ran"


def main() -> int:
    """Print a line per case and provider; 1 if any failed."""
    goals = {goal.case for goal in GOALS}
    failed = 0
    for case in GPU:
        print(f"{case.name}{' (goal)' if case in goals else ''}", flush=True)
        call = shapes_of(case)
        for provider in providers_of(case):
            try:
                said = rehearse(provider, case, call)
            except Exception as error:
                failed += 1
                said = f"FAILED: {type(error).__name__}: {error}".splitlines()[0]
            print(f"  {provider.name}: {said}", flush=True)
    print(f"{len(GPU)} cases rehearsed, {failed} providers failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
