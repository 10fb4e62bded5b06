"""Timing on a GPU: events around the call, a cold L2, and a graph where launching would show.

Device work is asynchronous, so the host's clock sees launches, not kernels. A short call is
captured once and replayed: Python, dispatch and launch gaps then stay outside of the events. The
events themselves, and the start of a replay, take some microseconds; a call of not many more is
therefore captured several times, each after a flush of the L2, and the flushes' own time, taken
beside it, is subtracted.
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
# Seconds below which the events around one replay would show in its time.
SEVERAL_BELOW = 30e-6
# Calls of such a graph.
SEVERAL = 20
# Calls on the capturing stream before the capture: what they keep per stream then exists.
_WARM_UPS = 3
_MB = 2**20


def between(run: Callable[[], Any]) -> float:
    """Seconds of device time of what `run` launches."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


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
        if self.prepare is not None:
            self.prepare()
        # The host runs ahead while this reads, so a replay starts as soon as it ends.
        flush()
        return between(self.run)


@dataclass(frozen=True)
class TimedSeveral:
    """The same for a call of a few microseconds, from a graph of several flushes and calls."""

    run: Callable[[], Any]
    flushes: Callable[[], Any]  # the same graph without the calls
    graph: bool = True
    reason: str = ""

    def __call__(self) -> float:
        flush()
        both = between(self.run)
        flush()
        return max(0.0, both - between(self.flushes)) / SEVERAL


def sampler(bound: Bound) -> Timed | TimedSeveral:
    """Samples of a provider that ran before; replayed if it is short and can be captured.

    What needs preparing is not: a graph reads and writes where one preparation put things.
    """
    eager = Timed(bound.call, bound.prepare)
    eager()
    if bound.prepare is not None or eager() >= GRAPH_BELOW:
        return eager
    try:
        one = Timed(captured(bound.call).replay, None, graph=True)
        if one() >= SEVERAL_BELOW:
            return one
        both = captured(lambda: [(flush(), bound.call()) for _ in range(SEVERAL)])
        alone = captured(lambda: [flush() for _ in range(SEVERAL)])
        return TimedSeveral(both.replay, alone.replay)
    except RuntimeError as error:
        reason = f"launches included: not capturable: {error}".splitlines()[0][:200]
        return Timed(bound.call, None, reason=reason)


def flush() -> None:
    """Leave nothing of a provider's inputs in the L2, by reading four times its size.

    Written lines would be as cold, and then be written back while the timed kernel evicts them.
    """
    _unrelated().sum()


@functools.cache
def _unrelated() -> Tensor:
    """Four times the L2."""
    size = torch.cuda.get_device_properties().L2_cache_size
    return torch.zeros(size, dtype=torch.float32, device="cuda")


@functools.cache
def _side_stream() -> torch.cuda.Stream:
    """Stream of the capture."""
    return torch.cuda.Stream()


def captured(run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """Graph of what `run` launches, after warming up on the capturing stream."""
    graph, stream = torch.cuda.CUDAGraph(), _side_stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):  # puts the former stream back, also when capturing fails
        for _ in range(_WARM_UPS):
            run()
        with torch.cuda.graph(graph, stream=stream):
            run()
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
