"""One call of a goal's case on the GPU, for a profiler: `python -m benchmarks.gpu.one_call OP`.

Its kernels run twice: a profiler that counts launches sees them warm the second time.
"""

from __future__ import annotations

import sys

import torch

from benchmarks.ops.registry import GOALS, make_call
from benchmarks.peers import providers_of

_BACKENDS = ("ppo_fast-cuda", "ppo_fast-triton")


def main(op: str) -> int:
    """Run the op's first case on the GPU that has a goal, on each of our backends there."""
    case = next((g.case for g in GOALS if g.case.device == "cuda" and g.case.op == op), None)
    if case is None:
        raise SystemExit(f"one_call: no goal on a GPU for the op {op!r}")
    call = make_call(case)
    for provider in providers_of(case):
        reason = provider.missing()
        if provider.name not in _BACKENDS or reason is not None:
            continue
        bound = provider.bind(case, call)
        for _ in range(2):
            if bound.prepare is not None:
                bound.prepare()
            bound.call()
        torch.cuda.synchronize()
        print(f"{case.name} {provider.name}: ran")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
