# ruff: noqa: E501  (one bad input a line)
"""Bad input of the ops with a teacher: one row each, as in test_errors.py."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import usable
from error_rows import SHAPE, TYPE, Row, assert_refused, both, cast, cut, moved

import ppo_fast
from ppo_fast import Teacher, testing

LOGITS, TOKENS, LOSS = testing.DIVERGENCES
ONES = torch.ones(2, 3)


def teacher(**options: object) -> dict[str, object]:
    return {"teacher": {"kind": "reverse", **options}}


ROWS = [
    # both heads
    *(row for op in (TOKENS, LOSS) for row in (
        Row(op, "hidden", [1.0], TYPE, "hidden must be a tensor, got list"),
        Row(op, "weight", torch.ones(37, 23), SHAPE, r"weight must have shape \(V, H\) = \(V, 24\), got \(37, 23\)"),
        Row(op, cut("mask"), None, SHAPE, r"mask must have shape .*got \(4, 8\)"),
        Row(op, "temperature", 0.0, SHAPE, "temperature must be positive and finite, got 0.0"),
        Row(op, "row_index", torch.tensor([0, 36]), SHAPE, r"row_index must be in \[0, 36\), got 0..36"),
        Row(op, "process_group", object(), SHAPE, "process_group must be None on 'reference', got <object"),
        Row(op, cut("teacher_hidden"), None, SHAPE, r"teacher.hidden must have the student's rows, \(4, 9\) before its H, got \(4, 8, 13\)"),
        Row(op, both(teacher_weight=torch.ones(36, 13), teacher_bias=None), None, SHAPE, "teacher.weight must have the student's 37 rows, an equal vocabulary, got 36"),
        Row(op, "teacher_weight", torch.ones(37, 12), SHAPE, r"teacher.weight must have shape \(V, H\) = \(V, 13\), got \(37, 12\)"),
        Row(op, cast("teacher_weight", torch.bfloat16), None, TYPE, "teacher.weight must be torch.float32 as teacher.hidden is, got torch.bfloat16"),
        Row(op, both(teacher_hidden=torch.ones(4, 9, 13).double(), teacher_weight=torch.ones(37, 13).double(), teacher_bias=None), None, TYPE, "teacher.hidden must not mix float64 with other types, got torch.float64 beside torch.float32"),
        Row(op, both(teacher_hidden=torch.ones(4, 9, 13, device="meta"), teacher_weight=torch.ones(37, 13, device="meta"), teacher_bias=None), None, SHAPE, "teacher.hidden must be on cpu, got meta"),
        Row(op, moved("teacher_weight"), None, SHAPE, "teacher.weight must be on cpu, got meta"),
        Row(op, "teacher_hidden", torch.ones(4, 13, 9).mT, SHAPE, "teacher.hidden must have a contiguous last dim"),
        Row(op, "teacher_bias", torch.ones(36), SHAPE, r"teacher.bias must have shape \(V,\) = \(37,\), got \(36,\)"),
        Row(op, both(**teacher(temperature=-1.0)), None, SHAPE, "teacher.temperature must be in .*, got -1.0"),
        Row(op, both(**teacher(temperature=torch.ones(5))), None, SHAPE, r"teacher.temperature must broadcast to \(B, T\) = \(4, 9\), got \(5,\)"),
        Row(op, both(**teacher(softcap=0.0)), None, SHAPE, "teacher.softcap must be positive and finite, got 0.0"),
        Row(op, both(**teacher(logit_scale=0.0)), None, SHAPE, "teacher.logit_scale must be positive and finite, got 0.0"),
        Row(op, both(**teacher(logit_scale="2")), None, TYPE, "teacher.logit_scale must be a number, got str"),
        Row(op, both(**teacher(coef=-0.5)), None, SHAPE, "teacher.coef must be in .*, got -0.5"),
        Row(op, both(**teacher(coef=torch.ones(2))), None, SHAPE, r"teacher.coef must be a number or a 0-d tensor, got \(2,\)"),
    )),
    Row(TOKENS, both(**teacher(coef=0.5)), None, SHAPE, "teacher.coef must be 1, got 0.5: weight the results"),
    Row(TOKENS, both(**teacher(coef=torch.tensor(1.0))), None, SHAPE, "teacher.coef must be 1, got 1.0: weight the results"),
    Row(LOSS, "reduction", "mean", SHAPE, "reduction must be one of token-mean.*got 'mean'"),
    Row(LOSS, "denom", 0.0, SHAPE, "denom must be positive and finite, got 0.0"),
    Row(LOSS, "cu_seqlens", torch.tensor([0, 36]), SHAPE, r"hidden\[..., 0\] must have shape \(N,\) with cu_seqlens, got \(4, 9\)"),
    Row(LOSS, "reduction", "seq-mean-token-sum-norm", SHAPE, "denom must be given with reduction .*when packed", True),
    # logits
    Row(LOGITS, "logits", torch.zeros(4, 37, 9).mT, SHAPE, r"logits must have a contiguous last dim.*\(333, 1, 9\)"),
    Row(LOGITS, "teacher_logits", torch.zeros(4, 37, 9).mT, SHAPE, "teacher_logits must have a contiguous last dim"),
    Row(LOGITS, "teacher_logits", torch.zeros(4, 9, 36), SHAPE, r"teacher_logits must have the logits' shape \(4, 9, 37\), got \(4, 9, 36\)"),
    Row(LOGITS, cast("teacher_logits", torch.bfloat16), None, TYPE, "teacher_logits must be torch.float32 on cpu as logits is, got torch.bfloat16 on cpu"),
    Row(LOGITS, moved("teacher_logits"), None, TYPE, "teacher_logits must be torch.float32 on cpu as logits is, got torch.float32 on meta"),
    Row(LOGITS, cut("mask"), None, SHAPE, r"mask must have shape .*got \(4, 8\)"),
    Row(LOGITS, "kind", "kl", SHAPE, "kind must be one of reverse, forward, jsd, mixed, got 'kl'"),
    Row(LOGITS, both(kind="jsd", beta=1.0), None, SHAPE, r"beta must be in \(0, 1\) with kind 'jsd', got 1.0"),
    Row(LOGITS, "beta", True, TYPE, "beta must be a number, got bool"),
    Row(LOGITS, "teacher_temperature", 0.0, SHAPE, "teacher_temperature must be positive and finite, got 0.0"),
    Row(LOGITS, "reduction", "mean", SHAPE, "reduction must be one of token-mean.*got 'mean'"),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.op}: {row.text[:50]}")
def test_bad_input(row: Row) -> None:
    assert_refused(row)


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"kind": "kl"}, SHAPE, "Teacher: kind must be one of .*got 'kl'"),
        ({"kind": "jsd", "beta": 0}, SHAPE, r"Teacher: beta must be in \(0, 1\) with kind 'jsd', got 0"),
        ({"kind": "mixed", "beta": 1.5}, SHAPE, r"Teacher: beta must be in \[0, 1\], got 1.5"),
        ({"kind": "mixed", "beta": math.nan}, SHAPE, r"Teacher: beta must be in \[0, 1\], got nan"),
        ({"kind": "mixed", "beta": "half"}, TYPE, "Teacher: beta must be a number, got str"),
    ],
    ids=str,
)  # fmt: skip
def test_a_teacher_is_refused(
    options: dict[str, object], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        Teacher(ONES, ONES, **options)  # type: ignore[arg-type]


def test_a_teacher_has_a_kind() -> None:
    with pytest.raises(TypeError, match="kind"):
        Teacher(ONES, ONES)  # type: ignore[call-arg]
    text = repr(Teacher(ONES, ONES, kind="jsd", beta=0.25))
    assert text == "Teacher(hidden (2, 3), weight (2, 3), kind='jsd', beta=0.25, coef=1.0)"


@pytest.mark.parametrize("op", testing.DIVERGENCES)
def test_cuda_is_refused_by_name(op: str) -> None:
    usable("cuda")
    with pytest.raises(ValueError, match=rf"{op}: backend must be one of reference, cpu, triton"):
        testing.run(testing.DIVERGENCES[op]((2, 3)), "cuda")


def test_something_else_is_no_teacher() -> None:
    x = torch.ones(2, 3, 4)
    with pytest.raises(TypeError, match=r"teacher must be a ppo_fast\.Teacher, got tuple"):
        ppo_fast.linear_divergence(x, torch.ones(5, 4), (x, x))  # type: ignore[arg-type]
