"""Policy and value losses of a step, in fp64.

PPO's clipped surrogate (arXiv 1707.06347, equation 7), dual clip (1912.09729, equation 5), GRPO
(2402.03300, equation 3), DAPO (2503.14476, equation 8), Dr. GRPO (2503.20783), GSPO (2507.18071),
CISPO (2506.13585), SAPO (2511.20347), DPPO (2602.04879), GPG (2504.02546).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ppo_fast.referee.cases import Edges, Tokens
from ppo_fast.referee.formulas import (
    SHIFTED,
    Change,
    Exact,
    Reading,
    counted,
    counting,
    kept,
    reduction,
)
from ppo_fast.referee.formulas.tokens import KL_WORDS, estimate

_PAPERS = {
    "clip": "PPO, arXiv 1707.06347, equation 7",
    "clip, sequence": "GSPO, arXiv 2507.18071, equation 5",
    "clip, sequence-token": "GSPO-token, arXiv 2507.18071, equation 13",
    "cispo": "CISPO, arXiv 2506.13585, equation 4",
    "sapo": "SAPO, arXiv 2511.20347",
    "dppo_tv": "DPPO, arXiv 2602.04879",
    "gpg": "GPG, arXiv 2504.02546",
    "dro": "DRO: −(A·log π − β/2·(log ratio)²)",
}
_AVERAGES = {
    "token-mean": "averaged over all tokens, as DAPO, arXiv 2503.14476, equation 8",
    "seq-mean-token-mean": "averaged as GRPO, arXiv 2402.03300, equation 3",
    "seq-mean-token-sum": "token sums averaged over sequences",
    "seq-mean-token-sum-norm": "averaged as Dr. GRPO, arXiv 2503.20783",
    "token-sum": "summed",
}


@dataclass(frozen=True)
class PolicyLoss(Reading):
    """Loss of a step and its gradient by the log-probabilities.

    `clip_high` of CISPO bounds the ratio at 1 + clip_high; `clip_low=None` is no lower bound.
    `kl_coef` adds a KL estimate per token, times the ratio with `kl_weight="ratio"`;
    `entropy_coef` subtracts the mean entropy, whose mask, reduction and scope are the loss's where
    it has none of its own.
    """

    part: ClassVar[str] = "policy loss"
    surrogate: str = "clip"
    level: str = "token"
    clip_low: float | None = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    dual_sign: str = "negative"
    pessimistic: bool = True
    ratio: str = "new/old"
    sign: float = 1.0
    clamp: float | None = None
    ceiling: float | None = None
    tau: tuple[float, float] = (1.0, 1.05)
    beta: float = 0.0
    mask: str = "select"
    reduction: str = "token-mean"
    scope: str = "step"
    empty_rows: bool = True
    divisor: float = 1.0
    kl_coef: float = 0.0
    kl: str = "k3"
    kl_weight: str | None = None
    entropy_coef: float = 0.0
    entropy_scope: str | None = None
    entropy_mask: str | None = None
    entropy_reduction: str | None = None

    @property
    def paper(self) -> str:
        """Papers of the surrogate and of the reduction."""
        name = self.surrogate if self.level == "token" else f"{self.surrogate}, {self.level}"
        return f"{_PAPERS[name]}; {_AVERAGES[self.reduction]}"

    @property
    def edges(self) -> Edges:
        """Bounds of the ratio, for the batch that sits on them."""
        return Edges(self.clip_low or 0.2, self.clip_high, self.dual_clip)

    def exact(self, batch: Tokens, eps: float) -> dict[str, Exact]:
        """`loss`, `gradient` and, with an entropy bonus, `entropy_gradient`."""
        new = batch.logprobs.double().clone().requires_grad_()
        entropies = batch.entropies.double().clone().requires_grad_()
        keep = counted(batch.mask, self.mask)
        w = reduction.weights(
            counting(batch.mask, self.mask),
            batch.cut,
            self.reduction,
            self.scope,
            self.empty_rows,
            self.divisor,
        )
        per_token, size, kink = self._per_token(batch, new, keep, eps)
        if self.kl_coef:
            extra, extra_size = self._kl(batch, new, keep)
            per_token, size = (
                per_token + self.kl_coef * extra,
                size + abs(self.kl_coef) * extra_size,
            )
        loss = _summed(w, per_token, keep, self.mask)
        size, kink = _finite(size) * w * keep, _finite(kink) * w * keep
        bonus_size = torch.zeros(())
        if self.entropy_coef:
            bonus, v = self._entropy(batch, entropies)
            loss, bonus_size = loss - self.entropy_coef * bonus, abs(self.entropy_coef) * v.sum()
        (gradient,) = torch.autograd.grad(loss, new, retain_graph=True)
        out = {
            "loss": Exact(loss.detach(), size.sum() + bonus_size),
            "gradient": Exact(gradient, size + gradient.nan_to_num().abs(), kink),
        }
        if self.entropy_coef:
            (gradient,) = torch.autograd.grad(loss, entropies)
            out["entropy gradient"] = Exact(gradient, gradient.nan_to_num().abs())
        return out

    def _entropy(self, batch: Tokens, entropies: Tensor) -> tuple[Tensor, Tensor]:
        mask = self.entropy_mask or self.mask
        keep = counted(batch.mask, mask)
        scope = self.entropy_scope or self.scope
        how = (self.entropy_reduction or self.reduction, scope, self.empty_rows)
        v = reduction.weights(counting(batch.mask, mask), batch.cut, *how, self.divisor)
        size = torch.where(keep, v * entropies.detach().abs().nan_to_num(), 0.0)
        return _summed(v, kept(entropies, keep, mask), keep, mask), size

    def _log_ratio(self, batch: Tokens, new: Tensor, keep: Tensor) -> Tensor:
        """log ρ of each token; of a sequence's level, the mean over its tokens in each."""
        gap = kept(new - kept(batch.old_logprobs, keep, self.mask), keep, self.mask)
        gap = gap if self.ratio == "new/old" else -gap
        if self.level != "token":
            counts = keep.sum(-1, keepdim=True).clamp(min=1)
            mean = torch.where(keep, gap, 0.0) if self.mask == "late" else gap * keep
            mean = mean.sum(-1, keepdim=True) / counts
            gap = mean if self.level == "sequence" else mean.detach() + new - new.detach()
            gap = gap.expand(keep.shape)
        gap = gap if self.clamp is None else gap.clamp(-self.clamp, self.clamp)
        return gap if self.ceiling is None else gap.clamp(max=self.ceiling)

    def _per_token(
        self, batch: Tokens, new: Tensor, keep: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, size of its roundings, and size of the gradient where that is not unique."""
        d = self._log_ratio(batch, new, keep)
        a = kept(batch.advantages, keep, self.mask)
        ratio = d.exp()
        old = kept(batch.old_logprobs, keep, self.mask)
        loss, kinks = self._surrogate(a, ratio, new, old, d)
        loss = self.sign * loss
        near = torch.zeros_like(d)
        for at, of in kinks:
            there = (of - at).abs() <= 32 * eps * (1 + d.abs()) * of.abs().clamp(min=1e-3)
            near = torch.where(there, 4 * (a * ratio).abs() + (a * new).abs(), near)
        size = (loss.abs() + a.abs()) * (2 + d.abs())
        return loss, size.detach(), near.detach()

    def _surrogate(
        self, a: Tensor, ratio: Tensor, new: Tensor, old: Tensor, d: Tensor
    ) -> tuple[Tensor, list[tuple[float, Tensor]]]:
        """The loss of each token, and its kinks: where, of which quantity."""
        low = 0.0 if self.clip_low is None else 1 - self.clip_low
        high = 1 + self.clip_high
        ends = [(low, ratio), (high, ratio)]
        if self.surrogate == "clip":
            pick = torch.maximum if self.pessimistic else torch.minimum
            loss = pick(-a * ratio, -a * ratio.clamp(low, high))
            if self.dual_clip is None:
                return loss, ends
            held = torch.minimum(loss, -a * self.dual_clip)
            signs = {"negative": a < 0, "positive": a > 0, "both": a == a}
            return torch.where(signs[self.dual_sign], held, loss), [*ends, (self.dual_clip, ratio)]
        if self.surrogate == "cispo":
            return -ratio.clamp(low, high).detach() * a * new, ends
        if self.surrogate == "sapo":
            tau = torch.where(a > 0, self.tau[0], self.tau[1] + torch.zeros_like(a))
            return -a * 4 / tau * torch.sigmoid(tau * (ratio - 1)), []
        if self.surrogate == "gpg":
            return -a * new, []
        if self.surrogate == "dro":
            return -(a * new - self.beta / 2 * d.square()), []
        assert self.surrogate == "dppo_tv", self.surrogate
        gap = new.exp() - old.exp()
        inside = torch.where(a > 0, gap <= self.clip_high, gap >= -(self.clip_low or 0.0))
        ends = [(self.clip_high, gap), (-(self.clip_low or 0.0), gap)]
        capped = ratio if self.dual_clip is None else ratio.clamp(max=self.dual_clip)
        return -a * capped.detach() * new * inside, ends

    def _kl(self, batch: Tokens, new: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        ref = kept(batch.ref_logprobs, keep, self.mask)
        value, size = estimate(self.kl, kept(new, keep, self.mask) - ref)
        if self.kl_weight is None:
            return value, size
        d = self._log_ratio(batch, new, keep)
        return value * d.exp(), size * (d.exp() * (2 + d.abs())).detach()

    def changes(self) -> list[Change]:
        """Other readings of clip, ratio, sign, KL, entropy, mask and denominator."""
        return self.others(
            [
                *reduction.changes(self.reduction),
                *self._of_the_ratio(),
                *self._of_the_clip(),
                *self._of_the_terms(),
            ]
        )

    def _of_the_ratio(self) -> list[Change]:
        levels = {
            "token": "of each token",
            "sequence": "the sequence's mean",
            "sequence-token": "the sequence's mean, its gradient each token's own",
        }
        return [
            Change("sign: the loss is negated", {"sign": -1.0}, "sign"),
            Change("ratio: old over new, not new over old", {"ratio": "old/new"}, "ratio"),
            Change("ratio: the log-ratio is clamped to ±20", {"clamp": 20.0}, "ratio.clamp"),
            Change("ratio: the log-ratio is capped at 10", {"ceiling": 10.0}, "ratio.ceiling"),
            Change("ratio: the log-ratio is clamped to ±10", {"clamp": 10.0}, "ratio.clamp"),
            *(
                Change(f"ratio: {words}", {"level": level}, f"ratio.{level}")
                for level, words in levels.items()
            ),
        ]

    def _of_the_clip(self) -> list[Change]:
        low, high = self.clip_low, self.clip_high
        swapped = {"clip_low": high, "clip_high": low}
        found = []
        if self.surrogate in ("clip", "cispo", "dppo_tv") and low is not None:
            found += [
                Change("clip: the bounds change places", swapped, "clip.swapped"),
                Change(
                    "clip: the upper bound is the lower one's", {"clip_high": low}, "clip.high"
                ),
                Change("clip: the lower bound is the upper one's", {"clip_low": high}, "clip.low"),
                Change("clip: no lower bound", {"clip_low": None}, "clip.low"),
            ]
        if self.surrogate == "cispo":
            words = "clip: the ratio is at most ε_high itself, not 1 + ε_high"
            found += [Change(words, {"clip_high": high - 1}, "clip.itself")]
        if self.surrogate == "clip":
            smaller, none = {"pessimistic": False}, {"clip_low": 1.0, "clip_high": 1e30}
            found += [
                Change("clip: the smaller of both losses, not the larger", smaller, "clip.min"),
                Change("clip: none", none, "clip.none"),
                Change("dual clip: none", {"dual_clip": None}, "dual-clip.none"),
                Change("dual clip: at 3", {"dual_clip": 3.0}, "dual-clip"),
            ]
        if self.dual_clip is not None:
            positive = "dual clip: for positive advantages, not negative ones"
            both = "dual clip: for advantages of both signs"
            found += [
                Change(positive, {"dual_sign": "positive"}, "dual-clip.positive"),
                Change(both, {"dual_sign": "both"}, "dual-clip.both"),
            ]
        return found

    def _of_the_terms(self) -> list[Change]:
        found = []
        if self.kl_coef:
            found += [
                Change(f"KL: {words}", {"kl": kl}, f"kl.{kl}") for kl, words in KL_WORDS.items()
            ]
            found += [
                Change("KL: subtracted, not added", {"kl_coef": -self.kl_coef}, "kl.sign"),
                Change("KL: left out", {"kl_coef": 0.0}, "kl.none"),
                Change("KL: not times the ratio", {"kl_weight": None}, "kl.weight"),
                Change("KL: times the ratio", {"kl_weight": "ratio"}, "kl.weight"),
            ]
        if self.entropy_coef:
            found += [
                Change(
                    "entropy: over masked slots too", {"entropy_mask": "ignore"}, "entropy.mask"
                ),
                Change(
                    "entropy: added to the loss, not subtracted",
                    {"entropy_coef": -self.entropy_coef},
                    "entropy.sign",
                ),
                Change(
                    "entropy: masked slots are multiplied by 0, not left out",
                    {"entropy_mask": "multiply"},
                    "entropy.multiply",
                ),
                Change(
                    "entropy: the mean of micro-batch means, not the mean over the step's tokens",
                    {"entropy_scope": "micro-batch"},
                    "entropy.micro-batch",
                ),
            ]
        return found


@dataclass(frozen=True)
class ValueLoss(Reading):
    """`scale` times the mean of (V − R)², or of the larger of that and the clipped one.

    Clipping is that of PPO's first implementation (OpenAI baselines' ppo2); `clip=None` is none.
    """

    part: ClassVar[str] = "value loss"
    paper: ClassVar[str] = "arXiv 1707.06347, equation 9; the clip is of OpenAI baselines' ppo2"
    clip: float | None = 0.2
    larger: bool = True
    scale: float = 0.5
    mask: str = "select"
    reduction: str = "token-mean"
    scope: str = "step"
    empty_rows: bool = True
    divisor: float = 1.0

    def exact(self, batch: Tokens, eps: float) -> dict[str, Exact]:
        """`loss`, and its `gradient` by the values."""
        values = batch.values.double().clone().requires_grad_()
        keep = counted(batch.mask, self.mask)
        w = self.scale * reduction.weights(
            counting(batch.mask, self.mask),
            batch.cut,
            self.reduction,
            self.scope,
            self.empty_rows,
            self.divisor,
        )
        old, target = (kept(x, keep, self.mask) for x in (batch.old_values, batch.returns))
        error = values - target
        per_token, kink = error.square(), torch.zeros_like(w)
        if self.clip is not None:
            gap = values - old
            held = old + gap.clamp(-self.clip, self.clip) - target
            squares = error.square(), held.square()
            per_token = torch.maximum(*squares) if self.larger else squares[1]
            edge = ((gap.abs() - self.clip).abs() <= 8 * eps * (values.abs() + old.abs())) | (
                (squares[0] - squares[1]).abs() <= 16 * eps * squares[0]
            )
            kink = torch.where(edge & (gap.abs() > 0.9 * self.clip), 4 * error.abs(), 0.0)
        loss = _summed(w, per_token, keep, self.mask)
        (gradient,) = torch.autograd.grad(loss, values)
        reach = _finite(values.abs() + old.abs() + target.abs()) * w.abs() * keep
        size = reach * _finite(error.abs() + 1)
        return {
            "loss": Exact(loss.detach(), (size * (1 + _finite(error.abs()))).sum().detach()),
            "gradient": Exact(gradient, 4 * reach.detach(), (_finite(kink) * w * keep).detach()),
        }

    def changes(self) -> list[Change]:
        """Other clips, factors, masks and denominators."""
        found = [
            Change("value: the factor ½ is left out", {"scale": 2 * self.scale}, "value.factor"),
            Change("value: a further factor of ½", {"scale": self.scale / 2}, "value.factor"),
            Change("value: not clipped", {"clip": None}, "value.clip"),
        ]
        if self.clip is not None:
            found += [
                Change(
                    "value: the clipped error alone, not the larger of both",
                    {"larger": False},
                    "value.larger",
                )
            ]
        return self.others([*found, *reduction.changes(self.reduction)])


def _finite(x: Tensor) -> Tensor:
    return x.detach().nan_to_num(0.0, 0.0, 0.0)


def _summed(w: Tensor, x: Tensor, keep: Tensor, mask: str) -> Tensor:
    """Σ w·x over unmasked slots, by the mask's reading."""
    if mask in ("select", "late", *SHIFTED):
        return torch.where(keep, w * x, 0.0).sum()
    return (w * x * keep).sum()
