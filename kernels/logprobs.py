"""Token log-probabilities and entropies from logits.

`segments_kernel` reads each row once, a program per (row, segment) with the segments fixed by V.
It keeps softmax.py's state (max, sum, dot) per lane; nothing crosses lanes until the segment ends.
`merge_kernel` folds a row's segments in a fixed tree and reads the label's logit. The gradient is
in logprobs_grad.py.

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
    load_flag,
    on_device,
    row_blocks,
    row_offset,
)
from .logprobs_grad import logprobs_bwd, logprobs_bwd_, logprobs_bwd_bf16_
from .softmax import (
    LOWEST,
    RUNTIME,
    alignment,
    inverse_temperature,
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
    parts_ptr,  # (3, rows, segments) fp32: max, sum, dot; unwritten for rows that are not live
    inner,
    V,
    n_parts: tl.int64,
    n_segments,
    inv_temperature,
    ignore_index: tl.int64,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    SEGMENT: tl.constexpr,
    STAGES: tl.constexpr,
    ALIGN: tl.constexpr,  # every row starts at a multiple of this many elements
):
    logits = Strided(logits_ptr, logits_outer, logits_inner)
    tokens = Strided(tokens_ptr, tokens_outer, tokens_inner)
    mask = Strided(mask_ptr, mask_outer, mask_inner)
    temperature = Strided(temperature_ptr, temperature_outer, temperature_inner)
    part = tl.program_id(0)
    row = part // n_segments
    label = tl.load(tokens_ptr + row_offset(tokens, row, inner))
    live = label != ignore_index
    live = load_flag(mask_ptr, row_offset(mask, row, inner), live)
    if live:
        inv_temp = inverse_temperature(temperature, row, inner, live, inv_temperature)
        row_ptr = row_start(logits, row, inner, ALIGN)
        start = (part - row * n_segments) * SEGMENT
        end = tl.minimum(start + SEGMENT, V)
        part_max, part_sum, part_dot = scan_columns(
            row_ptr, start, end, V, inv_temp, LANES, UNROLL, STAGES, ""
        )
        tl.store(parts_ptr + part, part_max)
        tl.store(parts_ptr + n_parts + part, part_sum)
        tl.store(parts_ptr + 2 * n_parts + part, part_dot)


@triton.jit(do_not_specialize=[*RUNTIME, "V"])
def merge_kernel(
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
    parts_ptr,  # (3, rows, segments) fp32
    logprobs_ptr,  # (rows,) fp32 contiguous, as the next three
    entropy_ptr,
    row_max_ptr,
    log_sum_ptr,
    inner,
    V,
    n_rows,
    n_segments,
    inv_temperature,
    ignore_index: tl.int64,
    ROWS: tl.constexpr,
    SEGMENTS: tl.constexpr,  # a power of two >= n_segments
):
    logits = Strided(logits_ptr, logits_outer, logits_inner)
    tokens = Strided(tokens_ptr, tokens_outer, tokens_inner)
    mask = Strided(mask_ptr, mask_outer, mask_inner)
    temperature = Strided(temperature_ptr, temperature_outer, temperature_inner)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n_rows
    live, legal, _, label_logit, inv_temp = label_rows(
        rows, inside, inner, V, logits, tokens, mask, temperature, inv_temperature, ignore_index
    )
    segment = tl.arange(0, SEGMENTS)[None, :]
    part = parts_ptr + rows[:, None].to(tl.int64) * n_segments + segment
    n_parts = n_rows.to(tl.int64) * n_segments
    here = live[:, None] & (segment < n_segments)
    part_max = tl.load(part, mask=here, other=LOWEST)
    part_sum = tl.load(part + n_parts, mask=here, other=0.0)
    part_dot = tl.load(part + 2 * n_parts, mask=here, other=0.0)
    inv_temps = inv_temp + tl.zeros([ROWS], tl.float32)
    row_max, row_sum, row_dot = merged(part_max, part_sum, part_dot, inv_temps[:, None], SEGMENTS)
    _, row_max, log_sum, logprob, entropy = row_results(
        row_max, row_sum, row_dot, label_logit, inv_temp, legal
    )
    tl.store(logprobs_ptr + rows, tl.where(live, logprob, 0.0), mask=inside)
    tl.store(entropy_ptr + rows, tl.where(live, entropy, 0.0), mask=inside)
    tl.store(row_max_ptr + rows, tl.where(live, row_max, 0.0), mask=inside)
    tl.store(log_sum_ptr + rows, tl.where(live, log_sum, 0.0), mask=inside)


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
    scalars = (1.0 / temperature, ignore_index)
    merge = {
        "ROWS": config.ROW_SCALARS.block,
        "SEGMENTS": triton.next_power_of_2(segments),
        "num_warps": config.ROW_SCALARS.warps,
    }
    with on_device(logits):
        for block in row_blocks(
            tokens.shape, logits, tokens, flag_bytes(mask), temperature_tensor
        ):
            n_rows = block.outer * block.inner
            if n_rows == 0:
                break
            parts = logits.new_empty(3, n_rows, segments, dtype=torch.float32)
            segments_kernel[(n_rows * segments,)](
                *(*block.args, parts, block.inner, vocab, n_rows * segments, segments, *scalars),
                ALIGN=alignment(*block.args[:3]),
                **tiling.constants(),
                **LAUNCH,
            )
            merge_kernel[(triton.cdiv(n_rows, config.ROW_SCALARS.block),)](
                *(*block.args, parts, *(x.view(-1)[block.start :] for x in outs)),
                *(block.inner, vocab, n_rows, segments, *scalars),
                **merge,
                **LAUNCH,
            )
    return outs
