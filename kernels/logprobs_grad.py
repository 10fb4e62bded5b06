"""The gradient of logprobs.py with respect to the logits.

`terms_kernel` reduces each row to six numbers and the label's column, and reads the label's logit
before anything is overwritten in place. `dlogits_kernel` reads and writes each row once, or only
writes rows without a gradient. With p = exp(z - max - log_sum), T the temperature, H the entropy
and g, h the gradients by log-probability and entropy,
dz_j = p_j (slope ln p_j + offset) + [j = label] g/T, where slope = -h/T and offset = -(g + h H)/T.
The label's is one of the six: rows are written without it first.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .common import LAUNCH, Strided, flag_bytes, load_f32, on_device, row_blocks, row_offset
from .softmax import (
    RUNTIME,
    Gradient,
    alignment,
    bf16_rows,
    grad_columns,
    label_rows,
    own_grad,
    row_start,
    row_terms,
    zero_columns,
)

ZERO_ROW = tl.constexpr(-1)  # in place of the label's column
N_TERMS = 6  # max, log_sum, 1/T, offset, slope, dz of the label


@triton.jit(do_not_specialize=[*RUNTIME, "V"])
def terms_kernel(
    logits_ptr,  # (rows, V)
    logits_outer: tl.int64,
    logits_inner: tl.int64,
    tokens_ptr,  # (rows,), as the next four
    tokens_outer: tl.int64,
    tokens_inner: tl.int64,
    mask_ptr,
    mask_outer: tl.int64,
    mask_inner: tl.int64,
    temperature_ptr,
    temperature_outer: tl.int64,
    temperature_inner: tl.int64,
    grad_logprobs_ptr,
    grad_logprobs_outer: tl.int64,
    grad_logprobs_inner: tl.int64,
    grad_entropy_ptr,
    grad_entropy_outer: tl.int64,
    grad_entropy_inner: tl.int64,
    entropy_ptr,  # (rows,) fp32 contiguous, as the next two
    row_max_ptr,
    log_sum_ptr,
    terms_ptr,  # (N_TERMS, rows) fp32
    labels_ptr,  # (rows,) int32
    inner,
    V,
    n_rows,
    inv_temperature,
    ignore_index: tl.int64,
    ROWS: tl.constexpr,
):
    logits = Strided(logits_ptr, logits_outer, logits_inner)
    tokens = Strided(tokens_ptr, tokens_outer, tokens_inner)
    mask = Strided(mask_ptr, mask_outer, mask_inner)
    temperature = Strided(temperature_ptr, temperature_outer, temperature_inner)
    grad_logprobs = Strided(grad_logprobs_ptr, grad_logprobs_outer, grad_logprobs_inner)
    grad_entropies = Strided(grad_entropy_ptr, grad_entropy_outer, grad_entropy_inner)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n_rows
    live, legal, label, label_logit, inv_temp = label_rows(
        rows, inside, inner, V, logits, tokens, mask, temperature, inv_temperature, ignore_index
    )
    offset = row_offset(grad_logprobs, rows, inner)
    grad_logprob = load_f32(grad_logprobs_ptr, offset, live, 0.0)
    offset = row_offset(grad_entropies, rows, inner)
    grad_entropy = load_f32(grad_entropy_ptr, offset, live, 0.0)
    entropy = tl.load(entropy_ptr + rows, mask=live, other=0.0)
    row_max = tl.load(row_max_ptr + rows, mask=live, other=0.0)
    log_sum = tl.load(log_sum_ptr + rows, mask=live, other=0.0)

    zero, offset, slope, at_label = row_terms(
        grad_logprob, grad_entropy, label_logit, inv_temp, row_max, log_sum, entropy, legal
    )
    terms = terms_ptr + rows
    stride = n_rows.to(tl.int64)
    tl.store(terms, row_max, mask=inside)
    tl.store(terms + stride, log_sum, mask=inside)
    tl.store(terms + 2 * stride, inv_temp, mask=inside)
    tl.store(terms + 3 * stride, offset, mask=inside)
    tl.store(terms + 4 * stride, slope, mask=inside)
    tl.store(terms + 5 * stride, at_label, mask=inside)
    column = tl.where(legal, label, 0).to(tl.int32)
    tl.store(labels_ptr + rows, tl.where(zero, ZERO_ROW, column), mask=inside)


@triton.jit(do_not_specialize=RUNTIME)
def dlogits_kernel(
    logits_ptr,  # (rows, V)
    logits_outer: tl.int64,
    logits_inner: tl.int64,
    out_ptr,  # (rows, V): in place, the logits' memory
    out_outer: tl.int64,
    out_inner: tl.int64,
    terms_ptr,  # (N_TERMS, rows) fp32
    labels_ptr,  # (rows,) int32
    inner,
    V,
    n_rows: tl.int64,
    n_segments,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    SEGMENT: tl.constexpr,  # columns of one of several segments, a multiple of LANES * UNROLL
    STAGES: tl.constexpr,
    ALIGN: tl.constexpr,  # every row starts at a multiple of this many elements
):
    part = tl.program_id(0)
    row = part // n_segments
    row_ptr = row_start(Strided(logits_ptr, logits_outer, logits_inner), row, inner, ALIGN)
    to_ptr = row_start(Strided(out_ptr, out_outer, out_inner), row, inner, ALIGN)
    start = (part - row * n_segments) * SEGMENT
    end = tl.where(n_segments == 1, V, tl.minimum(start + SEGMENT, V))
    label = tl.load(labels_ptr + row)
    if label == ZERO_ROW:
        zero_columns(to_ptr, start, end, V, LANES * UNROLL)
    else:
        term = terms_ptr + row
        row_max = tl.load(term)
        log_sum = tl.load(term + n_rows)
        inv_temp = tl.load(term + 2 * n_rows)
        offset = tl.load(term + 3 * n_rows)
        slope = tl.load(term + 4 * n_rows)
        at_label = tl.load(term + 5 * n_rows)
        gradient = Gradient(label, row_max, log_sum, inv_temp, offset, slope, at_label)
        grad_columns(
            row_ptr,
            None,
            to_ptr,
            start,
            end,
            V,
            gradient,
            own_grad,
            None,
            LANES,
            UNROLL,
            STAGES,
            "",
        )


def _write(out: Tensor, *args: Any) -> None:
    """The launches. Fill `out`: (part of) the logits, or like them; `args` are the schema's."""
    grad_logprobs, grad_entropy, logits, tokens, mask, temperature_tensor, *rest = args
    *saved, temperature, ignore_index = rest
    vocab = logits.shape[-1]
    tiling = config.gradient_tiling(vocab)
    # A row whose gradient overlaps other columns is one program's: see softmax.grad_step.
    segments = triton.cdiv(vocab, tiling.segment) if out.dtype == logits.dtype else 1
    mask = flag_bytes(mask)
    inputs = (logits, tokens, mask, temperature_tensor, grad_logprobs, grad_entropy, out)
    with on_device(logits):
        for block in row_blocks(tokens.shape, *inputs):
            n_rows = block.outer * block.inner
            if n_rows == 0 or vocab == 0:
                break
            terms = logits.new_empty(N_TERMS, n_rows, dtype=torch.float32)
            labels = logits.new_empty(n_rows, dtype=torch.int32)
            terms_kernel[(triton.cdiv(n_rows, config.ROW_SCALARS.block),)](
                *(*block.args[:-3], *(x.view(-1)[block.start :] for x in saved), terms, labels),
                *(block.inner, vocab, n_rows, 1.0 / temperature, ignore_index),
                ROWS=config.ROW_SCALARS.block,
                num_warps=config.ROW_SCALARS.warps,
                **LAUNCH,
            )
            source, target = block.args[:3], block.args[-3:]
            dlogits_kernel[(n_rows * segments,)](
                *(*source, *target, terms, labels, block.inner, vocab, n_rows, segments),
                ALIGN=min(alignment(*source), alignment(*target)),
                **tiling.constants(),
                **LAUNCH,
            )


def logprobs_bwd(*args: Any) -> Tensor:
    """The op of ppo_fast/_boundary/schema.py: dlogits, contiguous, in the dtype of the logits."""
    logits = args[2]
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _write(out, *args)
    return out


def logprobs_bwd_(*args: Any) -> None:
    """The same, written over the logits."""
    _write(args[2], *args)


def logprobs_bwd_bf16_(*args: Any) -> None:
    """The same over fp32 logits, in bf16: each row of dlogits starts where the row does."""
    _write(bf16_rows(args[2]), *args)
