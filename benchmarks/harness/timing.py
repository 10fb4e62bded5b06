"""Interleaved timing of providers: each round has all of them, so a slow moment hits them all.

One sample is taken by the device's module: `cpu_timing`, `gpu_timing`.
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator

ROUNDS = 25
# A provider that takes more than its budget sits rounds out, down to this many samples.
MIN_SAMPLES = 5

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


def interleave(samplers: dict[str, Sampler], budget: float) -> dict[str, list[float]]:
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
