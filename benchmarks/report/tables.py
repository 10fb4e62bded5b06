"""Rows and verdicts as tables of cells, for a terminal and for Markdown."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.ops.case import CALL, CALL_GRAD, Case
from benchmarks.ops.op import Goal
from benchmarks.report.judge import Verdict
from benchmarks.report.results import Row, by_case, case_of

Cells = list[list[str]]
# Ratios in a timing table are to the first of these that the case has.
_BASELINES = ("eager", "loop", "ppo_fast-reference")
# Operations a byte from which on a machine is rather short of arithmetic than of bandwidth.
_INTENSE = 50
_WORDS = {True: "met", False: "SHORT", None: "-"}


def timed(rows: list[Row]) -> dict[str, Row]:
    """The rows that have a time, by provider."""
    return {row["provider"]: row for row in rows if "median_ms" in row}


def fused(provider: str) -> bool:
    """True for this library's backends except the reference."""
    return provider.startswith("ppo_fast-") and provider != "ppo_fast-reference"


def title(facts: dict[str, Any]) -> str:
    """The machine's name for a heading."""
    return facts.get("gpu") or f"{facts['machine']}, {facts['isa']}"


def label(case: Case) -> str:
    """A case within its op's section."""
    size = str(case.shape).replace("x", "×").replace(":", " ")
    parts = [case.direction.replace("+", " and "), f"{case.shape.name} {size}", case.dtype]
    parts += [] if case.device == "cpu" else [case.device]
    return ", ".join(parts + [f"{key}={value}" for key, value in case.env])


def ours(rows: list[Row]) -> dict[str, Row]:
    """The timed rows of this library's fused backends."""
    return {name: row for name, row in timed(rows).items() if fused(name)}


def peers(rows: list[Row]) -> dict[str, Row]:
    """The timed rows of everybody else; ceilings compute nothing."""
    return {
        name: row
        for name, row in timed(rows).items()
        if not name.startswith("ppo_fast-") and not row["ceiling"]
    }


def number(value: float | None, digits: int = 3) -> str:
    """Significant digits without an exponent."""
    if value is None:
        return "-"
    if value == 0 or abs(value) >= 10 ** (digits - 1):
        return f"{value:.0f}"
    return f"{value:.{digits - 1 - math.floor(math.log10(abs(value)))}f}"


def duration(milliseconds: float) -> str:
    """A time in the unit that suits it."""
    if milliseconds < 0.1:
        return f"{number(milliseconds * 1e3)} µs"
    if milliseconds >= 1e4:
        return f"{number(milliseconds / 1e3)} s"
    return f"{number(milliseconds)} ms"


def ceiling_share(rows: list[Row], row: Row) -> float | None:
    """The time of the case's slowest ceiling over a row's: 1 is as fast as can be."""
    times = [r["median_ms"] for r in timed(rows).values() if r["ceiling"]]
    return max(times) / row["median_ms"] if times else None


def timing_cells(case: Case, rows: list[Row]) -> Cells:
    """Heads and a line per timed provider; nothing where nothing was timed."""
    unit, scale = ("µs", 1e3) if case.direction in (CALL, CALL_GRAD) else ("ms", 1.0)
    found = timed(rows)
    base = next((name for name in _BASELINES if name in found), None)
    rate, key_of_rate = _rate(found)
    heads = [
        "",
        f"median {unit}",
        "p20",
        "p80",
        f"× {base}" if base else "×",
        rate,
        "of ceiling",
        "peak MB",
        "samples",
    ]
    lines = []
    for name, row in found.items():
        share = ceiling_share(rows, row)
        lines.append(
            [
                name,
                *(number(row[key] * scale, 4) for key in ("median_ms", "p20_ms", "p80_ms")),
                number(found[base]["median_ms"] / row["median_ms"] if base else None),
                number(row[key_of_rate]),
                "-" if share is None else f"{share:.0%}",
                "-" if row["peak_mb"] is None else f"{row['peak_mb']:.1f}",
                str(row["samples"]),
            ]
        )
    return [heads, *lines] if lines else []


def _rate(found: dict[str, Row]) -> tuple[str, str]:
    """GFLOP/s where arithmetic is what a case waits for, GB/s elsewhere; head and field."""
    heavy = any(row["flops"] > _INTENSE * row["bytes"] for row in found.values())
    return ("GFLOP/s", "gflop_per_s") if heavy else ("GB/s", "gb_per_s")


def steps(rows: list[Row]) -> dict[str, list[Row]]:
    """The parts of whole training steps, by what was trained; rows of ops have no share of one."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if "share" in row:
            case = case_of(row)
            found.setdefault(f"{case.shape.name} {case.shape} {case.device}", []).append(row)
    return found


def step_cells(rows: list[Row]) -> Cells:
    """A line per part of a step: each backend's time, its share of the step and its memory."""
    names = list(dict.fromkeys(row["provider"] for row in rows))
    parts: dict[str, dict[str, Row]] = {}
    for row in rows:
        parts.setdefault(row["direction"], {})[row["provider"]] = row
    units = ("ms", "share", "peak MB")
    lines = [["", *(f"{name} {unit}" for name in names for unit in units)]]
    for part, found in parts.items():
        line = [part]
        for name in names:
            own = found.get(name)
            line += (
                ["-"] * len(units)
                if own is None
                else [
                    number(own["median_ms"], 4),
                    f"{own['share']:.1%}",
                    number(own["peak_mb"], 4),
                ]
            )
        lines.append(line)
    return lines


def notes(rows: list[Row]) -> list[tuple[str, str]]:
    """Per provider what a table's figures do not say: why there is no time, what it computes."""
    found = []
    for row in rows:
        said = " ".join(row["detail"].split())
        if row["status"] != "ok":
            found.append((row["provider"], f"{row['status']}: {said}"))
        elif row["computes"] or said:
            parts = (f"computes {row['computes']}" if row["computes"] else "", said)
            found.append((row["provider"], "; ".join(filter(None, parts))))
    return found


def goal_name(goal: Goal) -> str:
    """Name of a goal: its case, its provider, and the peer it is compared with."""
    name = f"{goal.case.name} {goal.provider}"
    if goal.against is None:
        return name
    if goal.memory:
        return f"{name} smaller peak beyond inputs and gradients than {goal.against}"
    return f"{name} {'faster than' if goal.faster else 'against'} {goal.against}"


def figure(goal: Goal, value: float | None) -> str:
    """A measured value in the goal's unit."""
    return "not measured" if value is None else number(value) + _unit(goal)


def bound(goal: Goal, value: float | None) -> str:
    """Bound on the measured value."""
    return "-" if value is None else f"{'≥' if goal.faster else '≤'} {value:g}{_unit(goal)}"


def _unit(goal: Goal) -> str:
    return "×" if goal.against else " µs"


def goal_cells(found: list[Verdict]) -> Cells:
    """Goals and measured figures: must reach, and aim."""
    lines = [["goal", "measured", "must reach", "", "aim", ""]]
    for verdict in found:
        goal = verdict.goal
        lines.append(
            [
                goal_name(goal),
                figure(goal, verdict.value),
                bound(goal, goal.must),
                _WORDS[verdict.must_met],
                bound(goal, goal.aim),
                _WORDS[verdict.aim_met],
            ]
        )
    return lines


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
    rule = ["---", *["---:"] * (len(cells[0]) - 1)]
    return ["| " + " | ".join(line) + " |" for line in (cells[0], rule, *cells[1:])]


def describe_facts(facts: dict[str, Any]) -> str:
    """Facts of a run in one line, the versions last."""
    pairs = [f"{key} {value}" for key, value in facts.items() if key != "versions"]
    return ", ".join(pairs + [f"{key} {value}" for key, value in facts["versions"].items()])


def table(rows: list[Row]) -> list[str]:
    """The timing tables for a terminal, one block a case or training step."""
    out: list[str] = []
    for name, block in steps(rows).items():
        out += ["", f"ppo_update {name}", *("  " + line for line in aligned(step_cells(block)))]
    for case, block in by_case(r for r in rows if "share" not in r).items():
        cells = timing_cells(case, block)
        out += ["", case.name, *("  " + line for line in (aligned(cells) if cells else []))]
        out += [f"  {provider}: {note}" for provider, note in notes(block)]
    return out


def verdict_table(found: list[Verdict]) -> list[str]:
    """The goals for a terminal."""
    return aligned(goal_cells(found)) if found else []
