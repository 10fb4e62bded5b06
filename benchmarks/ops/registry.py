"""All ops that are measured, with their cases, goals and named sizes.

A new op needs one file in this folder: it bears the op's name and defines `OP`.
"""

from __future__ import annotations

import importlib
import pkgutil

import ppo_fast
from benchmarks import ops
from benchmarks.ops.case import CALL, CALL_GRAD, Case, here
from benchmarks.ops.inputs import on
from benchmarks.ops.op import Cost, Op
from ppo_fast.testing import Call


def found() -> dict[str, Op]:
    """The op of each file that is named for one, by name, in the order of their places."""
    names = [m.name for m in pkgutil.iter_modules(ops.__path__) if m.name in ppo_fast.__all__]
    every = [importlib.import_module(f"{ops.__name__}.{name}").OP for name in names]
    return {op.name: op for op in sorted(every, key=lambda op: op.place)}


def _block(case: Case) -> tuple[bool, int]:
    """The CPU's cases before the GPU's, and there the cost of calling last."""
    return case.device != "cpu", (CALL, CALL_GRAD).index(case.direction) + 1 if case.is_call else 0


OPS = found()
# The cases as goals are set for them, and scaled to this machine.
FULL = tuple(sorted((case for op in OPS.values() for case in op.cases), key=_block))
CASES = tuple(here(case) for case in FULL)
GOALS = tuple(sorted((g for op in OPS.values() for g in op.goals), key=lambda g: _block(g.case)))
SHAPES = {
    shape.name: shape
    for op in OPS.values()
    for shape in (*(case.shape for case in op.cases), *op.sizes)
}


def make_call(case: Case) -> Call:
    """The case's inputs on its device, the same in every process there."""
    call = OPS[case.op].inputs(case)
    return on(call if case.differentiates else call._replace(cotangents={}), case.device)


def cost(case: Case) -> Cost:
    """The least bytes moved and operations."""
    return OPS[case.op].cost(case)


def gradient_mb(case: Case) -> float:
    """The part of a case's peak that its gradients take, in MB."""
    return OPS[case.op].gradient_mb(case)
