"""Doing with less memory: layers recomputed in the backward, micro-batches halved once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from ppo_fast.loop.model.agent import Agent

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


def with_room(agent: Agent, run: Callable[[], T]) -> T:
    """What `run` gives; if memory runs out, once more from no gradient with halved micro-batches.

    Raises `OutOfMemoryStopError` when it runs out again, here or later in the run, and at once
    where weights are sharded: the other ranks wait inside the forward that failed.
    """
    try:
        return run()
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        reason = str(error).splitlines()[0]
    # Here the failed pass's graph is gone: the exception held its frames.
    agent.discard()
    if agent.halved or agent.ranks.sharded:
        why = "although micro-batches were halved" if agent.halved else "under fsdp2"
        raise OutOfMemoryStopError(f"out of memory {why}: lower micro_batch ({reason})")
    agent.halved = True
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return with_room(agent, run)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocator refused: CUDA's, or the CPU's, which has no error type of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
