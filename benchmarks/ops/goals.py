"""What each op must reach, as data, and the verdict on a run.

On a CPU the figures are the project's own targets for its embedded default, two threads: ratios of
medians of one interleaved run. On a GPU they are device times on one NVIDIA H200, random data
and a cold L2: the traffic that a case cannot do without at a copy's 4.3 TB/s, and some slack.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from benchmarks.ops import cases
from benchmarks.ops.case import Case


class Goal(NamedTuple):
    """`against` names the peer: at least `must` times faster than it (`faster`), or at most
    `must` times as long. Without `against` the figures are microseconds a call. With `memory`
    it is peak memory beyond the inputs that is compared, not time.
    """

    case: Case
    provider: str
    against: str | None
    must: float | None
    aim: float | None
    faster: bool = True
    memory: bool = False


class Verdict(NamedTuple):
    """A goal beside what was measured: `met` is None where there is no such figure."""

    goal: Goal
    value: float | None
    must_met: bool | None
    aim_met: bool | None


_CPU, _INPLACE = "ppo_fast-cpu", "ppo_fast-cpu-inplace"
_TRITON, _TRITON_INPLACE = "ppo_fast-triton", "ppo_fast-triton-inplace"


def _device(case: Case, must: float, aim: float, provider: str = _TRITON) -> Goal:
    """A time on the GPU in microseconds."""
    return Goal(case, provider, None, must, aim, faster=False)


def _gae(case: Case) -> tuple[Goal, ...]:
    """The same figures at every shape, where the loop has one step for 4096 environments too."""
    return (
        Goal(case, _CPU, "loop", 700, 900),
        Goal(case, _CPU, "torchrl", 50, 100),
        Goal(case, _CPU, "tianshou", 3, 6),
        Goal(case, _CPU, "copy", 2, 1.4, faster=False),
    )


GOALS = (
    Goal(cases.LOGPROBS_FORWARD, _CPU, "eager", 16, 24),
    Goal(cases.LOGPROBS_FORWARD, _CPU, "compile", 2.2, 3.5),
    Goal(cases.LOGPROBS_FORWARD, _CPU, "read", None, 2, faster=False),
    Goal(cases.LOGPROBS_BOTH, _CPU, "eager", 8, None),
    Goal(cases.LOGPROBS_BOTH, _CPU, "compile", 3, None),
    Goal(cases.LOGPROBS_BOTH, _INPLACE, "eager", None, 15),
    Goal(cases.LOGPROBS_BOTH, _INPLACE, "compile", None, None),
    Goal(cases.LOGPROBS_BOTH_THP, _CPU, "eager", 5, None),
    Goal(cases.LOGPROBS_BOTH_THP, _CPU, "compile", None, None),
    Goal(cases.LOGPROBS_BOTH_THP, _INPLACE, "eager", None, 15),
    Goal(cases.PPO_LOSS_BOTH, _CPU, "eager", 25, 50),
    Goal(cases.PPO_LOSS_BOTH, _CPU, "compile", 8, 16),
    Goal(cases.LINEAR_LOSS_BOTH, _CPU, "gemms", 1.15, 1.05, faster=False),
    Goal(cases.LINEAR_LOSS_BOTH, _CPU, "eager", 4, 10, memory=True),
    *(goal for case in cases.GAES for goal in _gae(case)),
    *(Goal(case, _CPU, None, 25, 15, faster=False) for case in cases.CALLS),
    *(Goal(case, _CPU, None, 40, 25, faster=False) for case in cases.CALLS_WITH_GRAD),
    _device(cases.GPU_LOGPROBS_FORWARD, 640, 580),
    _device(cases.GPU_LOGPROBS_BACKWARD, 1290, 1190, _TRITON_INPLACE),
    _device(cases.GPU_LOGITS_LOSS, 1740, 1220, _TRITON_INPLACE),
    _device(cases.GPU_LINEAR_FORWARD, 16500, 13700),
    _device(cases.GPU_LINEAR_LOSS, 47000, 40000),
    _device(cases.GPU_PPO_LOSS, 10, 5),
    _device(cases.GPU_GAE, 26, 19),
    _device(cases.GPU_GAE_LONG, 18, 10),
    _device(cases.GPU_GAE_ENVS_8, 6, 3),
    _device(cases.GPU_GAE_ENVS_128, 5, 4),
    _device(cases.GPU_LOGPROBS_M64, 9, 7),
    _device(cases.GPU_LOGPROBS_M512, 45, 40),  # 80 and 90 % of the bandwidth
)


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
