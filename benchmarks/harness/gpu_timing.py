"""Timing on a GPU: events around the call, a cold L2, and a graph where launching would show.

Device work is asynchronous, so the host's clock sees launches, not kernels. A short call is
captured once and replayed: Python, dispatch and launch gaps then stay outside of the events.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.base import Bound

# Seconds that one provider may take of a case; timing.interleave sees to it.
BUDGET = 1.0
# Seconds below which a call is replayed from a graph. Python launches a forward and backward in
# up to some hundreds of microseconds: a shorter call would be timed as fast as the host is.
GRAPH_BELOW = 1e-3
# Calls on the capturing stream before the capture: what they keep per stream then exists.
_WARM_UPS = 3
_MB = 2**20


@dataclass(frozen=True)
class Timed:
    """Takes samples of one provider: seconds of device time a call.

    `graph` says whether the call is replayed from a graph; `reason`, where a short call could not
    be captured, why.
    """

    run: Callable[[], Any]
    prepare: Callable[[], None] | None
    graph: bool = False
    reason: str = ""

    def __call__(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self.prepare is not None:
            self.prepare()
        # The host runs ahead while this writes, so a replay starts as soon as it ends.
        _flush().zero_()
        start.record()
        self.run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def sampler(bound: Bound) -> Timed:
    """Samples of a provider that ran before; replayed if it is short and can be captured.

    What needs preparing is not: a graph reads and writes where one preparation put things.
    """
    eager = Timed(bound.call, bound.prepare)
    eager()
    if bound.prepare is not None or eager() >= GRAPH_BELOW:
        return eager
    try:
        graph = _captured(bound)
    except RuntimeError as error:
        reason = f"launches included: not capturable: {error}".splitlines()[0][:200]
        return Timed(bound.call, None, reason=reason)
    return Timed(graph.replay, None, graph=True)


@functools.cache
def _flush() -> Tensor:
    """Four times the L2: writing it leaves nothing of a provider's inputs there."""
    size = torch.cuda.get_device_properties().L2_cache_size
    return torch.empty(4 * size, dtype=torch.int8, device="cuda")


@functools.cache
def _side_stream() -> torch.cuda.Stream:
    """Stream of the capture."""
    return torch.cuda.Stream()


def _captured(bound: Bound) -> torch.cuda.CUDAGraph:
    """One call as a graph, after warming up on the capturing stream."""
    graph, stream = torch.cuda.CUDAGraph(), _side_stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):  # puts the former stream back, also when capturing fails
        for _ in range(_WARM_UPS):
            bound.call()
        with torch.cuda.graph(graph, stream=stream):
            bound.call()
    torch.cuda.synchronize()
    return graph


def peak_mb(bound: Bound) -> float:
    """Peak MB (2^20 bytes) of the allocator during one call, beyond the memory before it."""
    if bound.prepare is not None:
        bound.prepare()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    bound.call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / _MB


def free() -> None:
    """Give the case's memory back, for a later case that wants nearly all of it."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
