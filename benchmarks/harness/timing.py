"""Timing providers against each other: rounds interleaved, so that a swing hits them all.

How one sample is taken is the device's matter: here on the CPU, in `cuda_timing` on a GPU.
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.peers.base import Bound

ROUNDS = 25
# What one provider may take of a case, in seconds: slower ones sit rounds out, down to 5 samples.
BUDGET = 3.0
MIN_SAMPLES = 5
# A sample lasts at least this long, by repeating short calls.
MIN_SAMPLE = 4e-3

# Takes one sample: seconds per call.
Sampler = Callable[[], float]


class ReplayClock:
    """The timer that pytest-benchmark is given: it reads back samples that were interleaved."""

    def __init__(self) -> None:
        self._readings: deque[float] = deque()

    def load(self, samples: list[float]) -> None:
        self._readings.clear()
        for sample in samples:
            self._readings.extend((0.0, sample))

    def read(self) -> float:
        return self._readings.popleft()


CLOCK = ReplayClock()


@contextlib.contextmanager
def _no_collector() -> Iterator[None]:
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


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


def interleave(samplers: dict[str, Sampler], budget: float = BUDGET) -> dict[str, list[float]]:
    """Samples of every provider, one a round in turn; `budget` is in seconds for each."""
    with _no_collector():
        every = {}
        for name, sample in samplers.items():
            start = time.perf_counter()
            sample()
            wanted = budget / (time.perf_counter() - start)
            every[name] = math.ceil(ROUNDS / min(ROUNDS, max(MIN_SAMPLES, wanted)))
        samples: dict[str, list[float]] = {name: [] for name in samplers}
        for turn in range(ROUNDS):
            for name, sample in samplers.items():
                if turn % every[name] == 0:
                    samples[name].append(sample())
    return samples


def percentile(samples: list[float], q: float) -> float:
    """The q-th quantile, linear between the two nearest samples."""
    ordered = sorted(samples)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def median(samples: list[float]) -> float:
    return statistics.median(samples)


def peak_mb(bound: Bound) -> float | None:
    """Peak resident MB of one call beyond what stands before it; None where Linux cannot say."""
    if bound.prepare is not None:
        bound.prepare()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
        before = _status_kb("VmRSS")
        bound.call()
        return max(0.0, (_status_kb("VmHWM") - before) / 1024)
    except OSError:
        return None


def _status_kb(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")
