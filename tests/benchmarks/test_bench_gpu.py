"""GPU measurement of the benchmark suite, tested without a GPU, and the dry run."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bench_rows import GPU_FACTS, lines_with, row
from conftest import usable

from benchmarks.gpu import dry_run, sanitize, summary
from benchmarks.gpu.dry_run import GPU
from benchmarks.harness import gpu_timing
from benchmarks.ops.case import Case
from benchmarks.ops.gae import GPU_GAE
from benchmarks.ops.ppo_loss import GPU_PPO_LOSS
from benchmarks.peers import providers_of
from benchmarks.peers.base import Bound
from benchmarks.report import results
from ppo_fast import testing
from ppo_fast.testing import Call

ROOT = Path(__file__).resolve().parents[2]


class Device:
    """Stand-in for torch.cuda that records its calls and gives them fixed durations."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
        log = self.log = []
        self.seconds, self.captures = seconds, True
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None: ...

            def record(self) -> None:
                log.append("event")

            def synchronize(self) -> None: ...

            def elapsed_time(self, end: Event) -> float:
                return device.seconds * 1e3

        class CUDAGraph:
            def replay(self) -> None:
                log.append("replay")

        @contextlib.contextmanager
        def graph(made: CUDAGraph, stream: object) -> Iterator[None]:
            log.append("capture")
            yield
            if not device.captures:
                raise RuntimeError("operation not permitted when stream is capturing\nmore")

        class Buffer:
            def zero_(self) -> None:
                log.append("flush")

        for name, stand_in in (
            ("Event", Event),
            ("CUDAGraph", CUDAGraph),
            ("graph", graph),
            ("stream", lambda stream: contextlib.nullcontext()),
            ("synchronize", lambda: None),
        ):
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(gpu_timing, "_flush", Buffer)
        monkeypatch.setattr(gpu_timing, "_side_stream", object)

    def bound(self, prepare: bool = False) -> Bound:
        return Bound(
            lambda: self.log.append("call"),
            lambda out: {},
            (lambda: self.log.append("prepare")) if prepare else None,
        )

    def sample(self, sampler: gpu_timing.Timed) -> list[str]:
        self.log.clear()
        assert sampler() == pytest.approx(self.seconds)
        return self.log


def test_a_long_call_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepared and the L2 flushed before the first event, launched as it is."""
    device = Device(monkeypatch, 5e-3)
    sampler = gpu_timing.sampler(device.bound(prepare=True))
    assert not sampler.graph
    assert device.sample(sampler) == ["prepare", "flush", "event", "call", "event"]


def test_a_short_call_on_a_gpu_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch, 5e-6)
    sampler = gpu_timing.sampler(device.bound())
    assert device.log[-2:] == ["capture", "call"] and (sampler.graph, sampler.reason) == (True, "")
    assert device.sample(sampler) == ["flush", "event", "replay", "event"]


def test_what_cannot_be_captured_is_timed_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch, 5e-6)
    device.captures = False
    sampler = gpu_timing.sampler(device.bound())
    assert not sampler.graph and sampler.reason.endswith("not permitted when stream is capturing")
    assert device.sample(sampler) == ["flush", "event", "call", "event"]
    device.captures = True
    assert not gpu_timing.sampler(device.bound(prepare=True)).graph


@pytest.mark.parametrize("case", GPU, ids=lambda case: case.name.replace(" ", "-"))
def test_every_gpu_case_runs_on_shapes(case: Case) -> None:
    """Its options, layouts and dtypes are those that the op takes, forward and backward."""
    call = dry_run.shapes_of(case)
    said = {p.name: dry_run.rehearse(p, case, call) for p in providers_of(case)}
    assert said["ppo_fast-triton"] == "ran"
    assert all(x in ("ran", "bound") or x.startswith(("skipped", "not b")) for x in said.values())


@pytest.mark.long
def test_the_gpu_page_s_dry_run(tmp_path: Path) -> None:
    """On any machine: it builds, collects, binds, and launches nothing."""
    done = subprocess.run(
        ["benchmarks/gpu/run.sh"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"DRY_RUN": "1", "PYTHON": sys.executable, "OUT": str(tmp_path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(case.name in done.stdout for case in GPU)
    assert "tests collected" in done.stdout and "0 providers failed" in done.stdout


@pytest.mark.case("I13")
@pytest.mark.parametrize("made", sanitize.calls("cpu"), ids=lambda call: call.op)
def test_what_the_sanitizers_look_over_runs(made: Call) -> None:
    """Each of the calls, on the emulated device."""
    if torch.cuda.is_available():
        pytest.skip("benchmarks/gpu/run.sh runs them on the GPU")
    assert testing.run(made, usable("cuda"))


def test_the_gpu_page_says_what_it_does_not_know(tmp_path: Path) -> None:
    done = subprocess.run(
        ["benchmarks/gpu/run.sh"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"STEPS": "sing", "OUT": str(tmp_path), "PYTHON": sys.executable},
    )
    assert (
        done.returncode == 2 and "STEPS: build, tests, sanitize or rows, got 'sing'" in done.stdout
    )


def test_the_summary_says_what_was_met_and_what_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert summary.main(tmp_path) == 1
    assert "nothing was measured on a GPU" in capsys.readouterr().out
    died = row(GPU_GAE, "verl", None, status="error", detail="crashed: exit status -11")
    results.save(tmp_path, [row(GPU_GAE, "ppo_fast-triton", 0.020), died], GPU_FACTS)
    assert summary.main(tmp_path) == 0
    out = capsys.readouterr().out
    assert lines_with(out, GPU_GAE.name, "verl: error: crashed: exit status -11")
    assert lines_with(out, GPU_GAE.name, "20.0 µs", "≤ 26 µs", "met", "SHORT")
    assert lines_with(out, GPU_PPO_LOSS.name, "not measured")
