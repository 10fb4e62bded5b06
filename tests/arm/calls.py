"""Calls whose instructions are counted: N, then 2N of each, between calls that the counter sees.

Runs under qemu with the plugin of instructions.c (`python tests/arm count`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch

import ppo_fast
from ppo_fast import _ext

N = 2
ROWS, VOCAB, SHAPE = 16, 32000, (128, 1024)


def calls() -> dict[str, Callable[[], object]]:
    """A call of every op that is counted, fp32, with a mask in the loss."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, VOCAB, generator=g)
    tokens = torch.randint(VOCAB, (ROWS,), generator=g)
    logprobs, rewards, values, advantages = (torch.randn(SHAPE, generator=g) for _ in range(4))
    old = logprobs + 0.1 * torch.randn(SHAPE, generator=g)
    mask = torch.rand(SHAPE, generator=g) < 0.9
    leaf = logprobs.clone().requires_grad_()
    return {
        "token_logprobs": lambda: ppo_fast.token_logprobs(logits, tokens, backend="cpu"),
        "ppo_loss": lambda: ppo_fast.ppo_loss(leaf, old, advantages, mask, backend="cpu"),
        "value_loss": lambda: ppo_fast.value_loss(leaf, old, advantages, mask, backend="cpu"),
        "gae": lambda: ppo_fast.gae(rewards, values, gamma=0.99, lam=0.95, backend="cpu"),
    }


def main() -> None:
    """Report to the counter, which writes to stderr too."""
    for op, call in calls().items():
        for isa in ("scalar", "neon"):
            _ext.module().set_isa(isa)
            call()
            print(op, isa, N, file=sys.stderr, flush=True)
            os.getpgid(0)
            for _ in range(N):
                call()
            os.getpgid(0)
            for _ in range(2 * N):
                call()
            os.getpgid(0)


if __name__ == "__main__":
    main()
