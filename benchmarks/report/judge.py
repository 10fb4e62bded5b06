"""Verdicts on the goals."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from benchmarks.ops.case import Case
from benchmarks.ops.op import Goal
from benchmarks.ops.registry import GOALS, gradient_mb
from benchmarks.report.results import Row, by_case


class Verdict(NamedTuple):
    """A goal and its measured value: `met` is None where there is no such figure."""

    goal: Goal
    value: float | None
    must_met: bool | None
    aim_met: bool | None


def verdicts(rows: list[Row], goals: Iterable[Goal] | None = None) -> list[Verdict]:
    """Verdicts of the rows on the goals; by default on those whose case was measured."""
    blocks = by_case(rows)
    if goals is None:
        goals = [goal for goal in GOALS if goal.case in blocks]

    def measured(case: Case, provider: str, memory: bool) -> float | None:
        found = (r for r in blocks.get(case, []) if r["provider"] == provider and "median_ms" in r)
        row = next(found, None)
        if row is None:
            return None
        if not memory:
            return float(row["median_ms"]) / 1e3
        return None if row["peak_mb"] is None else row["peak_mb"] - gradient_mb(case)

    return [judge(goal, measured) for goal in goals]


def judge(goal: Goal, measured: Callable[[Case, str, bool], float | None]) -> Verdict:
    """The verdict, from the medians in seconds, or the peaks in memory, of (case, provider)."""
    own = measured(goal.case, goal.provider, goal.memory)
    other = 1e-6 if goal.against is None else measured(goal.case, goal.against, goal.memory)
    if own is None or other is None or own == 0:
        return Verdict(goal, None, None, None)
    value = other / own if goal.faster else own / other

    def met(bound: float | None) -> bool | None:
        if bound is None:
            return None
        return value >= bound if goal.faster else value <= bound

    return Verdict(goal, value, met(goal.must), met(goal.aim))
