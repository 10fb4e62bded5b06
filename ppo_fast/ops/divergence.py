"""`divergence`: a loss of rows of logits from a teacher's rows of logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ppo_fast import _backend, _checks, reference
from ppo_fast._boundary import calls_divergence
from ppo_fast._boundary.options import Scoring, Softmax, Teaching
from ppo_fast._results import DivergenceLoss, TokenDivergence
from ppo_fast.ops.backward import n_grads, once_differentiable, saveable
from ppo_fast.ops.forward_mode import derivatives
from ppo_fast.ops.head import NOTHING_IGNORED
from ppo_fast.ops.logprobs import check_logits, check_temperature
from ppo_fast.ops.loss_options import Coefficient
from ppo_fast.ops.reduction import check_loss_reduction
from ppo_fast.ops.shards import softmax_of
from ppo_fast.ops.teacher import compare
from ppo_fast.reference.common import keep_of
from ppo_fast.teacher import KINDS, check_kind

_OP = "divergence"


class _Divergence(torch.autograd.Function):
    """Saves both logits and seven numbers per row; the backward reads the logits once more."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, s: Scoring, t: Teaching, backend: str) -> Any:
        softmax, t, divergence, kl = _rows(backend, logits, s, t)
        constants = (s.tokens, s.mask, s.temperature_tensor, t.temperature_tensor)
        saved = saveable(logits, t.logits, *constants)
        ctx.save_for_backward(*saved, *softmax, t.row_max, t.log_sum, kl)
        ctx.constants = s, t._replace(logits=t.row_max), backend
        ctx.set_materialize_grads(False)
        return divergence, softmax.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None) -> Any:
        if grad is None and grad_entropy is None:
            return (None,) * 4
        logits, y, tokens, mask, own, others, *numbers = ctx.saved_tensors
        softmax, (row_max, log_sum, kl) = Softmax(*numbers[:4]), numbers[4:]
        s, t, backend = ctx.constants
        s = s._replace(tokens=tokens, mask=mask, temperature_tensor=own)
        t = Teaching(y, row_max, log_sum, others, *t[4:])
        c = torch.zeros_like(kl) if grad is None else grad
        grads = (None, grad_entropy, c)
        return (
            calls_divergence.divergence_bwd(backend, logits, s, softmax, t, kl, grads),
            None,
            None,
            None,
        )


def _rows(
    backend: str, logits: Tensor, s: Scoring, t: Teaching
) -> tuple[Softmax, Teaching, Tensor, Tensor]:
    """The student's softmax, the teacher with its own, and (divergence, kl) of every row."""
    softmax = softmax_of(backend, logits, s, None)
    of_teacher = s._replace(temperature_tensor=t.temperature_tensor, temperature=t.temperature)
    other = softmax_of(backend, t.logits, of_teacher, None)
    t = t._replace(row_max=other.row_max, log_sum=other.log_sum)
    found = compare(backend, logits, s, softmax, t, None)
    return softmax, t, found.divergence, found.kl


@derivatives("logits")
def divergence(
    logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    kind: str,
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    reduction: str = "token-mean",
    denom: Coefficient | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> DivergenceLoss:
    """Σ w·divergence / D of softmax(logits / τ) from a teacher's, where both logits exist.

    `linear_divergence` does not need them to.

    Args:
        logits: `(B, T, V)`, or flat `(N, V)`; fp32, bf16 or fp16 (fp64 except on Triton), last
            dimension contiguous; differentiable.
        teacher_logits: the same shape and dtype, a constant.
        mask: `(B, T)` or `(N,)` of any real dtype, non-zero keeps. A masked row's results and
            gradient are 0, whatever it holds.
        kind, beta: as of `ppo_fast.Teacher`.
        temperature, teacher_temperature: τ > 0, a number or broadcastable to the mask's shape;
            the teacher's is the student's where None. There is no factor τ².
        reduction, denom, cu_seqlens: as in `ppo_loss`.

    Returns:
        `DivergenceLoss(loss, stats, divergence, entropy)`; the last two in the mask's shape, fp32
        (fp64 for fp64), in nats, detached. A logit of −inf has no probability.

    Raises:
        ValueError: shape, device or range. TypeError: dtype or wrong object.
        NotImplementedError: a forward-mode tangent of a constant, or on a named kernel backend.
    """
    check_logits(_OP, logits)
    check_logits(_OP, teacher_logits, "teacher_logits")
    if teacher_logits.shape != logits.shape:
        raise ValueError(
            f"{_OP}: teacher_logits must have the logits' shape {tuple(logits.shape)}, got"
            f" {tuple(teacher_logits.shape)}"
        )
    if teacher_logits.dtype != logits.dtype or teacher_logits.device != logits.device:
        raise TypeError(
            f"{_OP}: teacher_logits must be {logits.dtype} on {logits.device} as logits is, got"
            f" {teacher_logits.dtype} on {teacher_logits.device}"
        )
    main = _checks.main(_OP, "logits[..., 0]", logits.detach()[..., 0], cu_seqlens)
    mask = _checks.flags(_OP, "mask", mask, main.shape, main.device)
    kind, beta = check_kind(_OP, kind, beta)
    number, tensor = check_temperature(_OP, temperature, logits)
    own = (number, tensor)
    if teacher_temperature is not None:
        own = check_temperature(_OP, teacher_temperature, logits, "teacher_temperature")
    by = check_loss_reduction(_OP, main, reduction, denom, cu_seqlens)
    name = _backend.select_beside(_OP, backend, logits, "a teacher")
    teacher_logits = teacher_logits.detach()
    if name == "reference":
        return reference.divergence(
            logits,
            teacher_logits,
            mask,
            kind=kind,
            beta=beta,
            temperature=number if tensor is None else tensor,
            teacher_temperature=own[0] if own[1] is None else own[1],
            **by.for_reference(),
        )
    tokens = torch.zeros(main.shape, dtype=torch.int64, device=main.device)
    s = Scoring(tokens, mask, tensor, number, NOTHING_IGNORED)
    t = Teaching(teacher_logits, main, main, own[1], own[0], KINDS.index(kind), beta)
    if n_grads(logits):
        found = TokenDivergence(*_Divergence.apply(logits, s, t, name))
    else:
        softmax, _, values, _ = _rows(name, logits, s, t)
        found = TokenDivergence(values, softmax.entropy)
    keep = keep_of(main, mask)
    return by.reduced(found, keep, keep, 1.0)
