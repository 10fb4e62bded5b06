"""The benchmark of an op as data: its cases, inputs, least cost and goals.

On a CPU a goal's figures are the project's own targets for its embedded default, two threads:
ratios of medians of one interleaved run. On a GPU they are device times on one NVIDIA H200, random
data and a cold L2: the traffic that a case cannot do without at a copy's 4.3 TB/s, and some slack.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.ops.case import CALL_GRAD, DTYPES, TIME_MAJOR, Case, Shape
from ppo_fast import _dispatch
from ppo_fast.testing import Call

CPU, CPU_INPLACE = "ppo_fast-cpu", "ppo_fast-cpu-inplace"


class Cost(NamedTuple):
    """The least traffic (each input read and each output written once a pass) and arithmetic.

    Exponential, logarithm and division count one operation each. Packed sequences' offsets,
    8 bytes a sequence, are not counted.
    """

    bytes: int
    flops: int


class Goal(NamedTuple):
    """Figure that a provider must reach on a case, and the one it aims at.

    `against` names the peer: at least `must` times faster than it (`faster`), or at most
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


def default_backend(case: Case) -> str:
    """The backend that a call takes on an H200 if none is named: "triton" or "cuda"."""
    rows, columns = case.shape.dims[:2]
    is_head = len(case.shape.dims) > 2
    elements = rows * (case.shape.dims[2] if is_head else columns)  # of its first argument
    walks = case.op in ("gae", "rlhf_advantages")
    work = _dispatch.Work(case.op, elements, rows if walks else 0, case.shape.layout == TIME_MAJOR)
    return _dispatch.provider(work, (9, 0), DTYPES[case.dtype])


def device_time(
    case: Case, must: float, aim: float, backend: str = "", inplace: bool = False
) -> Goal:
    """A goal in microseconds on the GPU, of the backend named or the one that is the default."""
    provider = f"ppo_fast-{backend or default_backend(case)}" + ("-inplace" if inplace else "")
    return Goal(case, provider, None, must, aim, faster=False)


def call_time(case: Case) -> Goal:
    """The goal in microseconds of a call on tiny tensors, the same for every op."""
    must, aim = (40, 25) if case.direction == CALL_GRAD else (25, 15)
    return Goal(case, CPU, None, must, aim, faster=False)


def _no_gradients(case: Case) -> float:
    return 0.0


@dataclass(frozen=True)
class Op:
    """The benchmark of one op; `place` orders the ops in lists and among the goals.

    `inputs` makes a case's call, with the cotangents of its backward; `cost` is the least that the
    case takes. `sizes` are named ones without a case, for `--shape`. `inplace` is the option that
    lets a gradient overwrite the logits. `gradient_mb` is the part of a peak that the gradients
    take, which is in no goal.
    """

    name: str
    place: int
    cases: tuple[Case, ...]
    inputs: Callable[[Case], Call]
    cost: Callable[[Case], Cost]
    goals: tuple[Goal, ...] = ()
    sizes: tuple[Shape, ...] = ()
    inplace: str = ""
    gradient_mb: Callable[[Case], float] = _no_gradients
