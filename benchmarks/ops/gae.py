"""`gae` with returns and moments: in every layout, against loops, scans and compiled peers."""

from __future__ import annotations

import torch

from benchmarks.ops.case import CALL, DTYPES, FORWARD, PACKED, TIME_MAJOR, Case, Shape
from benchmarks.ops.inputs import GAE_OPTIONS
from benchmarks.ops.op import CPU, Cost, Goal, Op, call_time, device_time
from benchmarks.ops.sizes import RLHF_8X512, RLHF_512X8K, RLHF_LONG, TINY
from ppo_fast.testing import Call, gae_call

NAME = "gae"
PACKED_BATCH = Shape("packed", (256, 1024), PACKED)
# Environments × steps of classic RL.
ENVS_32 = Shape("envs-32", (4096, 32))
ENVS_128 = Shape("envs-128", (4096, 128), TIME_MAJOR)
ENVS_8 = Shape("envs-8", (32768, 8), TIME_MAJOR)
# Few long sequences: what a scan over rows alone does not fill a machine with.
LONG_128K = Shape("long-128k", (8, 131072))
LONG_16X64K = Shape("long-16x64k", (16, 65536))
LONG_16X128K = Shape("long-16x128k", (16, 131072))
LONG_1M = Shape("long-1m", (1, 1048576))

GAE = Case(NAME, FORWARD, RLHF_LONG)
GAE_CALL = Case(NAME, CALL, TINY)
GPU_GAE = Case(NAME, FORWARD, RLHF_512X8K, device="cuda")
GPU_GAE_LONG = Case(NAME, FORWARD, LONG_16X64K, device="cuda")
GPU_GAE_ENVS_8 = Case(NAME, FORWARD, ENVS_8, device="cuda")
GPU_GAE_ENVS_128 = Case(NAME, FORWARD, ENVS_128, device="cuda")
# Those with the same goals.
_ALIKE = (GAE, *(Case(NAME, FORWARD, shape) for shape in (ENVS_128, LONG_128K, PACKED_BATCH)))
CASES = (
    *_ALIKE,
    *(Case(NAME, FORWARD, shape) for shape in (RLHF_8X512, ENVS_32, ENVS_8)),
    GAE_CALL,
    GPU_GAE,
    GPU_GAE_LONG,
    GPU_GAE_ENVS_8,
    GPU_GAE_ENVS_128,
    Case(NAME, FORWARD, PACKED_BATCH, device="cuda"),
)


def _same(case: Case) -> tuple[Goal, ...]:
    """The same figures at every shape, where the loop has one step for 4096 environments too."""
    return (
        Goal(case, CPU, "loop", 700, 900),
        Goal(case, CPU, "torchrl", 50, 100),
        Goal(case, CPU, "tianshou", 3, 6),
        Goal(case, CPU, "copy", 2, 1.4, faster=False),
    )


GOALS = (
    *(goal for case in _ALIKE for goal in _same(case)),
    call_time(GAE_CALL),
    device_time(GPU_GAE, 26, 19),
    device_time(GPU_GAE_LONG, 18, 10),
    device_time(GPU_GAE_ENVS_8, 6, 3),
    device_time(GPU_GAE_ENVS_128, 5, 4),
)


def inputs(case: Case) -> Call:
    """Whole sequences; packed ones are cut at random places."""
    shape, dtype = case.shape, DTYPES[case.dtype]
    sequences, tokens = shape.dims
    if shape.layout == PACKED:
        call = gae_call((shape.numel,), dtype=dtype, mask=None, extras=(), **GAE_OPTIONS)
        generator = torch.Generator().manual_seed(1)
        cuts = torch.randperm(shape.numel - 1, generator=generator)[: sequences - 1] + 1
        ends = torch.tensor([0, shape.numel])
        return call.replace(cu_seqlens=torch.cat([cuts, ends]).sort().values)
    if shape.layout == TIME_MAJOR:
        options = {**GAE_OPTIONS, "time_major": True}
        return gae_call((tokens, sequences), dtype=dtype, mask=None, extras=(), **options)
    return gae_call((sequences, tokens), dtype=dtype, mask=None, extras=(), **GAE_OPTIONS)


def cost(case: Case) -> Cost:
    """Rewards and values in, advantages and returns out."""
    n = case.shape.numel
    return Cost(n * (2 * DTYPES[case.dtype].itemsize + 8), 8 * n)


OP = Op(NAME, 7, CASES, inputs, cost, GOALS, sizes=(LONG_16X128K, LONG_1M))
