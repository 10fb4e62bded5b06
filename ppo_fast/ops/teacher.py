"""A teacher's head beside a student's: its rows of logits, their divergences and the gradient.

Both heads run in chunks of the same rows. A chunk of each goes through `logprobs_fwd`, the pair
through `divergence_fwd`; the student's gradient is written over its logits, once for all terms.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ppo_fast import _checks
from ppo_fast._boundary import calls_divergence
from ppo_fast._boundary.options import Scoring, Softmax, Teaching
from ppo_fast._boundary.schema import backends_of
from ppo_fast.ops.head import Head, HeadOperands, HeadOptions
from ppo_fast.ops.head_inputs import HeadInputs, over_scale, plain_head
from ppo_fast.ops.logprobs import check_temperature
from ppo_fast.ops.shards import Shard, softmax_of
from ppo_fast.ops.z_loss import with_lse
from ppo_fast.reference.linear_divergence import TeacherRows
from ppo_fast.teacher import KINDS, Teacher, check_kind


class TeacherInputs(NamedTuple):
    """Validated arguments of a teacher; constants all."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    temperature: float | Tensor  # without a cap, over `logit_scale`
    options: HeadOptions
    kind: int
    beta: float
    coef: float | Tensor

    @property
    def number(self) -> float:
        """The temperature where all have one, else 1."""
        return self.options.temperature

    @property
    def per_token(self) -> Tensor | None:
        """The temperature of every token, where they differ."""
        return self.temperature if isinstance(self.temperature, Tensor) else None

    def for_reference(self) -> TeacherRows:
        """The reference's own."""
        o = self.options
        return TeacherRows(
            self.hidden,
            self.weight[: o.size],
            None if self.bias is None else self.bias[: o.size],
            o.softcap,
            o.logit_scale,
            self.temperature,
            KINDS[self.kind],
            self.beta,
            self.coef,
        )


class Slopes(NamedTuple):
    """Gradients by a row's log-probability, entropy, divergence and log-sum-exp, (R,) each."""

    logprobs: Tensor
    entropy: Tensor
    divergence: Tensor | None = None
    lse: Tensor | None = None

    def rows(self, at: Any) -> Slopes:
        """Those of some of the rows."""
        g, h, c, k = self
        return Slopes(g[at], h[at], c if c is None else c[at], k if k is None else k[at])


class Compared(NamedTuple):
    """A block of teacher's logits (R, V), the state of their softmax, and the rows' divergences.

    `kl` is the student's own, from the teacher or from the mixture.
    """

    logits: Tensor
    row_max: Tensor
    log_sum: Tensor
    divergence: Tensor
    kl: Tensor

    def rows(self, at: Tensor) -> Compared:
        """Some of the rows."""
        return Compared(*(x[at] for x in self))


class TeacherHead:
    """A teacher's rows in the blocks of a student's head."""

    def __init__(self, given: TeacherInputs, student: Head) -> None:
        rows = student.rows
        self.given, self.student = given, student
        # Any token will do: its log-probability is not used.
        rows = rows._replace(
            tokens=torch.zeros_like(rows.tokens), temperature=rows.pick_some(given.per_token)
        )
        operands = HeadOperands(given.hidden, given.weight, given.bias)
        self.head = Head(operands, rows, given.options)
        self.head.block = student.block

    def logits(self, at: Any) -> Tensor:
        """The logits of a block's rows, in a workspace of the teacher's own."""
        return self.head.logits(self.head.inputs(at))

    def compared(self, z: Tensor, at: Any, softmax: Softmax) -> Compared:
        """The divergences of a block of the student's logits z, whose softmax is given."""
        y, o = self.logits(at), self.student.options
        own = softmax_of(o.backend, y, self.head.scoring(at), o.shard)
        t = self._teaching(y, own.row_max, own.log_sum, at)
        return compare(o.backend, z, self.student.scoring(at), softmax, t, o.shard)

    def backward(
        self,
        z: Tensor,
        x: tuple[Tensor, ...],
        at: Any,
        softmax: Softmax,
        slopes: Slopes,
        other: Compared,
    ) -> None:
        """Accumulate the gradients of all that has a slope over a block; overwrites z."""
        head, o = self.student, self.student.options
        t = self._teaching(other.logits, other.row_max, other.log_sum, at)
        softmax, h = with_lse(softmax, slopes.entropy, slopes.lse)
        c = torch.zeros_like(h) if slopes.divergence is None else slopes.divergence
        g, s = labelled(slopes.logprobs, softmax, head.scoring(at), o.shard)
        args = (o.backend, z, s, softmax, t, other.kl, (g, h, c))
        narrow = o.softcap is None and head.weight.dtype == torch.bfloat16
        if narrow and o.backend in backends_of("divergence_bwd_bf16_"):
            calls_divergence.divergence_bwd_bf16_(*args)
            head.accumulate(z.view(torch.bfloat16)[:, : z.shape[1]], x, at)
            return
        bend = head.bend(z)
        calls_divergence.divergence_bwd_(*args)
        if bend is not None:
            z *= bend
        head.accumulate(z, x, at)

    def _teaching(self, y: Tensor, row_max: Tensor, log_sum: Tensor, at: Any) -> Teaching:
        s = self.head.scoring(at)
        kind, beta = self.given.kind, self.given.beta
        return Teaching(y, row_max, log_sum, s.temperature_tensor, s.temperature, kind, beta)


def compare(
    backend: str, z: Tensor, s: Scoring, softmax: Softmax, t: Teaching, shard: Shard | None
) -> Compared:
    """Divergences of rows of logits from their teacher's; z and its logits may be shares."""
    divergence, kl = calls_divergence.divergence_fwd(backend, z, s, softmax, t)
    if shard is not None:
        divergence, kl = shard.summed(divergence, kl)
    # Below 0 by rounding alone.
    return Compared(t.logits, t.row_max, t.log_sum, divergence.clamp(min=0), kl)


def labelled(
    g: Tensor, softmax: Softmax, s: Scoring, shard: Shard | None
) -> tuple[Tensor, Scoring]:
    """The slopes by log-probability, and the tokens as columns here, -1 where there is none."""
    if shard is None:
        return g, s
    # A label of probability 0 passes no gradient, on whatever rank it is.
    g = torch.where(softmax.logprobs.isneginf(), torch.zeros_like(g), g)
    here = torch.where(shard.holds(s.tokens), s.tokens - shard.first, -1)
    return g, s._replace(tokens=here)


def backward(
    head: Head,
    teacher: TeacherHead | None,
    z: Tensor,
    x: tuple[Tensor, ...],
    at: Any,
    softmax: Softmax,
    slopes: Slopes,
    other: Compared | None,
) -> None:
    """Accumulate the gradients of a head's block, with or without a teacher; overwrites z."""
    if teacher is not None and other is not None:
        teacher.backward(z, x, at, softmax, slopes, other)
        return
    softmax, h = with_lse(softmax, slopes.entropy, slopes.lse)
    head.backward(z, x, at, softmax, slopes.logprobs, h)


def check_teacher(
    op: str, teacher: Any, given: HeadInputs, group: dist.ProcessGroup | None
) -> TeacherInputs:
    """The arguments of a teacher beside a student's, or ValueError or TypeError."""
    if not isinstance(teacher, Teacher):
        raise TypeError(f"{op}: teacher must be a ppo_fast.Teacher, got {type(teacher).__name__}")
    hidden, weight, bias, *_ = plain_head(
        op, teacher.hidden.detach(), teacher.weight, teacher.bias, None, group, "teacher."
    )
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    _check_beside(op, hidden, weight, given)
    kind, beta = check_kind(op, teacher.kind, teacher.beta)
    number, per_token = _temperature(op, teacher, given)
    scale = _checks.positive(op, "teacher.logit_scale", teacher.logit_scale, hidden)
    cap = teacher.softcap
    if cap is not None:
        cap = _checks.positive(op, "teacher.softcap", cap, hidden)
    number, per_token, scale = over_scale(op, number, per_token, cap, scale, hidden)
    coef, coef_tensor = _checks.coefficient(
        op, "teacher.coef", teacher.coef, given.hidden.device, 0.0
    )
    return TeacherInputs(
        hidden,
        weight,
        bias,
        number if per_token is None else per_token,
        given.options._replace(temperature=number, softcap=cap, logit_scale=scale),
        KINDS.index(kind),
        beta,
        coef if coef_tensor is None else coef_tensor,
    )


def _check_beside(op: str, hidden: Tensor, weight: Tensor, given: HeadInputs) -> None:
    shape, rows, size = given.hidden.shape[:-1], given.weight.shape[0], given.options.size
    if hidden.shape[:-1] != shape:
        raise ValueError(
            f"{op}: teacher.hidden must have the student's rows, {tuple(shape)} before its H, got"
            f" {tuple(hidden.shape)}"
        )
    # Padding is each one's own where it is known, but on ranks it moves what follows.
    padded = given.options.shard is None and size < rows
    if weight.shape[0] < size or (weight.shape[0] != rows and not padded):
        raise ValueError(
            f"{op}: teacher.weight must have the student's {rows} rows, an equal vocabulary, got"
            f" {weight.shape[0]}"
        )
    if hidden.device != given.hidden.device:
        raise ValueError(
            f"{op}: teacher.hidden must be on {given.hidden.device}, got {hidden.device}"
        )
    if (hidden.dtype == torch.float64) != (given.hidden.dtype == torch.float64):
        raise TypeError(
            f"{op}: teacher.hidden must not mix float64 with other types, got {hidden.dtype}"
            f" beside {given.hidden.dtype}"
        )


def _temperature(op: str, teacher: Teacher, given: HeadInputs) -> tuple[float, Tensor | None]:
    if teacher.temperature is not None:
        return check_temperature(
            op, teacher.temperature, teacher.hidden, name="teacher.temperature"
        )
    t = given.temperature
    return (1.0, t) if isinstance(t, Tensor) else (t, None)
