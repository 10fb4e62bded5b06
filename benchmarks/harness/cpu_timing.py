"""Timing on a CPU: short calls repeated until the clock can tell, and resident memory."""

from __future__ import annotations

import ctypes
import gc
import math
import time
from pathlib import Path

from benchmarks.harness.timing import Sampler
from benchmarks.peers.base import Bound

# Seconds that one provider may take of a case; timing.interleave sees to it.
BUDGET = 3.0
# A sample lasts at least this long, by repeating short calls.
MIN_SAMPLE = 4e-3


def _sample(bound: Bound, number: int) -> float:
    """Seconds per call over `number` calls."""
    if bound.prepare is not None:
        bound.prepare()
    call = bound.call
    start = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - start) / number


def _calls_per_sample(bound: Bound) -> int:
    if bound.prepare is not None:
        return 1
    number = 1
    while (took := _sample(bound, number) * number) < MIN_SAMPLE:
        number = max(2 * number, math.ceil(number * MIN_SAMPLE / max(took, 1e-7)))
    return number


def sampler(bound: Bound) -> Sampler:
    """Samples of a provider on the CPU, each long enough for the clock."""
    number = _calls_per_sample(bound)
    return lambda: _sample(bound, number)


def peak_mb(bound: Bound) -> float | None:
    """Peak resident MB of one call beyond the memory before it; None where Linux cannot say.

    What earlier calls have freed goes back to the system first: the call would use it unseen.
    """
    if bound.prepare is not None:
        bound.prepare()
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
        before = _status_kb("VmRSS")
        bound.call()
        return max(0.0, (_status_kb("VmHWM") - before) / 1024)
    except (OSError, AttributeError):  # no such file, or another C library than glibc
        return None


def _status_kb(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")
