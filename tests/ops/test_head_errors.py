# ruff: noqa: E501  (one bad input a line)
"""Bad input of the head's ops: one row each, as in test_errors.py."""

from __future__ import annotations

import pytest
import torch
from error_rows import ONES, SHAPE, TYPE, Change, Row, assert_refused, both, cast, cut, moved

from ppo_fast import _checks, testing

LINEAR, AT, LOGITS_LOSS, LINEAR_LOSS = testing.HEADS
SCORED = (LINEAR, LOGITS_LOSS, LINEAR_LOSS)  # by a token of each row


def rows(*index: int) -> Change:
    return lambda args: {"row_index": torch.tensor(index)}


ROWS = [
    # the linear head
    *(row for op in (LINEAR, AT, LINEAR_LOSS) for row in (
        Row(op, "hidden", [1.0], TYPE, "hidden must be a tensor, got list"),
        Row(op, cast("hidden", torch.int64), None, TYPE, "hidden must be float32, .*got torch.int64"),
        Row(op, "hidden", torch.tensor(1.0), SHAPE, r"hidden must have shape \(..., H\), got \(\)"),
        Row(op, "hidden", torch.zeros(4, 24, 9).mT, SHAPE, r"hidden must have a contiguous last dim.*got strides \(216, 1, 9\)"),
        Row(op, "weight", None, TYPE, "weight must be a tensor, got NoneType"),
        Row(op, "weight", torch.ones(37, 23), SHAPE, r"weight must have shape \(V, H\) = \(V, 24\), got \(37, 23\)"),
        Row(op, "weight", torch.ones(24), SHAPE, r"weight must have shape .*got \(24,\)"),
        Row(op, "weight", torch.ones(0, 24), SHAPE, r"weight must have at least one row, got \(0, 24\)"),
        Row(op, cast("weight", torch.bfloat16), None, TYPE, "weight must be torch.float32 as hidden is, got torch.bfloat16"),
        Row(op, cast("hidden", torch.float64), None, TYPE, "weight must be torch.float64 as hidden is, got torch.float32"),
        Row(op, cast("weight", torch.int32), None, TYPE, "weight must be float32, .*got torch.int32"),
        Row(op, moved("weight"), None, SHAPE, "weight must be on cpu, got meta"),
        Row(op, "bias", torch.ones(36), SHAPE, r"bias must have shape \(V,\) = \(37,\), got \(36,\)"),
        Row(op, cast("bias", torch.float64), None, TYPE, "bias must not mix float64.*beside torch.float32"),
        Row(op, moved("bias"), None, SHAPE, "bias must be on cpu, got meta"),
        Row(op, "bias", True, TYPE, "bias must be a tensor, got bool"),
        Row(op, "softcap", 0.0, SHAPE, "softcap must be positive and finite, got 0.0"),
        Row(op, "softcap", -1.0, SHAPE, "softcap must be in .*got -1.0"),
        Row(op, "softcap", float("inf"), SHAPE, "softcap must be positive and finite, got inf"),
        Row(op, "softcap", "30", TYPE, "softcap must be a number, got str"),
        Row(op, "logit_scale", 0.0, SHAPE, "logit_scale must be positive and finite, got 0.0"),
        Row(op, "logit_scale", -1.0, SHAPE, "logit_scale must be in .*got -1.0"),
        Row(op, "logit_scale", float("nan"), SHAPE, "logit_scale must be in .*got nan"),
        Row(op, "logit_scale", torch.ones(()), TYPE, "logit_scale must be a number, got Tensor"),
        Row(op, both(logit_scale=1e-30, temperature=1e30), None, SHAPE, "temperature / logit_scale must be positive and finite in float32, got 1e\\+60"),
        Row(op, "vocab_size", 38, SHAPE, r"vocab_size must be in \[1, 37\] with a weight of 37 rows, got 38"),
        Row(op, "vocab_size", 0, SHAPE, r"vocab_size must be in \[1, 37\] with a weight of 37 rows, got 0"),
        Row(op, "vocab_size", 37.0, TYPE, "vocab_size must be an int, got float"),
        Row(op, "vocab_size", True, TYPE, "vocab_size must be an int, got bool"),
        Row(op, rows(0, 5, 36), None, SHAPE, r"row_index must be in \[0, 36\), got 0..36"),
        Row(op, rows(-1, 5), None, SHAPE, r"row_index must be in \[0, 36\), got -1..5"),
        Row(op, rows(0, 7, 5), None, SHAPE, "row_index must ascend without repeats, got 7 before 5"),
        Row(op, rows(0, 7, 7), None, SHAPE, "row_index must ascend without repeats, got 7 before 7"),
        Row(op, "row_index", torch.zeros(2, 2, dtype=torch.int64), TYPE, r"row_index must be \(R,\) int64, got \(2, 2\) torch.int64"),
        Row(op, "row_index", torch.zeros(2, dtype=torch.int32), TYPE, r"row_index must be \(R,\) int64, got \(2,\) torch.int32"),
        Row(op, "row_index", torch.ones(36, dtype=torch.bool), TYPE, "row_index must be .*got .* torch.bool"),
        Row(op, "row_index", [0, 1], TYPE, "row_index must be a tensor, got list"),
        Row(op, "row_index", torch.zeros(2, dtype=torch.int64, device="meta"), SHAPE, "row_index must be on cpu, got meta"),
        Row(op, "process_group", object(), SHAPE, "process_group must be None on 'reference', got <object"),
    )),
    # what the heads share with token_logprobs
    *(row for op in SCORED for row in (
        Row(op, cut("tokens"), None, SHAPE, r"tokens must have shape \(B, T\) = \(4, 9\), got \(4, 8\)"),
        Row(op, cast("tokens", torch.int16), None, TYPE, "tokens must be int32 or int64, got torch.int16"),
        Row(op, moved("tokens"), None, SHAPE, "tokens must be on cpu, got meta"),
        Row(op, "ignore_index", 1 << 70, SHAPE, "ignore_index must fit in 64 bits, got 1180591620717411303424"),
        Row(op, "ignore_index", 1.5, TYPE, "ignore_index must be an int, got float"),
    )),
    *(row for op in testing.HEADS for row in (
        Row(op, cut("mask"), None, SHAPE, r"mask must have shape .*got \(4, 8\)"),
        Row(op, cast("mask", torch.complex64), None, TYPE, "mask must be real, got torch.complex64"),
        Row(op, "temperature", 0.0, SHAPE, "temperature must be positive and finite, got 0.0"),
        Row(op, "temperature", 1e-46, SHAPE, "temperature must be positive and finite in float32, got 1e-46"),
        Row(op, "temperature", 1e39, SHAPE, r"temperature must be positive and finite in float32, got 1e\+39"),
        Row(op, "temperature", torch.ones(5), SHAPE, r"temperature must broadcast to \(B, T\) = \(4, 9\), got \(5,\)"),
    )),
    # of several ids a row
    Row(AT, cut("ids"), None, SHAPE, r"ids must have shape \(\.\.\., K\) beside hidden \(4, 9, 24\), got \(4, 8, 5\)"),
    Row(AT, "ids", torch.zeros(4, 9, dtype=torch.int64), SHAPE, r"ids must have shape .*got \(4, 9\)"),
    Row(AT, cast("ids", torch.int16), None, TYPE, "ids must be int32 or int64, got torch.int16"),
    Row(AT, moved("ids"), None, SHAPE, "ids must be on cpu, got meta"),
    Row(AT, "ids", [[1]], TYPE, "ids must be a tensor, got list"),
    # and with ppo_loss
    *(row for op in (LOGITS_LOSS, LINEAR_LOSS) for row in (
        Row(op, cut("old_logprobs"), None, SHAPE, r"old_logprobs must have shape \(B, T\) = \(4, 9\), got \(4, 8\)"),
        Row(op, cast("old_logprobs", torch.float64), None, TYPE, "old_logprobs must not mix float64"),
        Row(op, "advantages", torch.ones(4), SHAPE, r"advantages must have shape .*got \(4,\)"),
        Row(op, moved("advantages"), None, SHAPE, "advantages must be on cpu, got meta"),
        Row(op, cut("ref_logprobs"), None, SHAPE, r"ref_logprobs must have shape .*got \(4, 8\)"),
        Row(op, "ref_logprobs", None, SHAPE, "ref_logprobs must be given with kl_coef, got None"),
        Row(op, "advantage_moments", ONES, TYPE, "advantage_moments must be Moments, got Tensor"),
        Row(op, "variant", "ppo", SHAPE, "variant must be one of clip, gspo, .*got 'ppo'"),
        Row(op, "reduction", "mean", SHAPE, "reduction must be one of token-mean.*got 'mean'"),
        Row(op, "clip_low", 1.5, SHAPE, r"clip_low must be in \[0, 1\], got 1.5"),
        Row(op, "dual_clip", 1.0, SHAPE, "dual_clip must be above 1, got 1.0"),
        Row(op, "entropy_coef", torch.ones(2), SHAPE, r"entropy_coef must be a number or a 0-d tensor, got \(2,\)"),
        Row(op, "denom", 0.0, SHAPE, "denom must be positive and finite, got 0.0"),
        Row(op, "cu_seqlens", torch.tensor([0, 36]), SHAPE, r"must have shape \(N,\) with cu_seqlens, got \(4, 9\)"),
        Row(op, both(cu_seqlens=None, variant="gspo"), None, SHAPE, "cu_seqlens must be given for flat inputs with variant 'gspo'", True),
        Row(op, "reduction", "seq-mean-token-sum-norm", SHAPE, "denom must be given with reduction .*when packed", True),
    )),
    Row(LOGITS_LOSS, "logits", torch.zeros(4, 37, 9).mT, SHAPE, r"contiguous last dim.*\(333, 1, 9\)"),
    Row(LOGITS_LOSS, "logits", torch.zeros(4, 9, 0), SHAPE, r"V >= 1, got \(4, 9, 0\)"),
    Row(LOGITS_LOSS, "inplace", True, SHAPE, "inplace must be False on 'reference', got True"),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.op}: {row.text[:50]}")
def test_bad_input(row: Row) -> None:
    assert_refused(row)


@pytest.mark.parametrize("op", SCORED)
def test_debug_finds_tokens_out_of_range_of_the_head(
    monkeypatch: pytest.MonkeyPatch, op: str
) -> None:
    monkeypatch.setattr(_checks, "DEBUG", True)
    call = testing.HEADS[op]((2, 3), mask="all")
    tokens, mask = call.tensors["tokens"].clone(), call.tensors["mask"].clone()
    tokens[1, 2] = 37
    with pytest.raises(
        IndexError, match=rf"{op}: tokens must be in \[0, 37\), got 37 at \(1, 2\)"
    ):
        testing.run(call.replace(tokens=tokens), "cpu")
    mask[1, 2] = False
    out = testing.run(call.replace(tokens=tokens, mask=mask), "cpu")
    assert bool(out["logprobs"].isfinite().all())


def test_debug_finds_ids_out_of_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """-1 is no id; a masked row may hold anything."""
    monkeypatch.setattr(_checks, "DEBUG", True)
    call = testing.linear_at_call((2, 3), mask="all")
    ids, mask = call.tensors["ids"].clone(), call.tensors["mask"].clone()
    assert bool((ids == -1).any())
    ids[1, 2, 4] = -2
    with pytest.raises(
        IndexError, match=r"linear_logprobs_at: ids must be in \[0, 37\), got -2 at \(1, 2, 4\)"
    ):
        testing.run(call.replace(ids=ids), "cpu")
    mask[1, 2] = False
    assert bool(testing.run(call.replace(ids=ids, mask=mask), "cpu")["logprobs"].isfinite().all())
