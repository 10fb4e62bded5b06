"""Arguments of the kernel ops that travel together, with a name for each.

A number that may live on the device has two fields: `<name>`, and `<name>_tensor`, which replaces
it where given and is never read by the host.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from ppo_fast._boundary.schema import REDUCTIONS
from ppo_fast.corrections import FORMS, LEVELS, OPEN, RANGES, Correction

_TOKEN_SUM = REDUCTIONS.index("token-sum")

# Order of the losses' numbers in `codes` and `params`, and their type; `emit.py` writes it for C++
# and Triton.
PACKED = {
    "PolicyCodes": (
        (
            "variant",
            "estimator",
            "straight_through",
            "reduction",
            "kl_weight",
            "by_sequence",
            "n_grads",
        ),
        "int",
    ),
    "PolicyParams": (
        (
            "clip_low",
            "clip_high",
            "dual_clip",
            "log_ratio_min",
            "log_ratio_max",
            "entropy_coef",
            "kl_coef",
            "kl_clamp",
            "kl_ratio_clip",
            "denom",
        ),
        "float",
    ),
    "ValueCodes": (("form", "reduction", "n_grads"), "int"),
    "ValueParams": (("clip", "scale", "denom"), "float"),
}


class PolicyOptions(NamedTuple):
    """Options of a policy loss: codes of `schema.py`, bounds that are inf where absent.

    `log_ratio_min` is -inf where absent; `denom` 0 stands for the reduction's own.
    """

    variant: int
    estimator: int
    straight_through: int  # 1: the KL term keeps its value and takes k2's gradient
    reduction: int
    kl_weight: int
    by_sequence: int  # 1: "given" takes the sequence's ratio, as gspo always does
    clip_low: float
    clip_high: float
    dual_clip: float
    log_ratio_min: float
    log_ratio_max: float
    entropy_coef: float
    kl_coef: float
    kl_clamp: float
    kl_ratio_clip: float
    denom: float
    entropy_coef_tensor: Tensor | None
    kl_coef_tensor: Tensor | None
    denom_tensor: Tensor | None

    def per_token(self) -> PolicyOptions:
        """The loss of every token for itself, undivided: what its slopes are taken from."""
        return self._replace(reduction=_TOKEN_SUM, denom=0.0, denom_tensor=None)

    def codes(self, n_grads: int) -> list[int]:
        """PolicyCodes of `PACKED`."""
        return [
            self.variant,
            self.estimator,
            self.straight_through,
            self.reduction,
            self.kl_weight,
            self.by_sequence,
            n_grads,
        ]

    def params(self) -> list[float]:
        """PolicyParams of `PACKED`."""
        return [
            self.clip_low,
            self.clip_high,
            self.dual_clip,
            self.log_ratio_min,
            self.log_ratio_max,
            self.entropy_coef,
            self.kl_coef,
            self.kl_clamp,
            self.kl_ratio_clip,
            self.denom,
        ]


def policy_options(
    *,
    variant: int,
    estimator: int,
    straight_through: int,
    reduction: int,
    kl_weight: int,
    by_sequence: int,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    log_ratio_min: float,
    log_ratio_max: float,
    entropy_coef: float,
    kl_coef: float,
    kl_clamp: float,
    kl_ratio_clip: float,
    denom: float,
    entropy_coef_tensor: Tensor | None,
    kl_coef_tensor: Tensor | None,
    denom_tensor: Tensor | None,
) -> PolicyOptions:
    """The tuple, by keyword: its own constructor takes three times as long with keywords."""
    return PolicyOptions(
        variant,
        estimator,
        straight_through,
        reduction,
        kl_weight,
        by_sequence,
        clip_low,
        clip_high,
        dual_clip,
        log_ratio_min,
        log_ratio_max,
        entropy_coef,
        kl_coef,
        kl_clamp,
        kl_ratio_clip,
        denom,
        entropy_coef_tensor,
        kl_coef_tensor,
        denom_tensor,
    )


class ValueOptions(NamedTuple):
    """Options of the value loss; `denom` 0 stands for the reduction's own."""

    form: int
    reduction: int
    clip: float
    scale: float
    denom: float
    denom_tensor: Tensor | None

    def codes(self, n_grads: int) -> list[int]:
        """ValueCodes of `PACKED`."""
        return [self.form, self.reduction, n_grads]

    def params(self) -> list[float]:
        """ValueParams of `PACKED`."""
        return [self.clip, self.scale, self.denom]


def value_options(
    *,
    form: int,
    reduction: int,
    clip: float,
    scale: float,
    denom: float,
    denom_tensor: Tensor | None,
) -> ValueOptions:
    """The tuple, by keyword, as `policy_options`."""
    return ValueOptions(form, reduction, clip, scale, denom, denom_tensor)


class TokenTensors(NamedTuple):
    """Per-token constants of a policy loss, each in the log-probabilities' shape.

    `moments`, (3,) float64, whiten the advantages. The last two are not the kernels':
    `accepted` is False where a rejection has dropped the policy term.
    """

    old_logprobs: Tensor | None
    advantages: Tensor
    is_weights: Tensor | None
    ref_logprobs: Tensor | None
    moments: Tensor | None
    rollout_logprobs: Tensor | None = None
    accepted: Tensor | None = None


class Scoring(NamedTuple):
    """Tokens to score with the softmax of their rows of logits; masked and ignored rows give 0."""

    tokens: Tensor
    mask: Tensor | None
    temperature_tensor: Tensor | None  # per token
    temperature: float
    ignore_index: int

    def divisor(self) -> float | Tensor:
        """The temperature: the tensor where given, else the number."""
        return self.temperature if self.temperature_tensor is None else self.temperature_tensor


class Softmax(NamedTuple):
    """Log-probability, entropy and softmax state of every row, in the tokens' shape."""

    logprobs: Tensor
    entropy: Tensor
    row_max: Tensor
    log_sum: Tensor


class RowStats(NamedTuple):
    """A row's `Softmax`, ln Σ e^2(z − row_max), the mean of z, and the largest logit's column."""

    logprobs: Tensor
    entropy: Tensor
    row_max: Tensor
    log_sum: Tensor
    log_sum_sq: Tensor
    mean_logit: Tensor
    top: Tensor  # int64


class Teaching(NamedTuple):
    """A teacher's rows of logits, the state of their softmax, and the divergence from it."""

    logits: Tensor
    row_max: Tensor
    log_sum: Tensor
    temperature_tensor: Tensor | None  # per token
    temperature: float
    kind: int
    beta: float


class Pairs(NamedTuple):
    """(row, id) pairs of N rows, row after row; a row's first is its token.

    ids (M,) int32, -1 where absent; offsets (N + 1,) int64 are the rows' ends; mask (N,) bool.
    """

    ids: Tensor
    offsets: Tensor
    mask: Tensor


class Lambda(NamedTuple):
    """One λ: a number, or a tensor of the rewards' shape ((S,) when packed and per sequence)."""

    number: float
    tensor: Tensor | None
    per_step: bool


def rollout_options(
    correction: Correction | None,
) -> tuple[int, int, float, float, list[float]]:
    """Level, form, low, high and windows of `rollout_weights`; open without a correction."""
    if correction is None:
        return LEVELS.index(None), FORMS.index("truncate"), 0.0, math.inf, list(OPEN) * len(RANGES)
    level, form = LEVELS.index(correction.level), FORMS.index(correction.form)
    windows = [bound for window in correction.windows() for bound in window]
    return level, form, *correction.bounds(), windows
