"""Rows of a run: made from samples, kept as JSON.

A results file holds `runs`, the facts of each process that measured (machine, driver, versions,
load, commit), and `rows`, each with the index of its run. Times are milliseconds, memory is MB of
2^20 bytes, rates count what its op's `cost` says a case cannot do without and, of a ceiling, what
it moves.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness.machine import slug
from benchmarks.harness.measure import Outcome
from benchmarks.harness.timing import median, percentile
from benchmarks.ops.case import Case
from benchmarks.ops.registry import cost
from benchmarks.peers import providers_of

FORMAT = 2
Row = dict[str, Any]
_CASE = tuple(field.name for field in fields(Case))


class Results(NamedTuple):
    """Contents of a file; `row["run"]` is the index of the run that measured the row."""

    runs: list[dict[str, Any]]
    rows: list[Row]


def make_rows(case: Case, outcomes: dict[str, Outcome]) -> list[Row]:
    """One row per provider of a case, in the order of the outcomes."""
    of = {provider.name: provider for provider in providers_of(case)}
    least, flops = cost(case)
    rows = []
    for name, outcome in outcomes.items():
        row: Row = case.to_json() | {
            "provider": name,
            "ceiling": of[name].ceiling,
            "computes": of[name].computes,
            "status": outcome.status,
            "detail": outcome.detail,
        }
        if outcome.samples:
            seconds, moved = median(outcome.samples), outcome.moved or least
            row |= timing_fields(outcome) | {
                "bytes": moved,
                "flops": flops,
                "gb_per_s": short(moved / seconds / 1e9),
                "gflop_per_s": short(flops / seconds / 1e9),
            }
        rows.append(row)
    return rows


def timing_fields(outcome: Outcome) -> Row:
    """Statistics of a timed outcome's samples."""
    row: Row = {
        "median_ms": short(median(outcome.samples) * 1e3),
        "p20_ms": short(percentile(outcome.samples, 0.2) * 1e3),
        "p80_ms": short(percentile(outcome.samples, 0.8) * 1e3),
        "samples": len(outcome.samples),
        "peak_mb": None if outcome.peak_mb is None else short(outcome.peak_mb),
    }
    return row if outcome.graph is None else row | {"graph": outcome.graph}


def short(value: float) -> float:
    """Six digits: more than any clock here can tell."""
    return float(f"{value:.6g}")


def case_of(row: Row) -> Case:
    """The case that a row belongs to."""
    return Case.from_json({name: row[name] for name in _CASE if name in row})


def by_case(rows: Iterable[Row]) -> dict[Case, list[Row]]:
    """Rows in blocks, one a case, in the order of their first rows."""
    blocks: dict[Case, list[Row]] = {}
    for row in rows:
        blocks.setdefault(case_of(row), []).append(row)
    return blocks


def load(path: Path) -> Results:
    """A results file; one of another format is refused."""
    content = json.loads(path.read_text())
    if content.get("format") != FORMAT:
        raise ValueError(f"{path} has format {content.get('format')}, this suite reads {FORMAT}")
    return Results(content["runs"], content["rows"])


def save(folder: Path, rows: list[Row], facts: dict[str, Any]) -> Path:
    """Merge rows into `<machine>-<date>.json`; a case measured again replaces its earlier rows.

    Rows of one case are of one interleaved run, never of two. The file is replaced whole, so that
    a process stopped at any moment leaves what it had saved before.
    """
    path = folder / f"{slug(facts)}-{facts['date']}.json"
    runs, kept = load(path) if path.exists() else Results([], [])
    new = {case_of(row) for row in rows}
    kept = [row for row in kept if case_of(row) not in new]
    if facts not in runs:
        runs = [*runs, facts]
    merged = kept + [row | {"run": runs.index(facts)} for row in rows]
    used = sorted({row["run"] for row in merged})
    merged = [row | {"run": used.index(row["run"])} for row in merged]
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, to_text(Results([runs[index] for index in used], merged)))
    return path


def to_text(results: Results) -> str:
    """JSON with a line for each run and row, so that a diff shows what was measured again."""

    def lines(items: list[dict[str, Any]]) -> str:
        return ",\n".join("  " + json.dumps(item, ensure_ascii=False) for item in items)

    runs, rows = lines(results.runs), lines(results.rows)
    return f'{{"format": {FORMAT},\n "runs": [\n{runs}\n ],\n "rows": [\n{rows}\n ]}}\n'


def write_whole(path: Path, text: str) -> None:
    """The old content or the new one, whenever the process is stopped."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
