"""Accesses of threads to global memory, by kernel and by their bytes: one JSON object.

    PYTHONPATH=.:tests/ptx python tests/ptx/accesses.py

Calls are dense; "offset" are the same calls with every tensor one element off its alignment.
"""

from __future__ import annotations

import json
from typing import Any

import ptx_launch
import torch

from ppo_fast import testing
from ppo_fast.testing import Call


def calls() -> dict[str, Call]:
    half = torch.bfloat16
    return {
        "token_logprobs": testing.logprobs_call((2, 2), 4096, dtype=half, mask=None),
        "logits_ppo_loss": testing.logits_ppo_call((2, 2), 4096, dtype=half, mask=None),
        "gae": testing.gae_call((4, 512)),
        "ppo_loss": testing.ppo_call((4, 512)),
        "value_loss": testing.value_call((4, 512)),
        "whiten": testing.whiten_call((4, 1024)),
        "linear_token_logprobs over a support": testing.linear_call(
            (2, 2), 30, 512, dtype=half, mask=None, ignored=False, extras=(), kept=9, sparse=True
        ),
    }


def counted(call: Call) -> dict[str, dict[int, int]]:
    with ptx_launch.interpreted() as gpu:
        testing.run(call, "triton")
    return {kernel: dict(sorted(found.items())) for kernel, found in gpu.accesses.items()}


def main() -> None:
    found: dict[str, Any] = {op: counted(call) for op, call in calls().items()}
    for op, call in calls().items():
        found[f"{op} offset"] = counted(testing.with_layout(call, "offset")[0])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
