"""What each op must reach on a CPU, as data, and the verdict on a run.

The figures are the project's own targets for its embedded default, two threads: ratios of
medians of one interleaved run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from benchmarks import shapes
from benchmarks.shapes import Case


class Goal(NamedTuple):
    """`against` names the peer: at least `must` times faster than it (`faster`), or at most
    `must` times as long. Without `against` the figures are microseconds a call.
    """

    case: Case
    provider: str
    against: str | None
    must: float | None
    aim: float | None
    faster: bool = True


class Verdict(NamedTuple):
    """A goal beside what was measured: `met` is None where there is no such figure."""

    goal: Goal
    value: float | None
    must_met: bool | None
    aim_met: bool | None


_CPU, _INPLACE = "ppo_fast-cpu", "ppo_fast-cpu-inplace"

GOALS = (
    Goal(shapes.LOGPROBS_FORWARD, _CPU, "eager", 16, 24),
    Goal(shapes.LOGPROBS_FORWARD, _CPU, "compile", 2.2, 3.5),
    Goal(shapes.LOGPROBS_FORWARD, _CPU, "read", None, 2, faster=False),
    Goal(shapes.LOGPROBS_BOTH, _CPU, "eager", 8, None),
    Goal(shapes.LOGPROBS_BOTH, _CPU, "compile", 3, None),
    Goal(shapes.LOGPROBS_BOTH, _INPLACE, "eager", None, 15),
    Goal(shapes.LOGPROBS_BOTH, _INPLACE, "compile", None, None),
    Goal(shapes.LOGPROBS_BOTH_THP, _CPU, "eager", 5, None),
    Goal(shapes.LOGPROBS_BOTH_THP, _CPU, "compile", None, None),
    Goal(shapes.LOGPROBS_BOTH_THP, _INPLACE, "eager", None, 15),
    Goal(shapes.PPO_LOSS_BOTH, _CPU, "eager", 25, 50),
    Goal(shapes.PPO_LOSS_BOTH, _CPU, "compile", 8, 16),
    Goal(shapes.GAE, _CPU, "loop", 700, 900),
    Goal(shapes.GAE, _CPU, "torchrl", 50, 100),
    Goal(shapes.GAE, _CPU, "tianshou", 3, 6),
    Goal(shapes.GAE, _CPU, "copy", 2, 1.4, faster=False),
    *(Goal(case, _CPU, None, 25, 15, faster=False) for case in shapes.CALLS),
    *(Goal(case, _CPU, None, 40, 25, faster=False) for case in shapes.CALLS_WITH_GRAD),
)


def judge(goal: Goal, median: Callable[[Case, str], float | None]) -> Verdict:
    """The verdict, from the medians in seconds of (case, provider)."""
    own = median(goal.case, goal.provider)
    other = 1e-6 if goal.against is None else median(goal.case, goal.against)
    if own is None or other is None:
        return Verdict(goal, None, None, None)
    value = other / own if goal.faster else own / other

    def met(bound: float | None) -> bool | None:
        if bound is None:
            return None
        return value >= bound if goal.faster else value <= bound

    return Verdict(goal, value, met(goal.must), met(goal.aim))
