"""Softmax of every row's pairs, and its gradient: logprobs.py over kept ids.

A row's logits are contiguous and start anywhere, and how many there are the device alone knows.
A program of one warp takes a row: most are short, and many run at a time. The label is a row's
first pair. An absent pair's logit is -inf, which has no weight and no gradient.

Bits: as of logprobs.py, and the tiling is the same for every length, so that a row's result
depends on its logits alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .common import LAUNCH, Strided, flag_bytes, load_f32, on_device, unspecialised
from .softmax import (
    Gradient,
    grad_columns,
    inverse_temperature,
    own_grad,
    row_results,
    row_terms,
    scan_columns,
    zero_columns,
)

PER_ROW = ("mask", "temperature", "grad_logprobs", "grad_entropy")
SOFTMAX = ("logprobs", "entropy", "row_max", "log_sum")
RUNTIME = unspecialised(
    PER_ROW, ("stride",), ("logits", "offsets", *SOFTMAX), ("inv_temperature",)
)


@triton.jit
def pairs_of(offsets_ptr, row):
    """First pair of a row, int64, and the number of its pairs, int32."""
    start = tl.load(offsets_ptr + row)
    return start, (tl.load(offsets_ptr + row + 1) - start).to(tl.int32)


@triton.jit(**RUNTIME)
def support_kernel(
    logits_ptr,  # (pairs,)
    offsets_ptr,  # (rows + 1,) int64
    mask_ptr,  # (rows,) bytes
    mask_stride: tl.int64,
    temperature_ptr,  # (rows,)
    temperature_stride: tl.int64,
    logprobs_ptr,  # (rows,) fp32 contiguous, as the next three
    entropy_ptr,
    row_max_ptr,
    log_sum_ptr,
    inv_temperature,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0)
    if tl.load(mask_ptr + row.to(tl.int64) * mask_stride) != 0:
        start, count = pairs_of(offsets_ptr, row)
        row_ptr = logits_ptr + start
        temperature = Strided(temperature_ptr, temperature_stride, 0)
        inv_temp = inverse_temperature(temperature, row, 1, row >= 0, inv_temperature)
        row_max, row_sum, row_dot = scan_columns(
            row_ptr, 0, count, count, inv_temp, LANES, UNROLL, STAGES, ""
        )
        label_logit = tl.load(row_ptr).to(tl.float32)
        _valid, row_max, log_sum, logprob, entropy = row_results(
            row_max, row_sum, row_dot, label_logit, inv_temp, row >= 0
        )
        tl.store(logprobs_ptr + row, logprob)
        tl.store(entropy_ptr + row, entropy)
        tl.store(row_max_ptr + row, row_max)
        tl.store(log_sum_ptr + row, log_sum)
    else:
        tl.store(logprobs_ptr + row, 0.0)
        tl.store(entropy_ptr + row, 0.0)
        tl.store(row_max_ptr + row, 0.0)
        tl.store(log_sum_ptr + row, 0.0)


@triton.jit(**RUNTIME)
def support_grad_kernel(
    logits_ptr,  # (pairs,)
    offsets_ptr,  # (rows + 1,) int64
    mask_ptr,  # (rows,) bytes
    mask_stride: tl.int64,
    temperature_ptr,  # (rows,), as the next two
    temperature_stride: tl.int64,
    grad_logprobs_ptr,
    grad_logprobs_stride: tl.int64,
    grad_entropy_ptr,
    grad_entropy_stride: tl.int64,
    entropy_ptr,  # (rows,) fp32 contiguous, as the next two
    row_max_ptr,
    log_sum_ptr,
    out_ptr,  # (pairs,) fp32
    inv_temperature,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0)
    start, count = pairs_of(offsets_ptr, row)
    row_ptr = logits_ptr + start
    to_ptr = out_ptr + start
    at = row.to(tl.int64)
    live = tl.load(mask_ptr + at * mask_stride) != 0
    # Of a masked row nothing is loaded: its gradient by both is 0.
    grad_logprob = load_f32(grad_logprobs_ptr, at * grad_logprobs_stride, live, 0.0)
    grad_entropy = load_f32(grad_entropy_ptr, at * grad_entropy_stride, live, 0.0)
    temperature = Strided(temperature_ptr, temperature_stride, 0)
    inv_temp = inverse_temperature(temperature, row, 1, live, inv_temperature)
    label_logit = tl.load(row_ptr, mask=live, other=0.0).to(tl.float32)
    entropy = tl.load(entropy_ptr + row, mask=live, other=0.0)
    row_max = tl.load(row_max_ptr + row, mask=live, other=0.0)
    log_sum = tl.load(log_sum_ptr + row, mask=live, other=0.0)
    zero, offset, slope, at_label = row_terms(
        grad_logprob, grad_entropy, label_logit, inv_temp, row_max, log_sum, entropy, row >= 0
    )
    if zero:
        zero_columns(to_ptr, 0, count, count, LANES * UNROLL)
    else:
        gradient = Gradient(0, row_max, log_sum, inv_temp, offset, slope, at_label)
        grad_columns(
            row_ptr,
            None,
            to_ptr,
            0,
            count,
            count,
            gradient,
            own_grad,
            None,
            LANES,
            UNROLL,
            STAGES,
            "",
        )


def row_arguments(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Pointer and stride of each tensor (N,), flattened; None and 0 of an absent one."""
    return tuple(y for x in tensors for y in ((None, 0) if x is None else (x, x.stride(0))))


def constants(tiling: config.RowTiling) -> dict[str, int]:
    """Constants of a launch whose programs take whole rows."""
    return {k: v for k, v in tiling.constants().items() if k != "SEGMENT"}


def support_fwd(
    logits: Tensor,
    offsets: Tensor,
    mask: Tensor,
    temperature_tensor: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op of ppo_fast/_boundary/schema.py: four of fp32, (N,)."""
    outs = tuple(
        torch.empty(mask.shape, dtype=torch.float32, device=logits.device) for _ in range(4)
    )
    if mask.numel():
        with on_device(logits):
            support_kernel[(mask.numel(),)](
                *(logits, offsets, *row_arguments(flag_bytes(mask), temperature_tensor)),
                *(*outs, 1.0 / temperature),
                **constants(config.NARROW),
                **LAUNCH,
            )
    return outs


def support_bwd(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    offsets: Tensor,
    mask: Tensor,
    temperature_tensor: Tensor | None,
    entropy: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    temperature: float,
) -> Tensor:
    """The op of ppo_fast/_boundary/schema.py: dz of every pair, (M,) fp32."""
    out = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    per_row = (flag_bytes(mask), temperature_tensor, grad_logprobs, grad_entropy)
    if mask.numel():
        with on_device(logits):
            support_grad_kernel[(mask.numel(),)](
                *(logits, offsets, *row_arguments(*per_row)),
                *(entropy, row_max, log_sum, out, 1.0 / temperature),
                **constants(config.NARROW_GRAD),
                **LAUNCH,
            )
    return out
