"""Ceilings of this GPU: `python -m benchmarks.gpu.ceilings [cuda|cpu] [FILE]`.

What no kernel here can be faster than, and what its figures must be read beside: a copy, a read,
the flush between samples, an empty graph, the products of the head at the chunk heights that come
into question. On "cpu" every probe runs once, tiny, and nothing is timed.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import gpu_timing
from benchmarks.harness.machine import describe
from ppo_fast.ops import gemm

_SAMPLES = 7
# R2 of the goals: vocabulary and hidden size.
_HEAD = {"cuda": (151936, 4096), "cpu": (64, 16)}
_HEIGHTS = {"cuda": (512, 1024, 1536, 2048, 4096), "cpu": (16,)}
_BYTES = {"cuda": 2**32, "cpu": 2**10}


class Probe(NamedTuple):
    """One thing that is timed, and the bytes it moves or the flops it takes."""

    name: str
    run: Callable[[], Any]
    amount: int
    unit: str  # "GB/s", "TFLOP/s", or "" for a time alone


def memory(device: str) -> Iterator[Probe]:
    """A copy and a read of gigabytes."""
    size = _BYTES[device]
    x = torch.ones(size // 4, device=device)
    y = torch.empty_like(x)
    yield Probe("copy", lambda: y.copy_(x), 2 * size, "GB/s")
    yield Probe("read", lambda: x.sum(), size, "GB/s")


def products(device: str) -> Iterator[Probe]:
    """The three products of the head in bf16, at heights of a chunk: a first pass over the
    weight's gradient, which writes it, and a later one, which adds to it."""
    vocab, width = _HEAD[device]
    weight = torch.randn(vocab, width, device=device).to(torch.bfloat16)
    total = torch.zeros(vocab, width, device=device)
    for rows in _HEIGHTS[device]:
        hidden = torch.randn(rows, width, device=device).to(torch.bfloat16)
        z = torch.empty(rows, vocab, device=device)
        dz = torch.randn(rows, vocab, device=device).to(torch.bfloat16)
        amount = 2 * rows * vocab * width

        def run(name: str, f: Callable[..., Any], *args: Tensor | int, n: int = amount) -> Probe:
            return Probe(name, lambda: f(*args), n, "TFLOP/s")

        yield run(f"logits, {rows} rows", gemm.logits_into, z, hidden, weight)
        yield run(f"hidden's gradient, {rows} rows", gemm.hidden_gradient, dz, weight)
        for sign, beta in (("=", 0), ("+=", 1)):
            name = f"weight's gradient {sign}, {rows} rows"
            yield run(name, gemm.add_weight_gradient, total, dz, hidden, beta)


def timed(probe: Probe) -> dict[str, Any]:
    """The median of some samples, and the rate it makes."""
    sample = gpu_timing.Timed(probe.run, None)
    sample()
    seconds = statistics.median(sample() for _ in range(_SAMPLES))
    scale = {"GB/s": 1e9, "TFLOP/s": 1e12}.get(probe.unit)
    rate = None if scale is None else round(probe.amount / seconds / scale, 1)
    return {"us": round(seconds * 1e6, 2), "rate": rate, "unit": probe.unit}


def overheads() -> Iterator[Probe]:
    """Costs around a kernel: the flush, the events alone, a graph of one tiny kernel."""
    one = torch.zeros((), device="cuda")
    graph = gpu_timing.captured(lambda: one.add_(1))
    yield Probe("events alone", lambda: None, 0, "")
    yield Probe("graph of one tiny kernel", graph.replay, 0, "")
    yield Probe("flush of the L2", gpu_timing.flush, 0, "")


def main(device: str = "cuda", path: str | None = None) -> int:
    """Print a line per probe; write them where a file is named."""
    found: dict[str, Any] = {}
    groups = [memory(device), products(device)]
    for group in [overheads(), *groups] if device == "cuda" else groups:
        for probe in group:
            if device == "cpu":
                probe.run()
                print(f"{probe.name}: ran")
                continue
            found[probe.name] = row = timed(probe)
            rate = "" if row["rate"] is None else f", {row['rate']} {row['unit']}"
            print(f"{probe.name}: {row['us']} us{rate}", flush=True)
            if path is not None:  # whole after each, as a run may be stopped
                Path(path).write_text(json.dumps({"facts": describe(), "probes": found}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
