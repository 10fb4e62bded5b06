"""One launch instead of two: the program that arrives last sums what the others left.

Every program writes its partial results, then counts itself in. The last one finds them all
there, merges them in index order (the result does not depend on who is last) and resets the
counter. A counter belongs to one stream, whose launches run one after the other. A launch under
CUDA graph capture takes a counter of its own, as graphs may be replayed on any stream.
"""

from __future__ import annotations

import threading

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import merge_parts

COUNTERS = 4096  # per device: one per stream, and one per captured launch


class _Counters:
    """The zeroed counters of one device; they live as long as the process."""

    def __init__(self, device: torch.device) -> None:
        self.free = list(torch.zeros(COUNTERS, dtype=torch.int32, device=device).split(1))
        self.ready = torch.cuda.Event()
        self.ready.record()
        self.of_stream: dict[int, Tensor] = {}


_LOCK = threading.Lock()
_DEVICES: dict[int, _Counters] = {}


def counter(like: Tensor) -> Tensor:
    """A zero int32 for one launch on `like`'s device and current stream. Call it `on_device`."""
    if not like.is_cuda:
        return torch.zeros(1, dtype=torch.int32)
    capturing = torch.cuda.is_current_stream_capturing()
    with _LOCK:
        counters = _DEVICES.get(like.device.index)
        if counters is None and not capturing:
            counters = _DEVICES[like.device.index] = _Counters(like.device)
        if counters is not None:
            stream = torch.cuda.current_stream()
            found = None if capturing else counters.of_stream.get(stream.cuda_stream)
            if found is None and counters.free:
                found = counters.free.pop()
                if not capturing:
                    counters.of_stream[stream.cuda_stream] = found
                    stream.wait_event(counters.ready)
            if found is not None:
                return found
    # No counter left, or a capture before any call: a memset node more in the graph.
    return torch.zeros(1, dtype=torch.int32, device=like.device)


@triton.jit
def is_last(counter_ptr):
    """Whether every other program has passed here, its stores visible to this one."""
    tl.debug_barrier()  # all threads' stores precede the count
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def leave_moments(parts_ptr, out_ptr, counter_ptr, n, mean, m2, BLOCK: tl.constexpr):
    """This program's float64 moments; the last one merges all of (3, programs) into (3,)."""
    programs = tl.num_programs(0)
    part = parts_ptr + tl.program_id(0)
    tl.store(part, n)
    tl.store(part + programs, mean)
    tl.store(part + 2 * programs, m2)
    if is_last(counter_ptr):
        merge_parts(parts_ptr, out_ptr, programs, BLOCK)
