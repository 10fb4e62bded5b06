"""Two ranks for the tests of the loop, and one process that does the same."""

from __future__ import annotations

import dataclasses
import os
import socket
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from loop_helpers import batch_of, tiny_teacher, trainer, weights

from ppo_fast.loop import Trainer, processes
from ppo_fast.loop.data.sequences import Scores
from ppo_fast.loop.ranks.ranks import Ranks
from ppo_fast.loop.update import accumulate, update

WORLD = 2
# name -> dtype and options of a run of three updates
RUNS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "ddp": (torch.float64, {}),
    "ddp-fp32": (torch.float32, {}),
    "ddp-logits-separate": (torch.float64, {"head": "logits", "critic": "separate"}),
    "ddp-gspo-all-layers": (torch.float64, {"variant": "gspo", "train_layers": 0}),
    "ddp-truncated": (torch.float64, {"top_p": 0.8, "min_p": 0.1}),
    "ddp-taught": (torch.float64, {"distill": "jsd", "reward_coef": 0.5, "z_loss_coef": 1e-3}),
    "ddp-taught-pg": (torch.float64, {"distill": "pg"}),
    "fsdp2": (torch.float64, {"parallel": "fsdp2"}),
    "fsdp2-taught": (torch.float64, {"parallel": "fsdp2", "distill": "reverse"}),
    "fsdp2-taught-pg": (torch.float64, {"parallel": "fsdp2", "distill": "pg"}),
    "fsdp2-logits": (torch.float64, {"parallel": "fsdp2", "head": "logits"}),
    "fsdp2-truncated": (torch.float64, {"parallel": "fsdp2", "top_k": 4}),
    "fsdp2-all-layers-separate": (
        torch.float64,
        {"parallel": "fsdp2", "critic": "separate", "train_layers": 0},
    ),
    "fsdp2-fp32-checkpointing": (
        torch.float32,
        {"parallel": "fsdp2", "gradient_checkpointing": True, "train_layers": 0},
    ),
}


def whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def three_updates(t: Trainer) -> dict[str, Any]:
    records = [t.step() for _ in range(3)]
    return {"records": records, "weights": [whole(w) for w in weights(t)]}


def one_side_masked(t: Trainer) -> dict[str, Any]:
    """A minibatch's gradient and statistics where the second half of every micro-batch is masked.

    With two ranks that leaves the second without a token.
    """
    _, _, plan = batch_of(t)
    t.shuffling.manual_seed(t.config.seed)
    t.sampler.generator.manual_seed(t.config.seed)
    second = torch.cat([rows.tensor_split(WORLD)[1] for part in plan for rows in part]).tolist()
    scores = Scores([0.1 * i for i in range(t.config.batch)], dict.fromkeys(second, "masked"))
    _, batch, again = batch_of(t, scores)
    assert all(map(torch.equal, again[0], plan[0]))
    stats = accumulate(t.agent, batch, plan[0], 0.0, t.backend, unchanged=True)
    assert stats is not None
    grads = [p.grad for p in t.agent.parameters]
    assert all(g is not None for g in grads)
    if not t.ranks.sharded:
        t.ranks.sum_(grads)
    return {"stats": t.ranks.merge(stats).compute(), "grads": [whole(g) for g in grads]}


def poisoned(t: Trainer) -> dict[str, Any]:
    """An update in which the second optimiser step's gradient is NaN on the last rank alone."""
    _, batch, plan = batch_of(t)
    steps: list[int] = []
    original = t.agent.step

    def step() -> float | None:
        steps.append(1)
        if len(steps) == 2 and t.ranks.rank == t.ranks.size - 1:
            t.agent.parameters[0].grad.view(-1)[0] = torch.nan
        before = weights(t)
        norm = original()
        if norm is None:
            assert all(map(torch.equal, before, weights(t)))
        return norm

    t.agent.step = step  # type: ignore[method-assign]
    done = update(t.agent, batch, plan, 0.0, t.shuffling, t.backend)
    return {"skipped": done.skipped, "steps": done.steps, "weights": weights(t)}


def everything(folder: Path, ranks_for: Any) -> dict[str, dict[str, Any]]:
    """All of the above; `ranks_for(sharded)` gives the ranks."""
    results = {}
    for name, (dtype, options) in RUNS.items():
        ranks = ranks_for(options.get("parallel") == "fsdp2")
        out = folder / f"{name}-{ranks.rank}-of-{ranks.size}"
        teacher = tiny_teacher(dtype) if "distill" in options else None
        size = 4 // ranks.size
        t = trainer(out, dtype=dtype, ranks=ranks, micro_batch=size, teacher=teacher, **options)
        results[name] = three_updates(t)
    for name, sharded in (("masked-ddp", False), ("masked-fsdp2", True)):
        ranks = ranks_for(sharded)
        out = folder / f"{name}-{ranks.rank}-of-{ranks.size}"
        size = 4 // ranks.size
        t = trainer(out, dtype=torch.float64, ranks=ranks, micro_batch=size)
        results[name] = one_side_masked(t)
    t = trainer(folder / f"poisoned-{ranks.rank}", ranks=ranks_for(False), micro_batch=2)
    results["poisoned"] = poisoned(t)
    return results


def worker(rank: int, folder: str, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(WORLD),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    config = trainer(Path(folder) / f"configuration-{rank}").config
    with processes(config) as ranks:
        results = everything(
            Path(folder), lambda sharded: dataclasses.replace(ranks, sharded=sharded)
        )
    torch.save(results, f"{folder}/{rank}.pt")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def two_ranks(folder: Path) -> list[dict[str, dict[str, Any]]]:
    """The findings of each of two gloo processes."""
    args = (str(folder), free_port())
    mp.start_processes(worker, args, nprocs=WORLD, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


def one_process(folder: Path) -> dict[str, dict[str, Any]]:
    """The findings of one process."""
    return everything(folder, lambda sharded: Ranks())
