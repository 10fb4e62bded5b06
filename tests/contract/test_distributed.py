"""Merging over ranks: two gloo processes, uneven counts, one rank with nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import ppo_fast
from ppo_fast import Moments, testing

WORLD = 2


def inputs(rank: int) -> tuple[testing.Call, torch.Tensor, torch.Tensor]:
    """A loss call, a tensor and its mask; the last rank keeps little."""
    call = testing.ppo_call((4, 9), seed=rank, mask="random" if rank == 0 else "empty")
    x = testing.whiten_call((5, 8), seed=rank, mean=3.0).tensors
    return call, x["x"], x["mask"] if rank == 0 else x["mask"] & (torch.arange(8) < 1)


def worker(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD
    )
    call, x, mask = inputs(rank)
    rollout, correction = x + 0.1 * x.cos(), ppo_fast.Correction("geometric", high=1.2)
    with ppo_fast.use_backend("reference"):
        weighed = ppo_fast.rollout_weights(
            x,
            rollout,
            mask,
            correction=correction,
            normalize=True,
            data_group=dist.group.WORLD,
        )
        stats = ppo_fast.Stats(testing.run(call, None)["stats"]).all_reduce()
        moments = Moments(ppo_fast.reference.moments(x, mask).values).all_reduce()
        white = ppo_fast.whiten(x, mask, process_group=dist.group.WORLD)
    sums = weighed.stats.all_reduce().values
    torch.save((stats.values, moments.values, sums, white, weighed.weights), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.case("I9")
def test_ranks_merge_in_order(tmp_path: Path) -> None:
    mp.start_processes(worker, args=(str(tmp_path),), nprocs=WORLD, start_method="spawn")
    got = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    assert all(testing.same_bits(a, b) for a, b in zip(got[0][:3], got[1][:3], strict=True))
    calls, xs, masks = zip(*(inputs(rank) for rank in range(WORLD)), strict=True)
    stats = [ppo_fast.Stats(testing.run(call, "reference")["stats"]) for call in calls]
    assert testing.same_bits(got[0][0], (stats[0] + stats[1]).values)
    x, mask = torch.cat(xs), torch.cat(masks)
    want = ppo_fast.whiten(x, mask, backend="reference")
    assert torch.allclose(torch.cat([g[3] for g in got]), want, atol=1e-6)
    assert torch.allclose(got[0][1], ppo_fast.reference.moments(x, mask).values)
    correction = ppo_fast.Correction("geometric", high=1.2)
    parts = [
        ppo_fast.rollout_weights(
            x, x + 0.1 * x.cos(), mask, correction=correction, backend="reference"
        ).stats
        for x, mask in zip(xs, masks, strict=True)
    ]
    assert testing.same_bits(got[0][2], (parts[0] + parts[1]).values)
    whole = ppo_fast.rollout_weights(
        x, x + 0.1 * x.cos(), mask, correction=correction, normalize=True, backend="reference"
    )
    # The mean of ten sequences' weights, added in another order.
    weights = torch.cat([g[4] for g in got])
    assert torch.allclose(weights, whole.weights, rtol=2 * 2**-23, atol=0)
