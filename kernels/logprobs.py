"""Token log-probabilities and entropies from logits.

`segments_kernel` reads each row once, a program per (row, segment) with the segments fixed by V.
It keeps softmax.py's state (max, sum, dot) per lane; nothing crosses lanes until the segment ends.
The last of a row's programs folds its segments in a fixed tree. The gradient is in
logprobs_grad.py.

Bits: arithmetic is elementwise or in pairs and contraction is written out, so a row's result
depends on its logits and V alone: not on the other rows, nor on strides and alignment, which only
choose the width of the loads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .common import (
    LAUNCH,
    Strided,
    flag_bytes,
    is_last_of,
    on_device,
    row_blocks,
    row_counters,
)
from .logprobs_grad import logprobs_bwd, logprobs_bwd_, logprobs_bwd_bf16_
from .softmax import (
    LOWEST,
    RUNTIME,
    SEGMENTS,
    alignment,
    label_rows,
    merged,
    row_results,
    row_start,
    scan_columns,
)

__all__ = ["logprobs_bwd", "logprobs_bwd_", "logprobs_bwd_bf16_", "logprobs_fwd"]


@triton.jit(do_not_specialize=RUNTIME)
def segments_kernel(
    logits_ptr,  # (rows, V)
    logits_outer: tl.int64,
    logits_inner: tl.int64,
    tokens_ptr,  # (rows,), as the next two
    tokens_outer: tl.int64,
    tokens_inner: tl.int64,
    mask_ptr,
    mask_outer: tl.int64,
    mask_inner: tl.int64,
    temperature_ptr,
    temperature_outer: tl.int64,
    temperature_inner: tl.int64,
    parts_ptr,  # (3, rows, segments) fp32: max, sum, dot; None, as the next, for one segment
    counters_ptr,  # (rows,) int32 zeros, and so again after the launch
    logprobs_ptr,  # (rows,) fp32 contiguous, as the next three
    entropy_ptr,
    row_max_ptr,
    log_sum_ptr,
    inner,
    V,
    n_parts: tl.int64,
    n_segments,
    inv_temperature,
    ignore_index: tl.int64,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,  # a power of two >= n_segments
    STAGES: tl.constexpr,
    ALIGN: tl.constexpr,  # every row starts at a multiple of this many elements
):
    logits = Strided(logits_ptr, logits_outer, logits_inner)
    tokens = Strided(tokens_ptr, tokens_outer, tokens_inner)
    mask = Strided(mask_ptr, mask_outer, mask_inner)
    temperature = Strided(temperature_ptr, temperature_outer, temperature_inner)
    part = tl.program_id(0)
    row = part // n_segments
    segment = part - row * n_segments
    live, legal, _label, label_logit, inv_temp = label_rows(
        row, row >= 0, inner, V, logits, tokens, mask, temperature, inv_temperature, ignore_index
    )
    if live:
        row_ptr = row_start(logits, row, inner, ALIGN)
        start = segment * SEGMENT
        end = tl.minimum(start + SEGMENT, V)
        row_max, row_sum, row_dot = scan_columns(
            row_ptr, start, end, V, inv_temp, LANES, UNROLL, STAGES, ""
        )
        completes = live
        if SEGMENTS > 1:
            tl.store(parts_ptr + part, row_max)
            tl.store(parts_ptr + n_parts + part, row_sum)
            tl.store(parts_ptr + 2 * n_parts + part, row_dot)
            completes = is_last_of(counters_ptr + row, n_segments)
        if completes:
            if SEGMENTS > 1:
                row_max, row_sum, row_dot = merged_parts(
                    parts_ptr + row.to(tl.int64) * n_segments,
                    n_parts,
                    n_segments,
                    inv_temp,
                    SEGMENTS,
                )
            _valid, row_max, log_sum, logprob, entropy = row_results(
                row_max, row_sum, row_dot, label_logit, inv_temp, legal
            )
            tl.store(logprobs_ptr + row, logprob)
            tl.store(entropy_ptr + row, entropy)
            tl.store(row_max_ptr + row, row_max)
            tl.store(log_sum_ptr + row, log_sum)
    elif segment == 0:
        tl.store(logprobs_ptr + row, 0.0)
        tl.store(entropy_ptr + row, 0.0)
        tl.store(row_max_ptr + row, 0.0)
        tl.store(log_sum_ptr + row, 0.0)


@triton.jit
def merged_parts(part_ptr, n_parts, n_segments, inv_temperature, SEGMENTS: tl.constexpr):
    """The state of a row whose first segment's is at part_ptr."""
    segment = tl.arange(0, SEGMENTS)
    here = segment < n_segments
    maxima = tl.load(part_ptr + segment, mask=here, other=LOWEST)
    sums = tl.load(part_ptr + n_parts + segment, mask=here, other=0.0)
    dots = tl.load(part_ptr + 2 * n_parts + segment, mask=here, other=0.0)
    return merged(maxima, sums, dots, inv_temperature, SEGMENTS)


def logprobs_fwd(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    temperature_tensor: Tensor | None,
    temperature: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op of ppo_fast/_boundary/schema.py: four of fp32, shaped as tokens."""
    outs = tuple(
        torch.empty(tokens.shape, dtype=torch.float32, device=logits.device) for _ in range(4)
    )
    vocab = logits.shape[-1]
    tiling = config.forward_tiling(vocab)
    segments = max(1, triton.cdiv(vocab, tiling.segment))
    padded = 1 if segments == 1 else max(SEGMENTS, triton.next_power_of_2(segments))
    with on_device(logits):
        for block in row_blocks(
            tokens.shape, logits, tokens, flag_bytes(mask), temperature_tensor
        ):
            n_rows = block.outer * block.inner
            if n_rows == 0:
                break
            parts = counters = None
            if segments > 1:
                parts = logits.new_empty(3, n_rows, segments, dtype=torch.float32)
                counters = row_counters(logits, n_rows)
            segments_kernel[(n_rows * segments,)](
                *(*block.args, parts, counters),
                *(x.view(-1)[block.start :] for x in outs),
                *(block.inner, vocab, n_rows * segments, segments),
                *(1.0 / temperature, ignore_index),
                ALIGN=alignment(*block.args[:3]),
                SEGMENTS=padded,
                **tiling.constants(),
                **LAUNCH,
            )
    return outs
