"""Differences between two results files."""

from __future__ import annotations

from benchmarks.ops.case import Case
from benchmarks.report import tables
from benchmarks.report.results import Results, Row, case_of


def _keyed(results: Results) -> dict[tuple[Case, str], Row]:
    return {(case_of(row), row["provider"]): row for row in results.rows}


def _apart(one: Row, other: Row) -> bool:
    """True if the spans between the 20th and the 80th percentile do not overlap."""
    return one["p80_ms"] < other["p20_ms"] or other["p80_ms"] < one["p20_ms"]


def diff(before: Results, after: Results) -> list[str]:
    """Lines for a terminal: ratios of medians (below 1: faster now), `moved` where the spans are
    apart, then changes of status and the rows that only one file has.
    """
    old, new = _keyed(before), _keyed(after)
    cells, rest = [["", "before ms", "after ms", "after/before", ""]], []
    for key, row in new.items():
        case, provider = key
        name, earlier = f"{case.name} {provider}", old.get(key)
        if earlier is None:
            rest.append(f"only after: {name} ({row['status']})")
        elif "median_ms" in row and "median_ms" in earlier:
            a, b = earlier["median_ms"], row["median_ms"]
            mark = "moved" if _apart(earlier, row) else ""
            cells.append(
                [name, tables.number(a, 4), tables.number(b, 4), tables.number(b / a), mark]
            )
        elif earlier["status"] != row["status"]:
            rest.append(f"status: {name}: {earlier['status']} -> {row['status']}")
    gone = (key for key in old if key not in new)
    rest += [
        f"only before: {case.name} {name} ({old[case, name]['status']})" for case, name in gone
    ]
    return (tables.aligned(cells) if len(cells) > 1 else []) + rest
