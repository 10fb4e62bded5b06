"""Kernels that the public ops make Triton compile, launches and torch calls: one JSON object.

    python tests/aot/variants.py

It runs without TRITON_INTERPRET, over the fake driver of the benchmarks.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SHAPES = ((4, 9), (1, 1), (2, 16), (3, 33), (16, 64), (5, 128), (33, 130), (2, 700))
VOCABS = (33, 48, 2052, 4096)
# Ops whose calls have a vocabulary, and small ones for these.
HEAD_SHAPES = ((4, 9), (1, 1), (2, 16), (3, 33))
# Of a support, ids kept beside them, and hidden sizes of whole vectors and of others.
SUPPORTS = ((1, 24), (20, 25), (40, 300))
OVER_SUPPORTS = {
    "token_logprobs over supports": "token_logprobs",
    "linear_token_logprobs over supports": "linear_token_logprobs",
}


def calls() -> dict[str, Callable[..., Any]]:
    """The factory of every op's calls, those over supports beside the others."""
    from ppo_fast import testing

    stats = {"linear_token_stats": testing.token_stats_call}
    make = {**testing.FACTORIES, **testing.HEADS, **stats}
    return make | {
        name: functools.partial(make[op], kept=5, **({"sparse": True} if "linear" in op else {}))
        for name, op in OVER_SUPPORTS.items()
    }


def sizes(op: str) -> Iterator[Any]:
    """One kind of call, dense, in many sizes."""
    from ppo_fast import testing

    make = calls()[op]
    if op in OVER_SUPPORTS:
        for (kept, width), vocab, shape in itertools.product(SUPPORTS, VOCABS[:2], HEAD_SHAPES):
            yield make(shape, vocab, *([width] if "linear" in op else []), kept=kept)
    elif op in testing.HEADS or op in ("token_logprobs", "linear_token_stats"):
        for vocab, shape in itertools.product(VOCABS, HEAD_SHAPES):
            yield make(shape, vocab)
    else:
        yield from map(make, SHAPES)


def layouts(op: str) -> Iterator[Any]:
    """The same calls in other layouts and alignments."""
    from ppo_fast import testing

    for call in sizes(op):
        for kind in testing.LAYOUTS:
            yield testing.with_layout(call, kind)[0]


def torch_calls(call: Any) -> Counter[str]:
    """Calls of PyTorch's own ops in one forward and backward, but for views and allocations."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from ppo_fast import testing

    found: Counter[str] = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            if func.namespace != "aten":
                with self:  # what the implementation calls counts too
                    return func._op_dk(torch._C.DispatchKey.CPU, *args, **(kwargs or {}))
            if not func.is_view and "empty" not in func.__name__:
                found[func.__name__] += 1
            return func(*args, **(kwargs or {}))

    with Count():
        testing.run(call, "triton")
    return found


def by_arguments(record: Any) -> dict[str, int]:
    """Kernels compiled for no constant's sake: for an integer's value or a pointer's alignment."""
    found: Counter[str] = Counter()
    seen = set()
    for v in record.variants:
        constants = {p.name: v.constants[p.name] for p in v.function.params if p.is_constexpr}
        absent = sorted(name for name, value in v.constants.items() if value is None)
        key = (v.kernel, repr(constants), repr(absent), v.num_warps)
        found[v.kernel] += key in seen
        seen.add(key)
    return dict(found)


def main() -> None:
    from benchmarks.gpu import fake_driver
    from ppo_fast import testing

    result = {}
    for op, make in calls().items():
        # What the launches leave unwritten is NaN, so that no path depends on old memory.
        with testing.poisoned_allocations():
            with fake_driver.recording() as record:
                for call in sizes(op):
                    testing.run(call, "triton")
                of_sizes, of_arguments = record.counts(), by_arguments(record)
                for call in layouts(op):
                    testing.run(call, "triton")
            with fake_driver.recording() as once:
                made = torch_calls(make())
        result[op] = {
            "sizes": of_sizes,
            "arguments": of_arguments,
            "layouts": record.counts(),
            "launches": [launch.kernel for launch in once.launches],
            "torch": dict(sorted(made.items())),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main()
