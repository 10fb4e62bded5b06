"""Rows of a run: made from samples, printed as a table, kept as JSON."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from benchmarks.goals import GOALS, Verdict, judge
from benchmarks.machine import slug
from benchmarks.shapes import CALL, CALL_GRAD, Case
from benchmarks.suite import Outcome
from benchmarks.timing import median, percentile
from benchmarks.workloads import cost

FORMAT = 1
Row = dict[str, Any]
# Ratios in the table are to the first of these that the case has.
_BASELINES = ("eager", "loop", "ppo_fast-reference")


def make_rows(case: Case, outcomes: dict[str, Outcome], facts: dict[str, Any]) -> list[Row]:
    """One row per provider of a case, in the order of the outcomes."""
    timed = {name: median(o.samples) for name, o in outcomes.items() if o.samples}
    baseline = next((name for name in _BASELINES if name in timed), None)
    rows = []
    for name, outcome in outcomes.items():
        row: Row = {
            "op": case.op, "direction": case.direction, "shape": case.shape.name,
            "dims": list(case.shape.dims), "dtype": case.dtype, "env": dict(case.env),
            "provider": name, "status": outcome.status, "detail": outcome.detail,
        }  # fmt: skip
        if name in timed:
            seconds, (moved, flops) = timed[name], cost(case)
            row |= {
                "median_ms": seconds * 1e3,
                "p20_ms": percentile(outcome.samples, 0.2) * 1e3,
                "p80_ms": percentile(outcome.samples, 0.8) * 1e3,
                "samples": len(outcome.samples),
                "bytes": moved, "flops": flops,
                "gb_per_s": moved / seconds / 1e9, "gflop_per_s": flops / seconds / 1e9,
                "baseline": baseline,
                "times_faster": timed[baseline] / seconds if baseline else None,
                "peak_mb": outcome.peak_mb,
            }  # fmt: skip
        rows.append(row | facts)
    return rows


def verdicts(measured: dict[Case, dict[str, Outcome]]) -> list[Verdict]:
    """Every goal whose case was run."""

    def of(case: Case, provider: str) -> float | None:
        outcome = measured.get(case, {}).get(provider)
        return median(outcome.samples) if outcome and outcome.samples else None

    return [judge(goal, of) for goal in GOALS if goal.case in measured]


def _aligned(lines: list[list[str]]) -> list[str]:
    """Columns padded to their widest cell: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def table(measured: dict[Case, dict[str, Outcome]], facts: dict[str, Any]) -> list[str]:
    """The timing table, one block a case."""
    out: list[str] = []
    for case, outcomes in measured.items():
        unit, scale = ("us", 1e3) if case.direction in (CALL, CALL_GRAD) else ("ms", 1.0)
        head = ["", f"median {unit}", "p20", "p80", "GB/s", "x faster", "peak MB", "n"]
        lines, notes = [head], []
        for row in make_rows(case, outcomes, facts):
            if "median_ms" not in row:
                notes.append(f"  {row['provider']}: {row['status']}: {row['detail']}")
                continue
            times = [f"{row[key] * scale:.4g}" for key in ("median_ms", "p20_ms", "p80_ms")]
            faster, peak = row["times_faster"], row["peak_mb"]
            lines.append([
                "  " + row["provider"], *times, f"{row['gb_per_s']:.1f}",
                "-" if faster is None else f"{faster:.3g}",
                "-" if peak is None else f"{peak:.1f}", str(row["samples"]),
            ])  # fmt: skip
        out += ["", case.name, *(_aligned(lines) if len(lines) > 1 else []), *notes]
    return out


def verdict_table(found: list[Verdict]) -> list[str]:
    """The goals beside what was measured: must reach, and aim."""
    word = {True: "met", False: "SHORT", None: "-"}
    lines = [["goal", "measured", "must reach", "", "aim", ""]]
    for verdict in found:
        goal, value = verdict.goal, verdict.value
        unit, sign = ("x", ">=" if goal.faster else "<=") if goal.against else (" us", "<=")
        what = f"{goal.case.name} {goal.provider}"
        if goal.against:
            what += f" {'faster than' if goal.faster else 'against'} {goal.against}"
        lines.append([
            what,
            "not measured" if value is None else f"{value:.3g}{unit}",
            "-" if goal.must is None else f"{sign} {goal.must:g}{unit}", word[verdict.must_met],
            "-" if goal.aim is None else f"{sign} {goal.aim:g}{unit}", word[verdict.aim_met],
        ])  # fmt: skip
    return _aligned(lines) if len(lines) > 1 else []


def save(folder: Path, rows: list[Row], found: list[Verdict]) -> Path:
    """Write `<machine>-<date>.json`; cases measured again replace those of an earlier run."""
    facts = rows[0]
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    path = folder / f"{slug(facts['machine'], facts['isa'])}-{day}.json"
    kept = _others(path, rows)
    goals = [
        {
            "case": verdict.goal.case.name, "provider": verdict.goal.provider,
            "against": verdict.goal.against, "faster": verdict.goal.faster,
            "must": verdict.goal.must, "aim": verdict.goal.aim, "value": verdict.value,
            "must_met": verdict.must_met, "aim_met": verdict.aim_met,
        }
        for verdict in found
    ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT, "date": day, "rows": kept + rows, "goals": goals}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def _others(path: Path, rows: list[Row]) -> list[Row]:
    """Rows of the file whose case is not among the new ones."""
    if not path.exists():
        return []
    before = json.loads(path.read_text())
    if before["format"] != FORMAT:
        raise ValueError(f"{path} has format {before['format']}, this suite writes {FORMAT}")

    def key(row: Row) -> tuple[Any, ...]:
        names = ("op", "direction", "shape", "dims", "dtype", "env")
        return tuple(str(row[name]) for name in names)

    new = {key(row) for row in rows}
    return [row for row in before["rows"] if key(row) not in new]
