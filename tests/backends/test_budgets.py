"""The machine code and the calls behind every GPU goal take no more than counts.json says.

`python -m benchmarks.gpu.count` counts again after a change that is meant.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import budget, count, nvcc

ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def counted(part: str) -> dict[str, Any]:
    """The counts of what is compiled here, by a process in which Triton is not interpreted."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.count", part, "--print"],
        capture_output=True,
        text=True,
        env=env,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def within(part: str) -> None:
    found = counted(part)
    assert found["kernels"] and found["calls"]
    assert budget.exceeded(count.committed(), found) == []


def test_triton_s_kernels_stay_within_their_budgets() -> None:
    within("--triton")


@pytest.mark.skipif(nvcc.nvcc() is None, reason="there is no nvcc to compile with")
def test_nvcc_s_kernels_stay_within_their_budgets() -> None:
    within("--nvcc")


def test_every_goal_has_counts() -> None:
    """Both backends' calls of every goal on a GPU, and their kernels."""
    committed = count.committed()
    expected = {
        count.call_key(goal.case, provider.name)
        for goal in count.gpu_goals()
        for provider in count.providers(goal)
    }
    assert expected and set(committed["calls"]) == expected
    for call, steps in committed["calls"].items():
        kind = "triton" if "triton" in call else "nvcc"
        launched = {step["kernel"] for step in steps if "kernel" in step}
        for compiler, kernels in committed["kernels"].items():
            assert not compiler.startswith(kind) or launched <= set(kernels), compiler


def first_loop(compiler: str) -> tuple[str, ...]:
    """The keys of a loop that loads and stores, in the counts."""
    for name, kernel in count.committed()["kernels"][compiler].items():
        for role, loop in kernel.get("loops", {}).items():
            if "loads" in loop and "stores" in loop:
                return ("kernels", compiler, name, "loops", role)
    raise AssertionError(f"no kernel of {compiler} loads and stores in a loop")


COMPILERS = list(count.committed()["kernels"])


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"instructions": 1.01}, "instructions an element"),
        ({"elements": 0.5}, "instructions an element"),
        ({"loads": {"2": 8}}, "bytes an access of loads"),
        ({"stores": {"4": 4}}, "bytes an access of stores"),
    ],
    ids=str,
)
def test_a_worse_loop_is_refused(compiler: str, change: dict[str, Any], words: str) -> None:
    good = count.committed()
    assert budget.exceeded(good, good) == []
    worse = copy.deepcopy(good)
    loop: Any = functools.reduce(lambda x, key: x[key], first_loop(compiler), worse)
    if "stores" in change:
        assert "16" in loop["stores"], "the loop chosen stores 16 bytes"
    for name, value in change.items():
        loop[name] = value if isinstance(value, dict) else loop[name] * value
    lines = budget.exceeded(good, worse)
    assert lines and all(compiler in line for line in lines)
    assert any(words in line for line in lines)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("resident", "threads are resident"),
        ("once", "instructions in once"),
        ("stack", "bytes of stack"),
    ],
)
def test_a_worse_kernel_is_refused(part: str, words: str) -> None:
    good = count.committed()
    worse = copy.deepcopy(good)
    kernel = next(iter(worse["kernels"][COMPILERS[0]].values()))
    if part == "resident":
        kernel["resident"] -= 1
    elif part == "stack":
        kernel["stack"] += 8
    else:
        kernel["once"]["instructions"] += 1
    (line,) = budget.exceeded(good, worse)
    assert words in line


def test_a_longer_call_is_refused() -> None:
    good = count.committed()
    worse = copy.deepcopy(good)
    name, steps = next(iter(worse["calls"].items()))
    steps.append({"torch": "mul", "bytes": 2**20, "times": 1})
    lines = budget.exceeded(good, worse)
    assert len(lines) == 2 and all(line.startswith(name) for line in lines)
    assert "launches" in lines[0] and "bytes by PyTorch" in lines[1]


def test_what_has_no_budget_is_refused() -> None:
    good = count.committed()
    more = copy.deepcopy(good)
    more["kernels"][COMPILERS[0]]["new_kernel"] = {}
    more["calls"]["new call"] = []
    assert [line.split(": ")[-1] for line in budget.exceeded(good, more)] == ["has no budget"] * 2


def test_another_version_is_held_to_the_newest_that_is_known() -> None:
    good = count.committed()
    kernels = next(v for k, v in good["kernels"].items() if k.startswith("triton 3.9"))
    other = {"kernels": {"triton 4.0.0": copy.deepcopy(kernels)}, "calls": {}}
    assert budget.exceeded(good, other) == []
    name, kernel = next(
        (n, k) for n, k in other["kernels"]["triton 4.0.0"].items() if "loops" in k
    )
    loop = next(iter(kernel["loops"].values()))
    loop["instructions"] = int(loop["instructions"] * (1.1 + budget.OTHER_COMPILER))
    (line,) = budget.exceeded(good, other)
    assert line.startswith(f"triton 4.0.0 {name}: ")
