"""Rows and verdicts as tables of cells, for a terminal and for Markdown."""

from __future__ import annotations

from typing import Any

from benchmarks.goals import Verdict
from benchmarks.results import Row, by_case
from benchmarks.shapes import CALL, CALL_GRAD, Case

Cells = list[list[str]]
# Ratios in a timing table are to the first of these that the case has.
_BASELINES = ("eager", "loop", "ppo_fast-reference")
_WORDS = {True: "met", False: "SHORT", None: "-"}


def timed(rows: list[Row]) -> dict[str, Row]:
    """The rows that have a time, by provider."""
    return {row["provider"]: row for row in rows if "median_ms" in row}


def untimed(rows: list[Row]) -> list[Row]:
    """The rows that say why there is no time."""
    return [row for row in rows if row["status"] != "ok"]


def number(value: float | None, digits: int = 3) -> str:
    """Significant digits without an exponent."""
    if value is None:
        return "-"
    if abs(value) >= 10**digits:
        return f"{value:.0f}"
    return f"{value:.{digits}g}"


def timing_cells(case: Case, rows: list[Row]) -> Cells:
    """Heads and a line per timed provider; no lines where nothing was timed."""
    unit, scale = ("µs", 1e3) if case.direction in (CALL, CALL_GRAD) else ("ms", 1.0)
    found = timed(rows)
    base = next((name for name in _BASELINES if name in found), None)
    heads = ["", f"median {unit}", "p20", "p80", "GB/s", f"× {base}", "peak MB", "samples"]
    lines = []
    for name, row in found.items():
        times = [number(row[key] * scale, 4) for key in ("median_ms", "p20_ms", "p80_ms")]
        faster = found[base]["median_ms"] / row["median_ms"] if base else None
        memory = "-" if row["peak_mb"] is None else f"{row['peak_mb']:.1f}"
        lines.append([
            name, *times, number(row["gb_per_s"]), number(faster), memory, str(row["samples"]),
        ])  # fmt: skip
    return [heads, *lines] if lines else []


def goal_cells(found: list[Verdict]) -> Cells:
    """The goals beside what was measured: must reach, and aim."""
    lines = [["goal", "measured", "must reach", "", "aim", ""]]
    for verdict in found:
        goal, value = verdict.goal, verdict.value
        unit, sign = ("×", "≥" if goal.faster else "≤") if goal.against else (" µs", "≤")
        what = f"{goal.case.name} {goal.provider}"
        if goal.against:
            what += f" {'faster than' if goal.faster else 'against'} {goal.against}"

        def bound(figure: float | None, unit: str = unit, sign: str = sign) -> str:
            return "-" if figure is None else f"{sign} {figure:g}{unit}"

        lines.append([
            what, "not measured" if value is None else number(value) + unit,
            bound(goal.must), _WORDS[verdict.must_met], bound(goal.aim), _WORDS[verdict.aim_met],
        ])  # fmt: skip
    return lines if len(lines) > 1 else []


def aligned(cells: Cells) -> list[str]:
    """Columns padded to their widest cell: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]


def markdown(cells: Cells) -> list[str]:
    """A Markdown table, figures to the right."""
    if not cells:
        return []
    rule = ["---", *["---:"] * (len(cells[0]) - 1)]
    return ["| " + " | ".join(line) + " |" for line in (cells[0], rule, *cells[1:])]


def describe_facts(facts: dict[str, Any]) -> str:
    """Facts of a run in one line, the versions last."""
    pairs = [f"{key} {value}" for key, value in facts.items() if key != "versions"]
    return ", ".join(pairs + [f"{key} {value}" for key, value in facts["versions"].items()])


def table(rows: list[Row]) -> list[str]:
    """The timing tables for a terminal, one block a case."""
    out: list[str] = []
    for case, block in by_case(rows).items():
        notes = [f"  {r['provider']}: {r['status']}: {r['detail']}" for r in untimed(block)]
        out += ["", case.name, *("  " + s for s in aligned(timing_cells(case, block))), *notes]
    return out


def verdict_table(found: list[Verdict]) -> list[str]:
    """The goals for a terminal."""
    return aligned(goal_cells(found))
