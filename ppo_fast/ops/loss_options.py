"""Options of the losses as callers give them, and their checks."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from ppo_fast import _checks, surrogates
from ppo_fast._boundary.options import PolicyOptions, policy_options
from ppo_fast._boundary.schema import ESTIMATORS, KL_WEIGHTS, REDUCTIONS, VARIANTS
from ppo_fast.reference.surrogate import LEVELS
from ppo_fast.surrogates import Surrogate

_DIVERGENCES = {"dppo-tv": "tv", "dppo-kl": "kl"}
_CAPPED = (*_DIVERGENCES, "reinforce")
# Variants by name: those that have kernels, and surrogates with their default options.
NAMES = (*VARIANTS, "sapo", *_CAPPED)

Variant = str | Surrogate
Coefficient = float | Tensor
Bounds = float | tuple[float, float] | None


class LossOptions(NamedTuple):
    """Arguments of a policy loss that are not per-token tensors, as given."""

    variant: Any
    ratio_level: str
    clip_low: float
    clip_high: float
    dual_clip: float | None
    ratio_cap: float | None
    log_ratio_clamp: Bounds
    entropy_coef: Coefficient
    kl_coef: Coefficient
    kl_estimator: str
    kl_clamp: float | None
    kl_ratio_clip: float | None
    kl_weight: str | None
    reduction: str
    denom: Coefficient | None

    def resolved(self, op: str) -> tuple[LossOptions, Surrogate | None]:
        """The options by the kernels' variants, and the surrogate where none of them is meant.

        A surrogate's variant is "clip", whose bounds its statistics take.
        """
        variant = self.variant
        if self.ratio_cap is None and self.ratio_level == "token" and variant in VARIANTS:
            return self, None
        _checks.choice(op, "ratio_level", self.ratio_level, LEVELS)
        if isinstance(variant, Surrogate):
            label = f"Surrogate {variant.name!r}"
        else:
            _checks.choice(op, "variant", variant, NAMES)
            label = repr(variant)
        if self.ratio_cap is not None and variant not in _CAPPED:
            raise ValueError(
                f"{op}: ratio_cap must be None with variant {label}, got {self.ratio_cap}"
            )
        whole = {"gspo": ("token", "sequence-token"), "penalty": ("token",), "linear": ("token",)}
        levels = whole.get(variant, LEVELS) if isinstance(variant, str) else LEVELS
        if self.ratio_level not in levels:
            raise ValueError(
                f"{op}: ratio_level must be {' or '.join(levels)} with variant {label},"
                f" got {self.ratio_level!r}"
            )
        if variant == "gspo" or (variant == "clip" and self.ratio_level == "sequence-token"):
            return self._replace(variant="gspo", ratio_level="token"), None
        if variant in ("penalty", "linear") or (
            self.ratio_level == "token" and variant in VARIANTS
        ):
            return self, None
        surrogate = self._surrogate(op)
        if variant != "clip" and self.dual_clip is not None:
            raise ValueError(f"{op}: dual_clip must be None with variant {label}")
        return self._replace(variant="clip", dual_clip=None, ratio_cap=None), surrogate

    def _surrogate(self, op: str) -> Surrogate:
        """The variant as a surrogate."""
        if isinstance(self.variant, Surrogate):
            return self.variant
        low = _checks.number(op, "clip_low", self.clip_low, 0.0, 1.0)
        high = _checks.number(op, "clip_high", self.clip_high, 0.0)
        cap = self.ratio_cap
        if cap is not None and _checks.number(op, "ratio_cap", cap, 0.0) == 0.0:
            raise ValueError(f"{op}: ratio_cap must be above 0, got {cap}")
        if self.variant in _DIVERGENCES:
            return surrogates.dppo(_DIVERGENCES[self.variant], low, high, cap)
        if self.variant == "reinforce":
            return surrogates.reinforce(cap)
        if self.variant == "sapo":
            return surrogates.sapo()
        if self.variant == "cispo":
            return surrogates.cispo(low, high)
        dual = None if self.dual_clip is None else self._dual(op)
        return surrogates.clip(low, high, dual)

    def checked(
        self,
        op: str,
        main: Tensor,
        cu_seqlens: Tensor | None,
        *,
        has_ref: bool,
        has_entropy: bool,
    ) -> PolicyOptions:
        """The options that the kernels take; raises ValueError or TypeError."""
        number, device = _checks.number, main.device
        entropy, entropy_t = _checks.coefficient(op, "entropy_coef", self.entropy_coef, device)
        kl, kl_t = _checks.coefficient(op, "kl_coef", self.kl_coef, device)
        denom, denom_t = check_denom(op, self.denom, main)
        variant = _checks.choice(op, "variant", self.variant, VARIANTS)
        estimator, straight_through = check_estimator(op, self.kl_estimator)
        reduction = check_reduction(op, self.reduction, self.denom, main, cu_seqlens)
        by_sequence = self.ratio_level != "token"
        if self.variant == "gspo" or by_sequence:
            what = f"ratio_level {self.ratio_level!r}" if by_sequence else "variant 'gspo'"
            need_sequences(op, what, main, cu_seqlens)
        if not has_entropy and (entropy_t is not None or entropy != 0.0):
            raise ValueError(f"{op}: entropy must be given with entropy_coef, got None")
        self._check_reference(op, has_ref, kl_t is not None or kl != 0.0, kl)
        clip_low = number(op, "clip_low", self.clip_low, 0.0, 1.0)
        clip_high = number(op, "clip_high", self.clip_high, 0.0)
        dual_clip = math.inf if self.dual_clip is None else self._dual(op)
        log_ratio_min, log_ratio_max = log_ratio_bounds(op, self.log_ratio_clamp)
        return policy_options(
            variant=variant,
            estimator=estimator,
            straight_through=straight_through,
            reduction=reduction,
            kl_weight=0 if self.kl_weight is None else self._kl_weight(op),
            by_sequence=int(by_sequence),
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=dual_clip,
            log_ratio_min=log_ratio_min,
            log_ratio_max=log_ratio_max,
            entropy_coef=entropy,
            kl_coef=kl,
            kl_clamp=check_kl_clamp(op, self.kl_clamp),
            kl_ratio_clip=math.inf if self.kl_ratio_clip is None else self._ratio_clip(op),
            denom=denom,
            entropy_coef_tensor=entropy_t,
            kl_coef_tensor=kl_t,
            denom_tensor=denom_t,
        )

    def _check_reference(self, op: str, has_ref: bool, used: bool, kl: float) -> None:
        if self.variant == "penalty":
            if has_ref:
                raise ValueError(f"{op}: ref_logprobs must be None with variant 'penalty'")
        elif used and not has_ref:
            raise ValueError(f"{op}: ref_logprobs must be given with kl_coef, got None")
        if self.variant == "linear" and kl >= 1.0:
            raise ValueError(f"{op}: kl_coef must be below 1 with variant 'linear', got {kl}")

    def _dual(self, op: str) -> float:
        if self.variant not in ("clip", "gspo"):
            raise ValueError(f"{op}: dual_clip must be None with variant {self.variant!r}")
        bound = _checks.number(op, "dual_clip", self.dual_clip)
        if bound <= 1.0:
            raise ValueError(f"{op}: dual_clip must be above 1, got {self.dual_clip}")
        return bound

    def _ratio_clip(self, op: str) -> float:
        if not self.kl_estimator.endswith("+"):
            raise ValueError(
                f"{op}: kl_ratio_clip must be None without a '+' estimator,"
                f" got {self.kl_ratio_clip}"
            )
        return _checks.number(op, "kl_ratio_clip", self.kl_ratio_clip, 0.0)

    def _kl_weight(self, op: str) -> int:
        code = _checks.choice(op, "kl_weight", self.kl_weight, KL_WEIGHTS[1:]) + 1
        clash = {
            f"kl_estimator {self.kl_estimator!r}": self.kl_estimator[-1:] == "+",
            f"kl_ratio_clip {self.kl_ratio_clip}": self.kl_ratio_clip is not None,
            f"variant {self.variant!r}": self.variant in ("penalty", "linear"),
        }
        for what, given in clash.items():
            if given:
                raise ValueError(
                    f"{op}: kl_weight must be None with {what}, got {self.kl_weight!r}"
                )
        return code


def loss_options(
    *,
    variant: Any,
    ratio_level: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    ratio_cap: float | None,
    log_ratio_clamp: Bounds,
    entropy_coef: Coefficient,
    kl_coef: Coefficient,
    kl_estimator: str,
    kl_clamp: float | None,
    kl_ratio_clip: float | None,
    kl_weight: str | None,
    reduction: str,
    denom: Coefficient | None,
) -> LossOptions:
    """The tuple, by keyword: its own constructor takes twice as long with keywords."""
    return LossOptions(
        variant,
        ratio_level,
        clip_low,
        clip_high,
        dual_clip,
        ratio_cap,
        log_ratio_clamp,
        entropy_coef,
        kl_coef,
        kl_estimator,
        kl_clamp,
        kl_ratio_clip,
        kl_weight,
        reduction,
        denom,
    )


def check_kl_clamp(op: str, clamp: float | None) -> float:
    """The bound on the estimate of KL, inf where absent."""
    return math.inf if clamp is None else _checks.number(op, "kl_clamp", clamp, 0.0)


def log_ratio_bounds(op: str, clamp: Bounds) -> tuple[float, float]:
    """(low, high) of the clamp on the log-ratio; a number c is (−c, c), None no clamp."""
    if clamp is None:
        return -math.inf, math.inf
    if not isinstance(clamp, tuple):
        width = _checks.number(op, "log_ratio_clamp", clamp, 0.0)
        return -width, width
    if len(clamp) != 2:
        raise ValueError(f"{op}: log_ratio_clamp must be (low, high), got {clamp}")
    low = _checks.number(op, "log_ratio_clamp", clamp[0], high=0.0)
    return low, _checks.number(op, "log_ratio_clamp", clamp[1], low=0.0)


def check_estimator(op: str, estimator: Any) -> tuple[int, int]:
    """The estimator's code, and 1 for a trailing "+" (k2's gradient)."""
    name = estimator.removesuffix("+") if isinstance(estimator, str) else estimator
    if name not in ESTIMATORS:
        raise ValueError(
            f"{op}: kl_estimator must be one of {', '.join(ESTIMATORS)}, each optionally with '+',"
            f" got {estimator!r}"
        )
    return ESTIMATORS.index(name), int(name != estimator)


def check_denom(op: str, denom: Coefficient | None, main: Tensor) -> tuple[float, Tensor | None]:
    """Divisor in place of D: (positive number or 0, tensor or None); 0 where absent."""
    if denom is None:
        return 0.0, None
    number, tensor = _checks.coefficient(op, "denom", denom, main.device)
    if tensor is not None:
        return number, tensor
    return _checks.positive(op, "denom", number, main), None


def need_sequences(op: str, what: str, main: Tensor, cu_seqlens: Tensor | None) -> None:
    """ValueError for flat inputs without sequences, which `what` needs."""
    if main.dim() == 1 and cu_seqlens is None:
        raise ValueError(f"{op}: cu_seqlens must be given for flat inputs with {what}, got None")


def check_reduction(
    op: str, reduction: str, denom: Any, main: Tensor, cu_seqlens: Tensor | None
) -> int:
    """The reduction's code."""
    code = _checks.choice(op, "reduction", reduction, REDUCTIONS)
    if reduction.startswith("seq-"):
        need_sequences(op, f"reduction {reduction!r}", main, cu_seqlens)
        if reduction == "seq-mean-token-sum-norm" and cu_seqlens is not None and denom is None:
            raise ValueError(f"{op}: denom must be given with reduction {reduction!r} when packed")
    return code
