"""Validated arguments of a policy loss: what its kernels, surrogate and correction take."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ppo_fast import _checks, surrogates
from ppo_fast._boundary import calls
from ppo_fast._boundary.options import PolicyOptions, TokenTensors
from ppo_fast._boundary.schema import REDUCTIONS, VARIANTS, compute_dtype
from ppo_fast._results import Moments
from ppo_fast._sequences import Sequences
from ppo_fast.corrections import Correction
from ppo_fast.ops.backward import detached
from ppo_fast.ops.context import check_context, eager
from ppo_fast.ops.loss_options import LossOptions, log_ratio_bounds, need_sequences
from ppo_fast.ops.rollout_weights import check_correction
from ppo_fast.reference.common import keep_of, own_denom, token_weights
from ppo_fast.reference.correction import Counted, is_late, numbers, recounts
from ppo_fast.surrogates import Surrogate


class PolicyInputs(NamedTuple):
    """A loss's arguments but log-probabilities, mask and entropy; constants all."""

    per_token: TokenTensors
    cu_seqlens: Tensor | None
    sequence_weights: Tensor | None
    options: PolicyOptions
    given: LossOptions
    surrogate: Surrogate | None = None  # the policy term, where no kernel has it
    correction: Correction | None = None  # still to be formed
    counted: Tensor | None = None  # the tokens that count in D, where they are not the mask's
    own_denom: Tensor | None = None  # the reduction's own D, where rejections change it
    rollout: Tensor | None = None  # `RolloutStats.values` of the correction that was formed
    context_group: dist.ProcessGroup | None = None  # every rank has a part of every sequence
    whole: Sequences | None = None  # the group's, of the loss's mask, once they are counted

    @property
    def late(self) -> bool:
        """True for a correction that waits for the current log-probabilities."""
        return is_late(self.correction, self.per_token.old_logprobs)

    @property
    def couples(self) -> bool:
        """True where a slope depends on other tokens than its own, so that all must be known."""
        if self.given.variant == "gspo" or self.surrogate_couples:
            return True
        c = self.correction
        if c is None or not self.late:
            return False
        by_sequence = self.given.reduction == "seq-mean-token-mean" and c.count == "kept"
        return c.needs_sequences() or (by_sequence and bool(c.reject))

    @property
    def surrogate_couples(self) -> bool:
        """True for a surrogate that takes the whole call at once."""
        s = self.surrogate
        return s is not None and (s.couples or self.given.ratio_level != "token")

    @property
    def one_pass(self) -> bool:
        """True where a kernel forms a token's slope from its logits alone."""
        own = self.surrogate is None and self.correction is None
        return own and self.given.variant != "gspo"

    @property
    def late_denom(self) -> bool:
        """True where D waits for what a correction rejects by the current log-probabilities."""
        c = self.correction
        return c is not None and bool(c.reject) and c.count == "kept" and self.given.denom is None

    def by_kernel(
        self,
        backend: str,
        logprobs: Tensor,
        mask: Tensor | None,
        entropy: Tensor | None,
        n_grads: int,
    ) -> calls.RawLoss:
        """(loss, stats, scale, grads) of a loss that the kernels have, its correction formed."""
        return calls.ppo_loss(
            backend,
            logprobs,
            self.per_token,
            self.options,
            n_grads,
            mask=mask,
            entropy=entropy,
            cu_seqlens=self.cu_seqlens,
            sequence_weights=self.sequence_weights,
        )

    def counting(self, tokens: Tensor) -> PolicyInputs:
        """The same loss with a D over other tokens than its mask's."""
        denom = self.denom(tokens)
        options = self.options._replace(denom_tensor=denom)
        return self._replace(options=options, counted=tokens)

    def weights(self, rows: Tensor, counted: Tensor | None) -> Tensor:
        """w / D of every slot, or 0-d where all that are unmasked weigh alike: for the kernels.

        w over the `rows` of the loss, D over those that are `counted`; None leaves D out.
        """
        given = self.given.reduction
        if self.sequence_weights is not None or given == "seq-mean-token-mean":
            weights = self.row_weights(rows)
            return weights if counted is None else over(weights, self.denom(counted))
        wide = compute_dtype(self.per_token.advantages)
        if counted is None or (given == "token-sum" and self.given.denom is None):
            return torch.ones((), dtype=wide, device=rows.device)
        denom = self.denom(counted)
        return denom.double().reciprocal().masked_fill(denom <= 0, 0.0).to(wide)

    def settled(self, mask: Tensor | None) -> PolicyInputs:
        """The loss with its context group's w and D, where no rejection is to change them."""
        c = self.correction
        waits = c is not None and recounts(c) and c.count == "kept"
        if self.context_group is None or self.whole is not None or waits:
            return self
        rows, options = keep_of(self.per_token.advantages, mask), self.counting_options()
        if self.counted is not None:
            options["denom"] = self.options.denom_tensor
        return self.with_counts(numbers(rows, rows, rows, **options))

    def counting_options(self) -> dict[str, Any]:
        """Keyword arguments of `numbers`."""
        device = self.per_token.advantages.device
        return {
            "denom": None if self.given.denom is None else self.given_denom(device),
            "cu_seqlens": self.cu_seqlens,
            "context_group": self.context_group,
            "reduction": self.given.reduction,
            "sequence_weights": self.sequence_weights,
            "dtype": compute_dtype(self.per_token.advantages),
        }

    def with_counts(self, new: Counted) -> PolicyInputs:
        """The loss with w and D as numbers, which no kernel counts then.

        Nor has a kernel the ratios of sequences of which this rank has a part: "gspo" is then its
        own surrogate.
        """
        denom: Any = new.denom  # a tensor, as the one it was made of
        g, surrogate = self.given, self.surrogate
        g = g._replace(reduction=new.reduction, denom=denom)
        if new.seqs is not None and g.variant == "gspo":
            surrogate = surrogates.clip(g.clip_low, g.clip_high, g.dual_clip)
            g = g._replace(variant="clip", ratio_level="sequence-token")
        return self._replace(
            given=g,
            options=self.options._replace(
                variant=VARIANTS.index(g.variant),
                reduction=REDUCTIONS.index(new.reduction),
                denom=0.0,
                denom_tensor=denom,
            ),
            surrogate=surrogate,
            sequence_weights=new.sequence_weights,
            own_denom=new.own,
            whole=new.seqs,
        )

    def row_weights(self, rows: Tensor) -> Tensor:
        """w of every slot, 0 where masked."""
        seqs = Sequences(rows, self.cu_seqlens, self.context_group)
        wide = compute_dtype(self.per_token.advantages)
        return token_weights(seqs, self.given.reduction, wide, self.sequence_weights)

    def denom(self, counted: Tensor) -> Tensor:
        """D, 0-d on the device; 1 for "token-sum"."""
        if self.given.denom is not None:
            return self.given_denom(counted.device)
        reduction = self.given.reduction
        own = own_denom(Sequences(counted, self.cu_seqlens, self.context_group), reduction)
        return torch.ones_like(own) if reduction == "token-sum" else own

    def given_denom(self, device: torch.device) -> Tensor:
        """The caller's D, 0-d; a number is written by the device, for a copy would wait for it."""
        o = self.options
        if o.denom_tensor is not None:
            return o.denom_tensor
        return torch.full((), o.denom, dtype=torch.float64, device=device)

    def for_reference(self, op: str) -> dict[str, Any]:
        """Keyword arguments of the reference."""
        x = self.per_token
        given = self.given._asdict()
        del given["ratio_cap"]
        return given | {
            "surrogate": self.surrogate,
            "rollout_logprobs": x.rollout_logprobs,
            "correction": self.correction,
            "log_ratio_clamp": log_ratio_bounds(op, self.given.log_ratio_clamp),
            "old_logprobs": x.old_logprobs,
            "advantages": x.advantages,
            "is_weights": x.is_weights,
            "advantage_moments": x.moments,
            "ref_logprobs": x.ref_logprobs,
            "cu_seqlens": self.cu_seqlens,
            "sequence_weights": self.sequence_weights,
            "context_group": self.context_group,
        }


def over(w: Tensor, denom: Tensor) -> Tensor:
    """w / D, and 0 where D is not positive; a NaN passes."""
    return (w / denom.double()).masked_fill(denom <= 0, 0.0).to(w.dtype)


def check_policy(
    op: str,
    main: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    is_weights: Tensor | None,
    sequence_weights: Tensor | None,
    advantage_moments: Any,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    correction: Correction | None,
    cu_seqlens: Tensor | None,
    context_group: dist.ProcessGroup | None,
    options: LossOptions,
    has_entropy: bool,
) -> PolicyInputs:
    """`main` sets shape, device and precision; raises ValueError or TypeError."""
    resolved, surrogate = options.resolved(op)
    shape = main.shape
    if _checks.tensor(op, "advantages", advantages).shape != shape:
        advantages = _widened(advantages, main)
    if is_weights is not None and _checks.tensor(op, "is_weights", is_weights).shape != shape:
        is_weights = _widened(is_weights, main)
    _checks.alike(
        op,
        main,
        old_logprobs=old_logprobs,
        advantages=advantages,
        is_weights=is_weights,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
    )
    checked = resolved.checked(
        op,
        main,
        cu_seqlens,
        has_ref=ref_logprobs is not None,
        has_entropy=has_entropy,
    )
    if sequence_weights is not None:
        _check_sequence_weights(op, sequence_weights, main, cu_seqlens)
    tensors = TokenTensors(
        detached(old_logprobs),
        detached(advantages),
        detached(is_weights),
        detached(ref_logprobs),
        None if advantage_moments is None else _check_moments(op, advantage_moments, main),
        detached(rollout_logprobs),
    )
    if correction is not None:
        check_correction(op, correction, main, cu_seqlens)
        if rollout_logprobs is None:
            raise ValueError(f"{op}: rollout_logprobs must be given with correction, got None")
    policy = PolicyInputs(
        tensors, cu_seqlens, detached(sequence_weights), checked, resolved, surrogate, correction
    )
    if context_group is None:
        return policy
    return _with_context(op, policy, context_group, main, options)


def _with_context(
    op: str,
    policy: PolicyInputs,
    group: dist.ProcessGroup,
    main: Tensor,
    options: LossOptions,
) -> PolicyInputs:
    """The loss of a part of every sequence, once all ranks are known to make this call."""
    cu_seqlens, surrogate = policy.cu_seqlens, policy.surrogate
    if surrogate is not None and surrogate.couples:
        need_sequences(op, "a context_group and a surrogate that couples", main, cu_seqlens)
    constants = (*policy.per_token, policy.sequence_weights)
    call = (options, policy.correction, constants)
    eager(check_context)(op, group, main, cu_seqlens, *call)
    return policy._replace(context_group=group)


def _widened(x: Tensor, main: Tensor) -> Tensor:
    """(B, 1) as (B, T), without a copy; anything else as it is."""
    column = main.dim() == 2 and x.shape == (main.shape[0], 1)
    return x.expand(main.shape) if column else x


def _check_sequence_weights(
    op: str, weights: Tensor, main: Tensor, cu_seqlens: Tensor | None
) -> None:
    need_sequences(op, "sequence_weights", main, cu_seqlens)
    count = main.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    _checks.sized(
        op, "sequence_weights", weights, main, (count,), "(B,)" if cu_seqlens is None else "(S,)"
    )


def _check_moments(op: str, moments: Any, main: Tensor) -> Tensor:
    if not isinstance(moments, Moments):
        raise TypeError(f"{op}: advantage_moments must be Moments, got {type(moments).__name__}")
    values: Tensor = moments.values
    if values.device != main.device:
        raise ValueError(f"{op}: advantage_moments must be on {main.device}, got {values.device}")
    return values.detach()
