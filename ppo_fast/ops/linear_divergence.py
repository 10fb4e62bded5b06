"""`linear_token_divergence` and `linear_divergence`: two heads compared without their logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ppo_fast import _checks, reference
from ppo_fast._boundary.options import Softmax
from ppo_fast._results import DivergenceLoss, Stats, TokenDivergence
from ppo_fast.ops.backward import n_grads, once_differentiable, saveable, scaled
from ppo_fast.ops.forward_mode import derivatives
from ppo_fast.ops.head import Head, HeadOperands, HeadRows, live_rows
from ppo_fast.ops.head_inputs import HeadForm, HeadInputs, all_kept, check_head
from ppo_fast.ops.loss_options import Coefficient
from ppo_fast.ops.reduction import Reduction, check_loss_reduction
from ppo_fast.ops.sparse_head import score_kept
from ppo_fast.ops.teacher import (
    Compared,
    Slopes,
    TeacherHead,
    TeacherInputs,
    backward,
    check_teacher,
)
from ppo_fast.teacher import Teacher


class _Numbers(NamedTuple):
    """Numbers of the computed rows, (R,) each: `Softmax`, then `Compared` without its logits."""

    logprobs: Tensor
    entropy: Tensor
    row_max: Tensor
    log_sum: Tensor
    teacher_max: Tensor
    teacher_log_sum: Tensor
    divergence: Tensor
    kl: Tensor

    def softmax(self, at: Any) -> Softmax:
        """The student's softmax of some rows."""
        return Softmax(*(x[at] for x in self[:4]))

    def results(self, rows: HeadRows) -> tuple[Tensor, ...]:
        """Log-probability, entropy, divergence and ln Σe^z of all tokens, (N,) each."""
        lse = self.row_max + self.log_sum
        return tuple(rows.spread(x) for x in (self.logprobs, self.entropy, self.divergence, lse))


def _all_rows(head: Head, teacher: TeacherHead | None) -> _Numbers:
    """The numbers of every row that is computed; without a teacher the last four are 0."""
    count = head.rows.tokens.shape[0]
    out = _Numbers(*torch.zeros(8, count, dtype=head.wide, device=head.hidden.device))
    for at in head.chunks(count):
        z = head.logits(head.inputs(at))
        softmax = head.softmax(z, at)
        other = () if teacher is None else teacher.compared(z, at, softmax)[1:]
        for to, x in zip(out, (*softmax, *other), strict=teacher is not None):
            to[at] = x
    return out


def _accumulate(head: Head, teacher: TeacherHead | None, part: _Numbers, slopes: Slopes) -> None:
    """Form the logits of the blocks with a gradient anew, and accumulate it."""
    live = live_rows(*slopes)
    count = part.logprobs.shape[0] if live is None else live.shape[0]
    for at in head.blocks(count):
        rows = at if live is None else live[at]
        x, softmax, s = head.inputs(rows), part.softmax(rows), slopes.rows(rows)
        z, other = head.logits(x), None
        if teacher is not None:
            other = Compared(teacher.logits(rows), *(number[rows] for number in part[4:]))
        backward(head, teacher, z, x, rows, softmax, s, other)


class _HeadTerms(torch.autograd.Function):
    """Saves eight numbers per row; the backward runs both heads' GEMMs once more."""

    @staticmethod
    def forward(ctx: Any, given: HeadInputs, teacher: TeacherInputs | None, *operands: Any) -> Any:
        with given.exact():
            head = Head(HeadOperands(*operands), given.rows, given.options)
            part = _all_rows(head, teacher and TeacherHead(teacher, head))
        rows = given.rows
        constants: tuple[Tensor | None, ...] = (
            rows.places,
            rows.tokens,
            rows.keep,
            rows.temperature,
        )
        if teacher is not None:
            constants += (teacher.hidden, teacher.weight, teacher.bias, teacher.per_token)
        ctx.save_for_backward(*part, *saveable(*operands, *constants))
        ctx.given, ctx.teacher = given, teacher
        ctx.set_materialize_grads(False)
        return part.results(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if all(grad is None for grad in grads):
            return (None,) * 7
        # Read here, so that constants which were changed in place raise.
        saved = ctx.saved_tensors
        part, operands = _Numbers(*saved[:8]), HeadOperands(*saved[8:13])
        given: HeadInputs = ctx.given
        rows = given.rows
        zero = torch.zeros_like(part.logprobs)
        g, h, c, k = (None if x is None else rows.pick(x) for x in grads)
        g, h, c = (zero if x is None else x for x in (g, h, c))
        slopes = Slopes(g, h, c, k)
        with given.exact():
            head = Head(operands, rows, given.options)
            head.allocate(*ctx.needs_input_grad[2:])
            teacher: TeacherInputs | None = ctx.teacher
            _accumulate(head, teacher and TeacherHead(teacher, head), part, slopes)
        return None, None, *head.gradients()


def score_terms(given: HeadInputs, teacher: TeacherInputs | None) -> tuple[Tensor, ...]:
    """(N,) log-probabilities, entropies, divergences and ln Σe^z, differentiable as the head is.

    Without a teacher the divergences are 0.
    """
    if given.support is None:
        return _score_whole(given, teacher)
    logprobs, entropy, lse, divergence = score_kept(given, given.support, teacher)
    found = (logprobs, entropy, divergence, lse)
    if given.support.n_whole == 0:
        return found
    others = _score_whole(given.whole(), teacher)
    return tuple(x + y for x, y in zip(found, others, strict=True))


def _score_whole(given: HeadInputs, teacher: TeacherInputs | None) -> tuple[Tensor, ...]:
    """The same over the whole vocabulary."""
    if n_grads(*given.operands):
        out: tuple[Tensor, ...] = _HeadTerms.apply(given, teacher, *given.operands)
        return out
    with given.exact():
        head = Head(given.operands, given.rows, given.options)
        part = _all_rows(head, teacher and TeacherHead(teacher, head))
    return part.results(given.rows)


def _one_pass(head: Head, teacher: TeacherHead, slopes: Tensor) -> Tensor:
    """(divergence, entropy) of the rows, whose gradients are accumulated with these slopes."""
    count = slopes.shape[0]
    out = torch.empty(2, count, dtype=head.wide, device=slopes.device)
    for at in head.blocks(count):
        x = head.inputs(at)
        z = head.logits(x)
        softmax = head.softmax(z, at)
        found = teacher.compared(z, at, softmax)
        out[0, at], out[1, at] = found.divergence, softmax.entropy
        zero = torch.zeros_like(softmax.entropy)
        teacher.backward(z, x, at, softmax, Slopes(zero, zero, slopes[at]), found)
    return out


class _LinearDivergence(torch.autograd.Function):
    """The gradients are formed in the forward; the backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any, given: HeadInputs, teacher: TeacherInputs, by: Reduction, *operands: Any
    ) -> Any:
        rows = given.rows
        with given.exact():
            head = Head(HeadOperands(*operands), rows, given.options)
            head.allocate(*ctx.needs_input_grad[3:])
            kept, counted = _kept(given)
            slopes = rows.pick(teacher.coef * by.weights(kept, counted, head.wide)).to(head.wide)
            results = _one_pass(head, TeacherHead(teacher, head), slopes)
        ctx.save_for_backward(*head.gradients())
        ctx.backend = given.options.backend
        shape = given.tokens.shape
        tokens = TokenDivergence(*(rows.spread(x).view(shape) for x in results))
        loss, stats, *found = by.reduced(tokens, kept, counted, teacher.coef)
        ctx.mark_non_differentiable(stats.values, *found)
        ctx.set_materialize_grads(False)
        return loss, stats.values, *found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
        if grad is None:
            return (None,) * 8
        grads = (None if x is None else scaled(ctx.backend, x, grad) for x in ctx.saved_tensors)
        return None, None, None, *grads


def _check(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    teacher: Teacher,
    mask: Tensor | None,
    form: HeadForm,
    *,
    row_index: Tensor | None,
    process_group: dist.ProcessGroup | None,
    backend: str | None,
) -> tuple[HeadInputs, TeacherInputs]:
    """Both heads' validated arguments; the student's tokens are any."""
    shape = _checks.floating(op, "hidden", hidden).shape[:-1]
    given = check_head(
        op,
        hidden,
        weight,
        torch.zeros(shape, dtype=torch.int64, device=hidden.device),
        form,
        mask=mask,
        ignore_index=-100,
        row_index=row_index,
        process_group=process_group,
        support=None,
        backend=backend,
        beside="a teacher",
    )
    return given, check_teacher(op, teacher, given, process_group)


@derivatives("hidden", "weight", "bias", "extra")
def linear_token_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher: Teacher,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    extra: tuple[Tensor, Tensor] | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    row_index: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> TokenDivergence:
    """Divergence of every token's distribution from a teacher's, without either's logits.

    For a trainer that weights and reduces the divergences itself. Both heads run in chunks of
    rows; the backward forms the logits of both again, six products in all, where
    `linear_divergence`, which gives the reduced loss, takes four.

    Args:
        hidden: `(..., H)` fp32, bf16 or fp16 (fp64 except on Triton), last dimension contiguous.
        weight: `(V, H)` of the same dtype, or with `process_group` this rank's share.
        teacher: a `ppo_fast.Teacher` of the same tokens and vocabulary, a constant; its `coef`
            must be 1 here. With `process_group` its weight is a share of the student's size.
        mask: `(...)` of any real dtype, non-zero keeps. A masked token's divergence, entropy and
            gradients are 0, whatever either's hidden state holds.
        bias, temperature, softcap, extra, logit_scale, vocab_size, row_index, process_group: as in
            `linear_token_logprobs`, of the student; the teacher has a scale of its own, and with
            `vocab_size` and no group padding of its own.

    Returns:
        `TokenDivergence(divergence, entropy)`, each `(...)` fp32 (fp64 for fp64 inputs), in nats,
        both differentiable by hidden, weight, bias and extra. Where one distribution has a
        probability of 0 beside one of the other that is not, KL is infinite and its gradient is
        NaN for "reverse".

    Raises:
        ValueError: shape, device or range. TypeError: dtype or wrong object.
        NotImplementedError: a forward-mode tangent of a constant, or on a named kernel backend.
    """
    op = "linear_token_divergence"
    given, other = _check(
        op,
        hidden,
        weight,
        teacher,
        mask,
        HeadForm(bias, temperature, softcap, extra, logit_scale, vocab_size),
        row_index=row_index,
        process_group=process_group,
        backend=backend,
    )
    if isinstance(other.coef, Tensor) or other.coef != 1.0:
        raise ValueError(f"{op}: teacher.coef must be 1, got {teacher.coef}: weight the results")
    if given.options.backend == "reference":
        with given.exact():
            return reference.linear_token_divergence(**_for_reference(given, other))
    _, entropy, divergence, _ = score_terms(given, other)
    return TokenDivergence(*(x.view(given.tokens.shape) for x in (divergence, entropy)))


@derivatives("hidden", "weight", "bias", "extra")
def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher: Teacher,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    extra: tuple[Tensor, Tensor] | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    row_index: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
    reduction: str = "token-mean",
    denom: Coefficient | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> DivergenceLoss:
    """coef·Σ w·divergence / D of a head's distributions from a teacher's, in four products.

    The gradients by hidden, weight, bias and extra are formed in the forward pass, a block of rows
    at a time; the backward scales them. In fp16 they are formed in the backward, from logits of
    both heads formed again: a loss scale must reach them before they are rounded.

    Args:
        hidden, weight, teacher, mask, bias, temperature, softcap, extra, logit_scale, vocab_size,
        row_index, process_group: as in `linear_token_divergence`, hidden `(B, T, H)`, or flat
            `(N, H)`; the teacher has a `coef`. What `row_index` leaves out counts in the default D
            alone.
        reduction, denom, cu_seqlens: as in `ppo_loss`.

    Returns:
        `DivergenceLoss(loss, stats, divergence, entropy)`; the last two `(...)`, detached, 0 where
        not computed. Gradients under `retain_graph`: as `ppo_loss`'s.

    Raises:
        ValueError: shape, device or range. TypeError: dtype or wrong object.
        NotImplementedError: a forward-mode tangent of a constant, or on a named kernel backend.
    """
    op = "linear_divergence"
    given, other = _check(
        op,
        hidden,
        weight,
        teacher,
        mask,
        HeadForm(bias, temperature, softcap, extra, logit_scale, vocab_size),
        row_index=row_index,
        process_group=process_group,
        backend=backend,
    )
    main = _checks.main(op, "hidden[..., 0]", given.hidden.detach()[..., 0], cu_seqlens)
    by = check_loss_reduction(op, main, reduction, denom, cu_seqlens)
    if given.options.backend == "reference":
        own = _for_reference(given, other)
        with given.exact():
            return reference.linear_divergence(**own, **by.for_reference())
    return _loss(given, other, by)


def _loss(given: HeadInputs, teacher: TeacherInputs, by: Reduction) -> DivergenceLoss:
    args, shape = given.operands, given.tokens.shape
    if n_grads(*args) and given.weight.dtype != torch.float16:
        loss, stats, divergence, entropy = _LinearDivergence.apply(given, teacher, by, *args)
        return DivergenceLoss(loss, Stats(stats), divergence, entropy)
    _, entropy, divergence, _ = score_terms(given, teacher)
    tokens = TokenDivergence(divergence.view(shape), entropy.view(shape))
    return by.reduced(tokens, *_kept(given), teacher.coef)


def _kept(given: HeadInputs) -> tuple[Tensor, Tensor]:
    """The tokens of a loss, and those that count in its D, bool in the tokens' shape."""
    counted = all_kept(given.tokens) if given.keep is None else given.keep
    return given.named().view(given.tokens.shape), counted


def _for_reference(given: HeadInputs, teacher: TeacherInputs) -> dict[str, Any]:
    """Keyword arguments of the reference."""
    own = given.for_reference()
    del own["tokens"], own["support"]
    return own | {"teacher": teacher.for_reference()}
