"""The gradient of logprobs.py with respect to the logits.

`terms_kernel` folds everything per row into six numbers and the label, reading the label's logit
before anything is overwritten in place; `dlogits_kernel` is one read and one write, or only the
write for rows without a gradient. With p = exp(z - m - log_sum), ln p its argument and T the
temperature, dz_j = p_j (a + b ln p_j) + [j = y] c, where b = -h/T, a = -(g + h H)/T and c = g/T.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .common import LAUNCH, flag_bytes, load_f32, on_device, row_blocks, row_offset
from .softmax import (
    RUNTIME,
    aligned,
    alignment,
    grad_columns,
    label_rows,
    zero_columns,
)  # fmt: skip

ZERO_ROW = tl.constexpr(-1)  # in place of the label
N_TERMS = 6  # m, log_sum, 1/T, a, b, c


@triton.jit
def row_terms(g, h, x, inv_t, m, entropy, legal):
    """Whether a row's gradient is 0, and a, b, c; g, h by log-probability and entropy."""
    # A label at -inf stays impossible: no gradient through its log-probability.
    g = tl.where(legal & (tl.fma(x, inv_t, -m) == float("-inf")), 0.0, g)
    zero = (g == 0.0) & (h == 0.0)
    a = -tl.fma(h, entropy, g) * inv_t
    return zero, tl.where(legal, a, float("nan")), -h * inv_t, g * inv_t


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
    temp_ptr,
    temp_outer: tl.int64,
    temp_inner: tl.int64,
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
    inv_temp,
    ignore_index: tl.int64,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n_rows
    live, legal, token, x, inv_t = label_rows(
        rows, inside, inner, V, logits_ptr, logits_outer, logits_inner,
        tokens_ptr, tokens_outer, tokens_inner, mask_ptr, mask_outer, mask_inner,
        temp_ptr, temp_outer, temp_inner, inv_temp, ignore_index,
    )  # fmt: skip
    offset = row_offset(rows, inner, grad_logprobs_outer, grad_logprobs_inner)
    g = load_f32(grad_logprobs_ptr, offset, live, 0.0)
    offset = row_offset(rows, inner, grad_entropy_outer, grad_entropy_inner)
    h = load_f32(grad_entropy_ptr, offset, live, 0.0)
    entropy = tl.load(entropy_ptr + rows, mask=live, other=0.0)
    m = tl.load(row_max_ptr + rows, mask=live, other=0.0)
    log_sum = tl.load(log_sum_ptr + rows, mask=live, other=0.0)

    zero, a, b, c = row_terms(g, h, x, inv_t, m, entropy, legal)
    terms = terms_ptr + rows
    step = n_rows.to(tl.int64)
    tl.store(terms, m, mask=inside)
    tl.store(terms + step, log_sum, mask=inside)
    tl.store(terms + 2 * step, inv_t, mask=inside)
    tl.store(terms + 3 * step, a, mask=inside)
    tl.store(terms + 4 * step, b, mask=inside)
    tl.store(terms + 5 * step, c, mask=inside)
    label = tl.where(legal, token, 0).to(tl.int32)
    tl.store(labels_ptr + rows, tl.where(zero, ZERO_ROW, label), mask=inside)


@triton.jit(do_not_specialize=RUNTIME)
def dlogits_kernel(
    logits_ptr,  # (rows, V)
    logits_outer: tl.int64,
    logits_inner: tl.int64,
    out_ptr,  # (rows, V): the logits themselves in place
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
    SEGMENT: tl.constexpr,  # columns a program takes, a multiple of LANES * UNROLL
    STAGES: tl.constexpr,
    ALIGN: tl.constexpr,  # every row starts at a multiple of this many elements
):
    part = tl.program_id(0)
    row = part // n_segments
    row_ptr = logits_ptr + aligned(row_offset(row, inner, logits_outer, logits_inner), ALIGN)
    to_ptr = out_ptr + aligned(row_offset(row, inner, out_outer, out_inner), ALIGN)
    start = (part - row * n_segments) * SEGMENT
    end = tl.minimum(start + SEGMENT, V)
    label = tl.load(labels_ptr + row)
    if label == ZERO_ROW:
        zero_columns(to_ptr, start, end, V, LANES * UNROLL)
    else:
        term = terms_ptr + row
        m = tl.load(term)
        log_sum = tl.load(term + n_rows)
        inv_t = tl.load(term + 2 * n_rows)
        a = tl.load(term + 3 * n_rows)
        b = tl.load(term + 4 * n_rows)
        c = tl.load(term + 5 * n_rows)
        grad_columns(
            row_ptr, to_ptr, start, end, V, label, m, log_sum, inv_t, a, b, c,
            LANES, UNROLL, STAGES, "",
        )  # fmt: skip


def _write(out: Tensor, *args: Any) -> None:
    """Fill `out`, of the logits' shape and dtype or they themselves; `args` are the schema's."""
    grad_logprobs, grad_entropy, logits, tokens, mask, temperature, *saved, codes, params = args
    vocab = logits.shape[-1]
    how = config.grad(vocab)
    segments = triton.cdiv(vocab, how.segment)
    inputs = (logits, tokens, flag_bytes(mask), temperature, grad_logprobs, grad_entropy, out)
    with on_device(logits):
        for block in row_blocks(tokens.shape, *inputs):
            n_rows = block.outer * block.inner
            if n_rows == 0 or vocab == 0:
                break
            terms = logits.new_empty(N_TERMS, n_rows, dtype=torch.float32)
            labels = logits.new_empty(n_rows, dtype=torch.int32)
            terms_kernel[(triton.cdiv(n_rows, config.ROW_SCALARS.block),)](
                *block.args[:-3], *(x.view(-1)[block.start :] for x in saved), terms, labels,
                block.inner, vocab, n_rows, 1.0 / params[0], codes[0],
                ROWS=config.ROW_SCALARS.block, num_warps=config.ROW_SCALARS.warps, **LAUNCH,
            )  # fmt: skip
            source, target = block.args[:3], block.args[-3:]
            dlogits_kernel[(n_rows * segments,)](
                *source, *target, terms, labels, block.inner, vocab, n_rows, segments,
                ALIGN=min(alignment(*source), alignment(*target)), LANES=how.lanes,
                UNROLL=how.unroll, SEGMENT=how.segment, STAGES=how.stages,
                num_warps=how.warps, **LAUNCH,
            )  # fmt: skip


def logprobs_bwd(*args: Any) -> Tensor:
    """See ppo_fast/_schema.py; dlogits, contiguous, in the dtype of the logits."""
    logits = args[2]
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _write(out, *args)
    return out


def logprobs_bwd_(*args: Any) -> None:
    """The same, written over the logits."""
    _write(args[2], *args)
