"""Memory savings: layers recomputed in the backward, and micro-batches halved on exhaustion."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")


class OutOfMemoryStopError(RuntimeError):
    """Memory ran out where halving the micro-batch cannot help, or has already."""


def recompute(layers: nn.ModuleList, split: int) -> None:
    """Keep only the inputs of the layers from `split` on, and run each again in the backward.

    Nothing is random in these layers (dropout is off), so the second run repeats the first's bits
    (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost").
    """
    for layer in layers[split:]:
        layer.forward = functools.partial(_checkpointed, layer.forward)


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():  # a rollout's key-value cache must be written once
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def halves(rows: Tensor) -> tuple[Tensor, ...]:
    """`rows` in two parts, or in one where there is only one row."""
    return rows.split((len(rows) + 1) // 2)


class MemoryGuard:
    """One retry, with micro-batches of half the rows, when memory runs out.

    `discard` drops the gradient of a pass that failed. `halved` stays for the rest of the run.
    """

    def __init__(self, discard: Callable[[], None], sharded: bool) -> None:
        self.discard, self.sharded = discard, sharded
        self.halved = False

    def pieces(self, parts: list[Tensor]) -> list[Tensor]:
        """Micro-batches (rows), each in two once memory has run out."""
        return [half for rows in parts for half in halves(rows)] if self.halved else parts

    def run(self, fn: Callable[[], T]) -> T:
        """The result of `fn`; if memory runs out, of a second call without a gradient left.

        `fn` takes its micro-batches through `pieces`. Raises `OutOfMemoryStopError` when memory
        runs out again, here or later in the run, and at once where weights are sharded: the other
        ranks wait inside the forward that failed.
        """
        try:
            return fn()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
        # Here the failed pass's graph is gone: the exception held its frames.
        self.discard()
        if self.halved or self.sharded:
            why = "although micro-batches were halved" if self.halved else "under fsdp2"
            raise OutOfMemoryStopError(f"out of memory {why}: lower micro_batch ({reason})")
        self.halved = True
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return self.run(fn)


def out_of_memory(error: RuntimeError) -> bool:
    """True if an allocator refused: CUDA's, or the CPU's, which has no error type of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
