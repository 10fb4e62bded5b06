"""Clocks and peak memory of a block."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_MB = 1e6
_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass
class Measurement:
    """Seconds, and the peak above the phase's start in MB (NaN where it cannot be measured)."""

    seconds: float = 0.0
    peak_mb: float = float("nan")


@contextmanager
def timed(device: torch.device) -> Iterator[Measurement]:
    """Time a block, waiting for the device at both ends."""
    result = Measurement()
    _synchronize(device)
    start = time.perf_counter()
    yield result
    _synchronize(device)
    result.seconds = time.perf_counter() - start


class Phases:
    """Seconds of the named phases of an update."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Time a block as the phase `name`, or as a part of it."""
        with timed(self.device) as result:
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + result.seconds


@contextmanager
def measured(device: torch.device) -> Iterator[Measurement]:
    """Time a block and measure its peak memory beyond what was held when it began.

    On CUDA this is the allocator's peak. On Linux it is the process's resident set: freed heap is
    given back first, then the kernel's own high-water mark is reset and read, so that no
    allocation falls between two samples.
    """
    before = _reset_peak(device)
    with timed(device) as result:
        yield result
    result.peak_mb = (_peak(device) - before) / _MB


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> float:
    """Forget the former peak; the bytes held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return float(torch.cuda.memory_allocated(device))
    if not os.access(_CLEAR_REFS, os.W_OK):
        return float("nan")
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    _CLEAR_REFS.write_text("5")  # man proc_pid_clear_refs: resets VmHWM
    return _status("VmRSS")


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return _status("VmHWM") if _STATUS.exists() else float("nan")


def _status(field: str) -> float:
    """A size from /proc/self/status, in bytes."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return float(line.split()[1]) * 1024.0
    return float("nan")
