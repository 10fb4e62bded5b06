"""`linear_ppo_loss`: a head's policy loss and all its gradients without its logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ppo_fast import _checks, reference
from ppo_fast._boundary import calls
from ppo_fast._boundary.options import Softmax, TokenTensors
from ppo_fast._boundary.schema import backends_of
from ppo_fast._results import HeadLoss, Moments, Stats
from ppo_fast.corrections import Correction
from ppo_fast.ops.backward import n_grads, once_differentiable, scaled
from ppo_fast.ops.forward_mode import derivatives
from ppo_fast.ops.head import Head, HeadOperands, HeadRows, live_rows
from ppo_fast.ops.head_inputs import HeadForm, HeadInputs, all_kept, check_head
from ppo_fast.ops.head_terms import HeadTerms, check_terms
from ppo_fast.ops.linear_divergence import score_terms
from ppo_fast.ops.linear_logprobs import score
from ppo_fast.ops.loss_options import Bounds, Coefficient, Variant, loss_options
from ppo_fast.ops.policy import PolicyInputs, check_policy, over
from ppo_fast.ops.policy_loss import corrected, of_rows, policy_loss
from ppo_fast.ops.ppo_loss import loss_and_stats
from ppo_fast.ops.teacher import TeacherHead, backward
from ppo_fast.support import Support
from ppo_fast.teacher import Teacher

_OP = "linear_ppo_loss"
# Type of the weights -> the kernel op that writes such gradients over wide logits.
_FUSED = {torch.float32: "logits_ppo_loss_", torch.bfloat16: "logits_ppo_loss_bf16_"}


class _Tokens(NamedTuple):
    """The tokens of a loss, and those that count in its D, which `row_index` does not change."""

    mask: Tensor
    counted: Tensor

    @classmethod
    def of(cls, given: HeadInputs) -> _Tokens:
        """Both of a call's arguments, bool in the tokens' shape."""
        counted = all_kept(given.tokens) if given.keep is None else given.keep
        rows = reference.linear_logprobs.rows_of(given.tokens, counted, given.row_index)
        return cls(rows, counted)

    def prepared(self, given: HeadInputs, policy: PolicyInputs) -> tuple[PolicyInputs, Tensor]:
        """The loss with its D, where the mask alone would give another, and its own mask, with
        all of its correction that does not wait for the log-probabilities."""
        # Ranks that share sequences make the same exchanges, with and without a `row_index`.
        if given.row_index is not None or policy.context_group is not None:
            policy = policy.counting(self.counted)
        policy, mask = corrected(policy, given.options.backend, self.mask)
        return policy, self.mask if mask is None else mask


class _Loss:
    """One call: the loss over the computed rows, and the slopes of its tokens."""

    def __init__(
        self, head: Head, given: HeadInputs, policy: PolicyInputs, others: HeadTerms
    ) -> None:
        self.head, self.given, self.others = head, given, others
        self.teacher = others.teacher and TeacherHead(others.teacher, head)
        tokens = _Tokens.of(given)
        self.counted = tokens.counted
        self.policy, self.mask = tokens.prepared(given, policy)
        known = None if self.policy.late_denom else tokens.counted
        weights = self.policy.weights(self.mask, known)
        self.weights = given.rows.pick(weights) if weights.dim() else weights
        self.keep = given.rows.pick(self.mask)
        self.slopes = self.policy.options.per_token()
        self.tokens = _picked(self.policy.per_token, given.rows)
        self.denom: Tensor | None = None

    def total(self, *numbers: Tensor) -> tuple[Tensor, ...]:
        """(loss, stats, logprobs, entropy) over all tokens, from the rows' numbers: these two,
        their divergences and ln Σe^z."""
        shape, rows = self.given.tokens.shape, self.given.rows
        logprobs, entropy, *others = (rows.spread(x).view(shape) for x in numbers)
        backend = self.given.options.backend
        policy, mask = corrected(self.policy, backend, self.mask, logprobs)
        if self.policy.late_denom:
            self.denom = policy.denom(self.mask)
        loss, stats, *_ = policy_loss(policy, backend, logprobs, mask, entropy, 0)
        if others:
            mask = self.mask if mask is None else mask
            loss = self.others.added(loss, stats, policy, mask, self.counted, *others)
        return loss, stats, logprobs, entropy

    def _weights(self, at: slice) -> Tensor:
        """w / D of a block's rows, or of all."""
        return self.weights[at] if self.weights.dim() else self.weights

    def _fuses(self) -> bool:
        """True where one kernel takes logits to gradients; on a CPU fewer rows are multiplied."""
        options, policy = self.given.options, self.policy
        alone = options.softcap is None and options.shard is None
        op = _FUSED.get(self.head.weight.dtype)
        has = op is not None and options.backend in backends_of(op)
        alone = alone and not self.others.any
        return has and alone and policy.one_pass and options.backend != "cpu"

    def fused(self, z: Tensor, x: tuple[Tensor, ...], at: slice) -> tuple[Tensor, ...]:
        """A block's (logprobs, entropy) and gradients: the logits' by one kernel, over z."""
        dtype = self.head.weight.dtype
        narrow = dtype == torch.bfloat16
        kernel = calls.logits_ppo_loss_bf16_ if narrow else calls.logits_ppo_loss_
        scores = kernel(
            self.given.options.backend,
            z,
            self.head.scoring(at),
            _chunk(self.tokens, at),
            self._weights(at),
            self.slopes,
        )
        self.head.accumulate(z.view(dtype)[:, : z.shape[1]], x, at)
        return scores

    def composed(self, z: Tensor, x: tuple[Tensor, ...], at: slice) -> tuple[Tensor, ...]:
        """The same by the kernels of softmax, divergence, loss and gradient; then a block's
        divergences and ln Σe^z."""
        head, softmax = self.head, self.head.softmax(z, at)
        other = None if self.teacher is None else self.teacher.compared(z, at, softmax)
        policy = self.policy._replace(
            per_token=_chunk(self.tokens, at), options=self.slopes, cu_seqlens=None
        )
        policy, keep = of_rows(
            policy, self.given.options.backend, softmax.logprobs, self.keep[at], softmax.entropy
        )
        *_, grads = calls.ppo_loss(
            self.given.options.backend,
            softmax.logprobs,
            policy.per_token,
            policy.options,
            2,
            mask=keep,
            entropy=softmax.entropy,
            cu_seqlens=None,
            sequence_weights=None,  # in self.weights
        )
        g, h = grads * self._weights(at)
        slopes = self.others.slopes(g, h, softmax, keep, self._weights(at))
        live = live_rows(*slopes)
        if live is None:
            backward(head, self.teacher, z, x, at, softmax, slopes, other)
        elif live.numel():
            chosen = Softmax(*(number[live] for number in softmax))
            pair = other and other.rows(live)
            some = tuple(part[live] for part in x)
            args = (z[live], some, live + at.start, chosen, slopes.rows(live), pair)
            backward(head, self.teacher, *args)
        if not self.others.any:
            return softmax.logprobs, softmax.entropy
        lse = softmax.row_max + softmax.log_sum
        divergence = torch.zeros_like(lse) if other is None else other.divergence
        return softmax.logprobs, softmax.entropy, divergence, lse

    def one_pass(self) -> Tensor:
        """Three products: logits, and both gradients while the block's softmax is at hand."""
        head, count = self.head, self.given.rows.tokens.shape[0]
        step = self.fused if self._fuses() else self.composed
        size = 4 if self.others.any else 2
        out = torch.empty(size, count, dtype=head.wide, device=head.hidden.device)
        for at in head.blocks(count):
            x = head.inputs(at)
            for to, number in zip(out, step(head.logits(x), x, at), strict=True):
                to[at] = number
        self.teacher = None  # its logits go before dW is there twice
        return out


def two_passes(
    given: HeadInputs, policy: PolicyInputs, others: HeadTerms, grads: int
) -> tuple[Tensor, ...]:
    """(loss, stats, logprobs, entropy) by both ops in turn: a backward forms the logits again.

    For losses whose slopes need other tokens first (gspo), and for fp16, whose gradients must not
    be rounded before they are multiplied by the incoming one, a loss scale mostly. For a support,
    whose sparse head keeps the logits of its pairs: those take three products too.
    Without gradients (`grads` 0) there is one pass.
    """
    tokens, backend = _Tokens.of(given), given.options.backend
    numbers = score_terms(given, others.teacher) if others.any else score(given)
    logprobs, entropy, *rest = (x.view(given.tokens.shape) for x in numbers)
    policy, mask = tokens.prepared(given, policy)
    loss, stats = loss_and_stats(logprobs, entropy, mask, policy, grads, backend)
    if others.any:
        known = logprobs.detach()
        policy, left = corrected(policy, backend, mask, known)
        mask = mask if left is None else left
        loss = others.added(loss, stats, policy, mask, tokens.counted, *rest)
    return loss, stats, logprobs.detach(), entropy.detach()


def _at(x: Tensor | None, at: slice) -> Tensor | None:
    return None if x is None else x[at]


def _picked(x: TokenTensors, rows: HeadRows) -> TokenTensors:
    """The constants of the computed rows, (R,) each."""
    return TokenTensors(
        old_logprobs=rows.pick_some(x.old_logprobs),
        advantages=rows.pick(x.advantages),
        is_weights=rows.pick_some(x.is_weights),
        ref_logprobs=rows.pick_some(x.ref_logprobs),
        moments=x.moments,
        rollout_logprobs=rows.pick_some(x.rollout_logprobs),
        accepted=rows.pick_some(x.accepted),
    )


def _chunk(x: TokenTensors, at: slice) -> TokenTensors:
    """The constants of a block's rows."""
    return TokenTensors(
        old_logprobs=_at(x.old_logprobs, at),
        advantages=x.advantages[at],
        is_weights=_at(x.is_weights, at),
        ref_logprobs=_at(x.ref_logprobs, at),
        moments=x.moments,
        rollout_logprobs=_at(x.rollout_logprobs, at),
        accepted=_at(x.accepted, at),
    )


class _LinearPPOLoss(torch.autograd.Function):
    """The gradients are formed in the forward; the backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any, given: HeadInputs, policy: PolicyInputs, others: HeadTerms, *operands: Any
    ) -> Any:
        with given.exact():
            head = Head(HeadOperands(*operands), given.rows, given.options)
            head.allocate(*ctx.needs_input_grad[3:])
            call = _Loss(head, given, policy, others)
            loss, stats, logprobs, entropy = call.total(*call.one_pass())
        ctx.save_for_backward(*head.gradients(), call.denom)
        ctx.backend = given.options.backend
        ctx.mark_non_differentiable(stats, logprobs, entropy)
        ctx.set_materialize_grads(False)
        return loss, stats, logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
        if grad is None:
            return (None,) * 8
        # The factor stays wide: rounded to the gradients' type, all of them would be off alike.
        *grads, denom = ctx.saved_tensors
        if denom is not None:
            grad = over(grad, denom)
        out = (None if x is None else scaled(ctx.backend, x, grad) for x in grads)
        return None, None, None, *out


@derivatives("hidden", "weight", "bias", "extra")
def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    extra: tuple[Tensor, Tensor] | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    row_index: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
    variant: Variant = "clip",
    ratio_level: str = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    ratio_cap: float | None = None,
    log_ratio_clamp: Bounds = 20.0,
    is_weights: Tensor | None = None,
    sequence_weights: Tensor | None = None,
    advantage_moments: Moments | None = None,
    entropy_coef: Coefficient = 0.0,
    ref_logprobs: Tensor | None = None,
    kl_coef: Coefficient = 0.0,
    kl_estimator: str = "k3",
    kl_clamp: float | None = 10.0,
    kl_ratio_clip: float | None = None,
    kl_weight: str | None = None,
    reduction: str = "token-mean",
    denom: Coefficient | None = None,
    cu_seqlens: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    correction: Correction | None = None,
    context_group: dist.ProcessGroup | None = None,
    support: Support | None = None,
    teacher: Teacher | None = None,
    z_loss_coef: Coefficient = 0.0,
    backend: str | None = None,
) -> HeadLoss:
    """`ppo_loss` of the head's own log-probabilities and entropies, in three matrix products.

    The gradients by hidden, weight, bias and extra are formed in the forward pass, a block of
    rows at a time; the backward scales them. Rows without a gradient (masked, clipped,
    advantage 0 with no other term) take no part in the gradients' products on a CPU. A GPU
    multiplies every row, for the host would have to wait for their number: there `row_index`,
    made with the batch on the host, leaves out what is masked or has no advantage. Where
    slopes need other tokens first ("gspo", a ratio of the sequence, a surrogate that couples,
    some corrections by the current log-probabilities: docs/corrections.md), and in fp16, the
    logits are formed twice and the gradients in the backward: in fp16 a loss scale
    (`torch.amp.GradScaler`) must reach them before they are rounded.

    Args:
        hidden, weight, bias, tokens, temperature, softcap, extra, logit_scale, vocab_size,
        ignore_index, row_index, process_group, support: as in `linear_token_logprobs`; tokens
            `(B, T)`, or flat `(N,)`.
        old_logprobs, advantages, mask and the options of the loss: as in `ppo_loss`. Ignored
            tokens are masked. What `row_index` leaves out counts in the default D alone.
        teacher: a `ppo_fast.Teacher`, as in `linear_divergence`: coef·divergence is added to every
            token's term, in a fourth product; over the support where given. Not on "cuda".
        z_loss_coef: ≥ 0, a number or 0-d tensor: z_loss_coef·(ln Σe^z)² of the logits over their
            temperature, over the support where given, is added (PaLM, Chowdhery et al. 2022).
            `is_weights` and corrections do not touch these two terms, `sequence_weights` do; a
            token that a correction rejects from "all" terms has neither.

    Returns:
        `HeadLoss(loss, stats, logprobs, entropy)`; the last two `(...)` fp32 (fp64 for fp64
        inputs), detached, 0 where not computed. Gradients under `retain_graph`: as `ppo_loss`'s.

    Raises:
        ValueError: shape, device or range. TypeError: dtype. IndexError: see `token_logprobs`.
        NotImplementedError: a forward-mode tangent of a constant, or on a named kernel backend.
    """
    given = check_head(
        _OP,
        hidden,
        weight,
        tokens,
        HeadForm(bias, temperature, softcap, extra, logit_scale, vocab_size),
        mask=mask,
        ignore_index=ignore_index,
        row_index=row_index,
        process_group=process_group,
        support=support,
        backend=backend,
        beside=None if teacher is None else "a teacher",
    )
    others = check_terms(_OP, teacher, z_loss_coef, given, process_group)
    policy = check_policy(
        _OP,
        # A slice of the hidden states has the tokens' shape, and their device and precision class.
        _checks.main(_OP, "hidden[..., 0]", given.hidden.detach()[..., 0], cu_seqlens),
        old_logprobs,
        advantages,
        is_weights=is_weights,
        sequence_weights=sequence_weights,
        advantage_moments=advantage_moments,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
        correction=correction,
        cu_seqlens=cu_seqlens,
        context_group=context_group,
        options=loss_options(
            variant=variant,
            ratio_level=ratio_level,
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=dual_clip,
            ratio_cap=ratio_cap,
            log_ratio_clamp=log_ratio_clamp,
            entropy_coef=entropy_coef,
            kl_coef=kl_coef,
            kl_estimator=kl_estimator,
            kl_clamp=kl_clamp,
            kl_ratio_clip=kl_ratio_clip,
            kl_weight=kl_weight,
            reduction=reduction,
            denom=denom,
        ),
        has_entropy=True,
    )
    return _head_loss(given, policy, others)


def _head_loss(given: HeadInputs, policy: PolicyInputs, others: HeadTerms) -> HeadLoss:
    if given.options.backend == "reference":
        with given.exact():
            return reference.linear_ppo_loss(
                **given.for_reference(), **policy.for_reference(_OP), **others.for_reference()
            )
    args = given.operands
    grads = 2 if n_grads(*args) else 0
    one_pass = not policy.couples and given.support is None
    if grads and one_pass and given.weight.dtype != torch.float16:
        loss, stats, logprobs, entropy = _LinearPPOLoss.apply(given, policy, others, *args)
    else:
        loss, stats, logprobs, entropy = two_passes(given, policy, others, grads)
    return HeadLoss(loss, Stats(stats), logprobs, entropy)
