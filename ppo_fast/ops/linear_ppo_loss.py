"""`linear_ppo_loss`: a head's policy loss and all its gradients without its logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ppo_fast import _checks, reference
from ppo_fast._results import HeadLoss, Moments, Stats
from ppo_fast._schema import HANDLES
from ppo_fast.ops.backward import n_grads, once_differentiable, scaled
from ppo_fast.ops.forward_mode import derivatives
from ppo_fast.ops.head import NOTHING_IGNORED, Head, live_rows
from ppo_fast.ops.head_inputs import HeadInputs, check_head
from ppo_fast.ops.linear_logprobs import score
from ppo_fast.ops.options import Bounds, Coefficient, PPOOptions
from ppo_fast.ops.policy import Policy, check_policy
from ppo_fast.ops.ppo_loss import loss_and_stats
from ppo_fast.ops.shards import Softmax

_OP = "linear_ppo_loss"


class _Tokens(NamedTuple):
    """The tokens of a loss, and those that count in its D: also what `row_index` leaves out."""

    mask: Tensor
    counted: Tensor

    @classmethod
    def of(cls, given: HeadInputs) -> _Tokens:
        """Both of a call's arguments, bool in the tokens' shape."""
        counted = _all_true(given.tokens) if given.keep is None else given.keep
        rows = reference.linear_logprobs.rows_of(given.tokens, counted, given.row_index)
        return cls(rows, counted)

    def divided(self, given: HeadInputs, policy: Policy, n_grads: int) -> Policy:
        """The loss with its D, where the mask alone would give another."""
        denom = None if given.row_index is None else policy.denom(self.counted)
        return policy.replace(n_grads=n_grads, denom=denom)


class _Loss:
    """One call: the loss over the computed rows, and the slopes of its tokens."""

    def __init__(self, head: Head, given: HeadInputs, policy: Policy) -> None:
        self.head, self.given = head, given
        tokens = _Tokens.of(given)
        self.mask, self.policy = tokens.mask, tokens.divided(given, policy, 0)
        self.weights = given.rows.pick(policy.weights(*tokens))
        flat, rows = policy.per_token(), given.rows
        self.tokens = flat._replace(
            old_logprobs=rows.pick_some(flat.old_logprobs),
            advantages=rows.pick(flat.advantages),
            is_weights=rows.pick_some(flat.is_weights),
            ref_logprobs=rows.pick_some(flat.ref_logprobs),
        )  # fmt: skip

    def total(self, *scores: Tensor) -> tuple[Tensor, ...]:
        """(loss, stats, logprobs, entropy) over all tokens, from the rows' two."""
        shape, rows = self.given.tokens.shape, self.given.rows
        logprobs, entropy = (rows.spread(x).view(shape) for x in scores)
        loss, stats, *_ = self.policy.call(
            self.given.options.backend, logprobs, self.mask, entropy
        )
        return loss, stats, logprobs, entropy

    def chunk(self, at: slice) -> Policy:
        """The loss of a chunk's tokens."""
        t = self.tokens
        return t._replace(
            old_logprobs=_at(t.old_logprobs, at), advantages=t.advantages[at],
            is_weights=_at(t.is_weights, at), ref_logprobs=_at(t.ref_logprobs, at),
        )  # fmt: skip

    def _fuses(self) -> bool:
        options = self.given.options
        alone = options.softcap is None and options.shard is None
        known = self.head.weight.dtype in (torch.float32, torch.bfloat16)
        return options.backend == "cuda" and alone and known

    def fused(self, z: Tensor, x: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        """A chunk's (logprobs, entropy) and gradients: the logits' by one kernel, over z."""
        rows, p, options = self.given.rows, self.chunk(at), self.given.options
        dtype = self.head.weight.dtype
        name = "logits_ppo_loss_bf16_" if dtype == torch.bfloat16 else "logits_ppo_loss_"
        scores: tuple[Tensor, Tensor] = HANDLES[name][options.backend](
            z, rows.tokens[at], _at(rows.keep, at), _at(rows.heat, at), p.old_logprobs,
            p.advantages, p.is_weights, p.moments, p.ref_logprobs, self.weights[at],
            p.packed.entropy_coef, p.packed.kl_coef, [*NOTHING_IGNORED, *p.packed.codes[:3]],
            [options.temperature, *p.packed.params[:-1]],
        )  # fmt: skip
        self.head.accumulate(z.view(dtype)[:, : z.shape[1]], x, at)
        return scores

    def composed(self, z: Tensor, x: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        """The same by the kernels of softmax, loss and gradient."""
        head, part, keep = self.head, self.head.softmax(z, at), _at(self.given.rows.keep, at)
        *_, grads = self.chunk(at).call(
            self.given.options.backend, part.logprobs, keep, part.entropy
        )
        g, h = grads * self.weights[at]
        live = live_rows(g, h)
        if live is None:
            head.backward(z, x, at, part, g, h)
        elif live.numel():
            chosen = Softmax(*(number[live] for number in part))
            head.backward(z[live], x[live], live + at.start, chosen, g[live], h[live])
        return part.logprobs, part.entropy

    def one_pass(self) -> tuple[Tensor, Tensor]:
        """Three products: logits, and both gradients while the chunk's softmax is at hand."""
        head, count = self.head, self.given.rows.tokens.shape[0]
        step = self.fused if self._fuses() else self.composed
        logprobs, entropy = torch.empty(2, count, dtype=head.wide, device=head.hidden.device)
        for at in head.chunks(count):
            x = head.inputs(at)
            logprobs[at], entropy[at] = step(head.logits(x), x, at)
        return logprobs, entropy


def two_passes(given: HeadInputs, policy: Policy, grads: int) -> tuple[Tensor, ...]:
    """(loss, stats, logprobs, entropy) by both ops in turn: a backward forms the logits again.

    For gspo, where a token's slope needs its whole sequence first, and for fp16, whose gradients
    must not be rounded before they are multiplied by the incoming one, a loss scale mostly.
    Without gradients (`grads` 0) there is one pass.
    """
    tokens = _Tokens.of(given)
    logprobs, entropy = (x.view(given.tokens.shape) for x in score(given))
    loss, stats = loss_and_stats(
        logprobs, entropy, tokens.mask, tokens.divided(given, policy, grads), grads,
        given.options.backend,
    )  # fmt: skip
    return loss, stats, logprobs.detach(), entropy.detach()


def _all_true(tokens: Tensor) -> Tensor:
    return torch.ones(tokens.shape, dtype=torch.bool, device=tokens.device)


def _at(x: Tensor | None, at: slice) -> Tensor | None:
    return None if x is None else x[at]


class _LinearPPOLoss(torch.autograd.Function):
    """The gradients are formed in the forward; the backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        given: HeadInputs,
        policy: Policy,
    ) -> Any:
        with given.exact():
            head = Head(hidden, weight, bias, given.rows, given.options)
            head.want(*ctx.needs_input_grad[:3])
            call = _Loss(head, given, policy)
            loss, stats, logprobs, entropy = call.total(*call.one_pass())
        ctx.save_for_backward(*head.gradients())
        ctx.mark_non_differentiable(stats, logprobs, entropy)
        ctx.set_materialize_grads(False)
        return loss, stats, logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
        if grad is None:
            return None, None, None, None, None
        # The factor stays wide: rounded to the gradients' type, all of them would be off alike.
        dx, dw, db = (None if x is None else scaled(x, grad) for x in ctx.saved_tensors)
        return dx, dw, db, None, None


@derivatives("hidden", "weight", "bias")
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
    ignore_index: int = -100,
    row_index: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
    variant: str = "clip",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    log_ratio_clamp: Bounds = 20.0,
    is_weights: Tensor | None = None,
    advantage_moments: Moments | None = None,
    entropy_coef: Coefficient = 0.0,
    ref_logprobs: Tensor | None = None,
    kl_coef: Coefficient = 0.0,
    kl_estimator: str = "k3",
    kl_clamp: float | None = 10.0,
    kl_ratio_clip: float | None = None,
    reduction: str = "token-mean",
    denom: Coefficient | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> HeadLoss:
    """`ppo_loss` of the head's own log-probabilities and entropies, in three matrix products.

    The gradients by hidden, weight and bias are formed in the forward pass, a chunk of rows at a
    time; the backward scales them. Rows without a gradient (masked, clipped, advantage 0 with no
    other term) take no part in the gradients' products on a CPU. "gspo" and fp16 form the logits
    twice and the gradients in the backward: in fp16 a loss scale (`torch.amp.GradScaler`) must
    reach them before they are rounded.

    Args:
        hidden, weight, bias, tokens, temperature, softcap, ignore_index, row_index,
        process_group: as in `linear_token_logprobs`; tokens `(B, T)`, or flat `(N,)`.
        old_logprobs, advantages, mask and the options of the loss: as in `ppo_loss`. Ignored
            tokens are masked. What `row_index` leaves out counts in the default D alone.

    Returns:
        `HeadLoss(loss, stats, logprobs, entropy)`; the last two `(...)` fp32 (fp64 for fp64
        inputs), detached, 0 where not computed. Gradients under `retain_graph`: as `ppo_loss`'s.

    Raises:
        ValueError: shape, device or range. TypeError: dtype. IndexError: see `token_logprobs`.
        NotImplementedError: a forward-mode tangent of a constant, or on a named kernel backend.
    """
    given = check_head(
        _OP, hidden, weight, tokens, bias=bias, temperature=temperature, softcap=softcap,
        mask=mask, ignore_index=ignore_index, row_index=row_index, process_group=process_group,
        backend=backend,
    )  # fmt: skip
    args = (given.hidden, given.weight, given.bias)
    # A slice of the hidden states stands for a tensor of the tokens' shape.
    main = _checks.main(_OP, "hidden[..., 0]", given.hidden.detach()[..., 0], cu_seqlens)
    policy = check_policy(
        _OP, main, old_logprobs, advantages, is_weights=is_weights,
        advantage_moments=advantage_moments, ref_logprobs=ref_logprobs, cu_seqlens=cu_seqlens,
        options=PPOOptions(
            variant, clip_low, clip_high, dual_clip, log_ratio_clamp, entropy_coef, kl_coef,
            kl_estimator, kl_clamp, kl_ratio_clip, reduction, denom,
        ),
        has_entropy=True, n_grads=0,
    )  # fmt: skip
    if given.options.backend == "reference":
        return reference.linear_ppo_loss(
            old_logprobs=policy.old_logprobs, advantages=policy.advantages, **given.plain(),
            **policy.plain(_OP),
        )  # fmt: skip
    grads = 2 if n_grads(*args) else 0
    if grads and variant != "gspo" and given.weight.dtype != torch.float16:
        loss, stats, logprobs, entropy = _LinearPPOLoss.apply(*args, given, policy)
    else:
        loss, stats, logprobs, entropy = two_passes(given, policy, grads)
    return HeadLoss(loss, Stats(stats), logprobs, entropy)
