"""Rows and facts of a benchmark run, made by hand."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.ops.case import Case
from benchmarks.report import results

FACTS: dict[str, Any] = {
    "date": "2026-01-02",
    "machine": "Some CPU",
    "isa": "avx2",
    "threads": 2,
    "load": 0.1,
    "versions": {"torch": "2.13.0"},
    "commit": "aaaaaaaaaaaa",
}
GPU_FACTS = FACTS | {"gpu": "NVIDIA H200", "driver": "580.65.06", "cuda": "13.0"}


def row(case: Case, provider: str, median_ms: float | None, **fields: Any) -> results.Row:
    """A row as a run leaves it, its spread a tenth to either side."""
    made: results.Row = case.to_json() | {
        "provider": provider,
        "ceiling": provider in ("read", "copy"),
        "computes": "",
        "status": "ok",
        "detail": "",
    }
    if median_ms is not None:
        made |= {
            "median_ms": median_ms,
            "p20_ms": 0.9 * median_ms,
            "p80_ms": 1.1 * median_ms,
            "samples": 25,
            "bytes": 4096,
            "flops": 4096,
            "gb_per_s": 4096e-6 / median_ms,
            "gflop_per_s": 4096e-6 / median_ms,
            "peak_mb": 1.5,
        }
    return json.loads(json.dumps(made | fields))


def lines_with(text: str, *parts: str) -> list[str]:
    return [line for line in text.splitlines() if all(part in line for part in parts)]
