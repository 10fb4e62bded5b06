"""`ppo_loss` with a k3 term, an entropy bonus and every statistic, forward and backward."""

from __future__ import annotations

import torch

from benchmarks.ops.case import BOTH, CALL, CALL_GRAD, DTYPES, Case, Shape
from benchmarks.ops.inputs import PPO_OPTIONS, off_the_bounds, responses
from benchmarks.ops.op import CPU, Cost, Goal, Op, call_time, device_time
from benchmarks.ops.sizes import RLHF_8X512, RLHF_256K, RLHF_512X8K, TINY
from ppo_fast.testing import Call

NAME = "ppo_loss"
RLHF_1024X16K = Shape("rlhf-1024x16k", (1024, 16384))

PPO_LOSS_BOTH = Case(NAME, BOTH, RLHF_256K)
PPO_LOSS_CALL = Case(NAME, CALL, TINY)
PPO_LOSS_CALL_GRAD = Case(NAME, CALL_GRAD, TINY)
GPU_PPO_LOSS = Case(NAME, BOTH, RLHF_256K, device="cuda")
CASES = (
    Case(NAME, BOTH, RLHF_8X512),
    Case(NAME, BOTH, RLHF_512X8K),
    PPO_LOSS_BOTH,
    PPO_LOSS_CALL,
    PPO_LOSS_CALL_GRAD,
    GPU_PPO_LOSS,
    Case(NAME, BOTH, RLHF_1024X16K, device="cuda"),
)

GOALS = (
    Goal(PPO_LOSS_BOTH, CPU, "eager", 25, 50),
    Goal(PPO_LOSS_BOTH, CPU, "compile", 8, 16),
    call_time(PPO_LOSS_CALL),
    call_time(PPO_LOSS_CALL_GRAD),
    device_time(GPU_PPO_LOSS, 10, 5),
)


def inputs(case: Case) -> Call:
    """A policy some steps from the one that sampled: a tenth of its ratios are clipped."""
    generator, dims = torch.Generator().manual_seed(0), case.shape.dims

    def normal(scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(dims, generator=generator) * scale).to(DTYPES[case.dtype])

    logprobs, ratio = -normal(2.0).abs(), normal(0.15).exp()
    # Statistics count clipped tokens: none may stand where rounding decides on which side.
    ratio = off_the_bounds(ratio, 1e-3, 1e-2)
    tensors = {
        "logprobs": logprobs,
        "old_logprobs": logprobs - ratio.log(),
        "advantages": normal(),
        "mask": responses(dims),
        "entropy": normal().abs(),
        "ref_logprobs": logprobs + normal(0.1),
    }
    return Call(NAME, tensors, dict(PPO_OPTIONS), {"loss": torch.ones(())})


def cost(case: Case) -> Cost:
    """Five floats and a mask byte in, two gradients out."""
    n, wide = case.shape.numel, DTYPES[case.dtype].itemsize
    return Cost(n * (5 * wide + 1 + (8 if case.direction == BOTH else 0)), 60 * n)


OP = Op(NAME, 3, CASES, inputs, cost, GOALS)
