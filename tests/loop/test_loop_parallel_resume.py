"""Two gloo processes that go on from a checkpoint end as if they had never stopped."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from loop_helpers import trainer, weights
from loop_ranks import WORLD, free_port, whole
from rich.console import Console

from ppo_fast.loop import CheckpointError, processes
from ppo_fast.loop.checkpoint.folder import read

QUIET = Console(quiet=True)
UPDATES, LEFT = 4, 2
RUNS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp2": {"parallel": "fsdp2"},
    "fsdp2-all-layers-separate": {
        "parallel": "fsdp2",
        "critic": "separate",
        "train_layers": 0,
        "head": "logits",
    },
}


def ended(t: Any) -> dict[str, Any]:
    """Weights, moments and the last records of a run to its end."""
    records, step = [], t.step

    def kept() -> dict[str, Any]:
        records.append(step())
        return records[-1]

    t.step = kept
    t.run(QUIET)
    state = t.agent.optimizer.state
    moments = [whole(x) for p in t.agent.parameters for x in state[p].values()]
    timed = ("seconds", "tokens_per_second")
    return {
        "tensors": [whole(w) for w in weights(t)] + moments,
        "records": [
            {k: v for k, v in r.items() if k not in timed} for r in records[-(UPDATES - LEFT) :]
        ],
    }


def refused(t: Any) -> str:
    """A save's message with a file in the folder's place."""
    t.step()
    if t.ranks.first:
        (t.config.out / "checkpoints").write_text("")
    try:
        t.checkpoints.save(t)
    except CheckpointError as error:
        return str(error)
    return ""


def worker(rank: int, folder: str, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(WORLD),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    config = trainer(Path(folder) / f"configuration-{rank}").config
    found: dict[str, Any] = {}
    with processes(config) as ranks:
        for name, options in RUNS.items():
            sharded = dataclasses.replace(ranks, sharded="parallel" in options)
            out = Path(folder) / name
            options = options | {"updates": UPDATES, "save_every": 1, "keep_checkpoints": UPDATES}
            unbroken = ended(trainer(out, ranks=sharded, **options))
            if ranks.first:
                for number in range(LEFT + 1, UPDATES + 1):
                    shutil.rmtree(out / "checkpoints" / f"update-{number:06d}")
            dist.barrier()
            again = trainer(out, ranks=sharded, resume=True, **options)
            torch.manual_seed(99)
            found[name] = (unbroken, ended(again))
            found[f"{name}-refused"] = refused(
                trainer(Path(folder) / f"full-{name}", ranks=sharded)
            )
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder, and what each of two processes found."""
    folder = tmp_path_factory.mktemp("resumed")
    mp.start_processes(worker, (str(folder), free_port()), nprocs=WORLD, start_method="spawn")
    return folder, [torch.load(folder / f"{r}.pt", weights_only=False) for r in range(WORLD)]


@pytest.mark.case("R1")
@pytest.mark.parametrize("name", RUNS)
def test_resumed_ranks_end_bitwise_equal(found: Any, name: str) -> None:
    folder, ranks = found
    for rank in ranks:
        unbroken, again = rank[name]
        assert len(again["tensors"]) > 4 and len(again["records"]) == UPDATES - LEFT
        pairs = zip(unbroken["tensors"], again["tensors"], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert again["records"] == unbroken["records"]
        for a, b in zip(again["tensors"], ranks[0][name][1]["tensors"], strict=True):
            assert torch.equal(a, b)
    saved = read(folder / name / "checkpoints" / f"update-{UPDATES:06d}")["state"]["weights"]
    pairs = zip(saved.values(), ranks[0][name][1]["tensors"], strict=False)  # weights come first
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", RUNS)
def test_a_save_that_fails_is_told_to_every_rank(found: Any, name: str) -> None:
    folder, ranks = found
    said = [rank[f"{name}-refused"] for rank in ranks]
    assert said[0] == said[1] and said[0].startswith(
        f"saving {folder}/full-{name}/checkpoints/update-"
    )
