"""One run of every op on small shapes in CUDA C++, for compute-sanitizer:
`compute-sanitizer --tool memcheck python -m benchmarks.gpu.sanitize`.
"""

from __future__ import annotations

import sys

import torch

import ppo_fast
from ppo_fast import testing
from ppo_fast.testing import Call

# Aligned rows and odd ones, rows of several slices, tokens over several blocks, packed sequences.
_SHAPES = ((3, 33), (8, 512))
_VOCABULARIES = (257, 4099)
_DTYPES = (torch.float32, torch.bfloat16)


def calls(device: str) -> list[Call]:
    """The calls: few, because under a sanitizer each takes a hundred times as long."""
    found = []
    for op, make in (testing.FACTORIES | testing.HEADS).items():
        for dtype in _DTYPES:
            if op in testing.HEADS or op == "token_logprobs":
                found += [make((2, 3), v, dtype=dtype, device=device) for v in _VOCABULARIES]
            else:
                found += [make(shape, dtype=dtype, device=device) for shape in _SHAPES]
    packed = ("ppo_loss", "value_loss", "gae", "rlhf_advantages")
    found += [testing.FACTORIES[op]((300,), packed=True, device=device) for op in packed]
    return found


def main(device: str = "cuda") -> int:
    """Run them; an op that fails ends it with its error."""
    reason = ppo_fast.backends()["cuda"]
    if reason is not None:
        print(f"nothing to look over: {reason}")
        return 1
    every = calls(device)
    for call in every:
        testing.run(call, "cuda")
        if device == "cuda":
            torch.cuda.synchronize()
    print(f"{len(every)} calls")
    return 0


if __name__ == "__main__":
    sys.exit(main())
