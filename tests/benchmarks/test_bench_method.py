"""Method of the benchmark suite: order of timing, and handling of failures."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness import cpu_timing, measure, timing, worker
from benchmarks.harness.measure import Outcome
from benchmarks.harness.worker import BrokenError, Worker, Workers
from benchmarks.ops.case import Case
from benchmarks.ops.gae import GAE_CALL as TINY
from benchmarks.ops.gae import GPU_GAE
from benchmarks.peers import Provider
from benchmarks.peers.base import Bound
from benchmarks.report import results
from ppo_fast import testing

ROOT = Path(__file__).resolve().parents[2]
BENCH = (sys.executable, "-m", "pytest", "benchmarks/bench_ops.py", "--benchmark-only", "-q")


def alone(**more: str) -> dict[str, str]:
    """The environment for a pytest of its own: benchmarks refuse to be a worker of another one."""
    return {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | more


class Clock:
    """Seconds that pass only when somebody says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def taking(self, seconds: float, log: list[str], name: str) -> timing.Sampler:
        def sample() -> float:
            log.append(name)
            self.now += seconds
            return seconds

        return sample


def test_rounds_are_interleaved(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sample each in turn; who takes more than its budget sits rounds out, not below five."""
    log: list[str] = []
    clock = Clock(monkeypatch)
    names = {"a": 0.01, "b": 0.01, "slow": 1.0}
    found = timing.interleave({k: clock.taking(v, log, k) for k, v in names.items()}, 1.0)
    assert {name: len(samples) for name, samples in found.items()} == {"a": 25, "b": 25, "slow": 5}
    first, *rounds = "".join("s" if name == "slow" else name for name in log).split("a")
    assert first == "" and rounds[0] == "bs"  # what each takes is looked at first
    assert rounds[1:] == ["bs" if turn % 5 == 0 else "b" for turn in range(25)]


def test_a_short_call_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the clock can tell, unless it needs preparing before each call."""
    log: list[str] = []
    run = Clock(monkeypatch).taking(1e-4, log, "x")
    assert cpu_timing.sampler(Bound(run, lambda out: {}))() == pytest.approx(1e-4)
    before = len(log)
    cpu_timing.sampler(Bound(run, lambda out: {}))
    assert len(log) - before >= cpu_timing.MIN_SAMPLE / 1e-4
    log.clear()
    cpu_timing.sampler(Bound(run, lambda out: {}, lambda: log.append("prepare")))()
    assert log == ["prepare", "x"]


def test_a_peak_counts_memory_that_an_earlier_call_freed() -> None:
    """40 MB in blocks that the allocator keeps for reuse, below one that is still in use."""
    n, size = 400, 100 * 1024

    def call() -> None:
        blocks = [torch.zeros(size // 4) for _ in range(n)]
        blocks.clear()

    blocks = [torch.zeros(size // 4) for _ in range(n)]
    above = torch.zeros(size // 4)
    blocks.clear()
    peak = cpu_timing.peak_mb(Bound(call, dict))
    if peak is None:
        pytest.skip("the system does not tell a process's peak of resident memory")
    assert peak >= 0.95 * n * size / 2**20
    assert above.numel() == size // 4


@pytest.mark.parametrize("q, value", [(0, 1.0), (0.2, 1.8), (0.5, 3.0), (0.8, 4.2), (1, 5.0)])
def test_percentiles(q: float, value: float) -> None:
    assert timing.percentile([5.0, 1.0, 4.0, 2.0, 3.0], q) == pytest.approx(value)
    assert timing.percentile([7.0], q) == 7.0


def providers(monkeypatch: pytest.MonkeyPatch, **calls: Callable[[], Any]) -> None:
    """Providers of every case, by name what each one's call gives."""

    def named(out: Any) -> dict[str, torch.Tensor]:
        return dict(zip(("advantages", "returns"), out, strict=True))

    def bind(call: Callable[[], Any]) -> Callable[[Case, testing.Call], Bound]:
        return lambda case, inputs: Bound(lambda: call(inputs), named)

    found = tuple(Provider(name, bind(call)) for name, call in calls.items())
    monkeypatch.setattr(measure, "providers_of", lambda case: found)
    monkeypatch.setattr(results, "providers_of", lambda case: found)


def right(call: testing.Call) -> tuple[torch.Tensor, torch.Tensor]:
    out = testing.run(call, "reference")
    return out["advantages"], out["returns"]


def wrong(call: testing.Call) -> tuple[torch.Tensor, torch.Tensor]:
    return right(call)[0] * 1.01, right(call)[1]


def failing(call: testing.Call) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40.00 GiB\nmore")


def test_a_red_gate_and_a_crash_yield_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a row that says so, and the others are timed."""
    providers(monkeypatch, wrong=wrong, failing=failing, right=right)
    begun: list[str] = []
    found = measure.measure(TINY, ["wrong", "failing", "right"], announce=begun.append)
    assert begun == ["wrong", "failing", "right", "right", ""]
    rows = {row["provider"]: row for row in results.make_rows(TINY, found)}
    assert {name: row["status"] for name, row in rows.items()} == {
        "wrong": "red",
        "failing": "error",
        "right": "ok",
    }
    assert "advantages" in rows["wrong"]["detail"]
    assert rows["failing"]["detail"] == (
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 40.00 GiB"
    )
    assert [name for name, row in rows.items() if "median_ms" in row] == ["right"]


def test_a_failure_while_timed_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate's call passed, the next one does not."""
    calls = iter([right, failing])
    providers(monkeypatch, fickle=lambda call: next(calls)(call), right=right)
    found = measure.measure(TINY, ["fickle", "right"])
    assert (found["fickle"].status, found["fickle"].samples) == ("error", [])
    assert found["right"].samples


def test_a_case_out_of_time_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    providers(monkeypatch, late=right)
    found = measure.measure(TINY, ["late"], seconds=-1.0)
    assert found["late"].status == "skipped" and "were used up" in found["late"].detail


class Fake:
    """A worker whose providers break it: by name, what is raised when they are asked for."""

    started: list[Fake]
    breaks: dict[str, BrokenError]

    def __init__(self, env: worker.Environment) -> None:
        self.started.append(self)

    def ask(self, request: dict[str, Any], silence: float) -> dict[str, Outcome]:
        for name in request["names"]:
            if name in self.breaks:
                raise self.breaks[name]
        return {name: Outcome("ok", samples=[1.0]) for name in request["names"]}

    def stop(self) -> None:
        pass


@pytest.mark.parametrize(
    "at_work, statuses, starts",
    [("b", {"a": "ok", "b": "error", "c": "ok"}, 2), ("", dict.fromkeys("abc", "error"), 1)],
)
def test_a_dead_process_costs_who_was_at_work(
    monkeypatch: pytest.MonkeyPatch, at_work: str, statuses: dict[str, str], starts: int
) -> None:
    """The others are measured by a new one; where nobody was, all of them have lost theirs."""
    monkeypatch.setattr(Fake, "started", [], raising=False)
    monkeypatch.setattr(Fake, "breaks", {"b": BrokenError(at_work, "crashed")}, raising=False)
    monkeypatch.setattr(worker, "Worker", Fake)
    found = Workers().measure(GPU_GAE, ["a", "b", "c"])
    assert {name: found[name].status for name in "abc"} == statuses
    assert found["b"].detail == "crashed" and len(Fake.started) == starts


def test_a_process_of_its_own_answers_crashes_and_hangs() -> None:
    """A real worker measures, is stopped while silent, and its death differs from its end."""
    env = (("PPO_FAST_BENCH_TEST", "1"),)
    request = {"case": TINY.to_json(), "names": ["ppo_fast-reference"], "time": False}
    asked = Worker(env)
    found = asked.ask(request | {"seconds": 100.0}, 100.0)
    assert found["ppo_fast-reference"] == Outcome("ok")
    with pytest.raises(BrokenError, match="hung: no sign of life for 0 s"):
        asked.ask(request | {"seconds": 100.0}, 0.0)
    asked.stop()
    asked = Worker(env)
    with pytest.raises(BrokenError, match=r"crashed: exit status 1, KeyError: 'seconds'"):
        asked.ask(request, 100.0)
    asked.stop()


def test_what_was_measured_is_saved_when_a_run_is_killed(tmp_path: Path) -> None:
    """The process ends, without a word, as soon as the second case is about to start."""
    (tmp_path / "killer.py").write_text(
        "import os\n"
        "seen = set()\n"
        "def pytest_runtest_setup(item):\n"
        "    seen.add(item.callspec.params['case'])\n"
        "    if len(seen) == 2:\n"
        "        os._exit(9)\n"
    )
    done = subprocess.run(
        [
            *BENCH,
            "-p",
            "killer",
            "-k",
            "gae-call or whiten-call",
            "--save-results",
            "--results-dir",
            tmp_path,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=alone(PYTHONPATH=os.pathsep.join((str(tmp_path), str(ROOT)))),
    )
    assert done.returncode == 9, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    rows = results.load(path).rows
    assert len({row["op"] for row in rows}) == 1
    assert {row["provider"] for row in rows} >= {"ppo_fast-reference"}
    assert all(row["status"] == "skipped" or row["median_ms"] > 0 for row in rows)


def test_no_case_begins_when_the_minutes_are_used_up() -> None:
    done = subprocess.run(
        [*BENCH, "-p", "no:cacheprovider", "-k", "call", "--minutes", "0", "-rs"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=alone(),
    )
    assert done.returncode == 0, done.stdout
    assert "20 skipped" in done.stdout and "not run: the 0 minutes are used up" in done.stdout
