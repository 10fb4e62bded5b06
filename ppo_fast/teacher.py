"""`Teacher`: the other head of a divergence, a model whose distribution is to be learnt from."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any

from torch import Tensor

KINDS = ("reverse", "forward", "jsd", "mixed")


@dataclass(frozen=True, eq=False)
class Teacher:
    """A linear head whose distribution a student's is compared with, a constant in every way.

    With s the student's distribution of a token and t the teacher's, in nats: "reverse" is
    KL(s‖t) = Σ s·ln(s/t); "forward" KL(t‖s); "jsd" the generalised Jensen-Shannon divergence
    β·KL(t‖m) + (1 − β)·KL(s‖m) with m = (1 − β)s + βt (GKD, Agarwal et al. 2024, as TRL has it);
    "mixed" β·reverse + (1 − β)·forward. There is no factor τ².

    Args:
        hidden: `(..., H)` of the student's tokens; H may differ from the student's.
        weight: `(V, H)` of the same dtype; V is the student's, and so are the meanings of the ids.
        kind: "reverse", "forward", "jsd" or "mixed"; there is no default.
        beta: β of the last two, in (0, 1) for "jsd", in [0, 1] for "mixed".
        coef: what the divergence is multiplied by in a loss, a number or a 0-d tensor that stays
            on the device.
        bias: `(V,)`.
        softcap, logit_scale: z = cap·tanh(logit_scale·(hidden·weightᵀ + bias) / cap), as in TRL.
        temperature: the teacher's; None takes the student's.

    Raises:
        ValueError: a kind or beta that does not fit. Shapes, devices and dtypes are checked where
        the teacher is used, beside the student's.
    """

    hidden: Tensor
    weight: Tensor
    _: KW_ONLY
    kind: str
    beta: float = 0.5
    coef: float | Tensor = 1.0
    bias: Tensor | None = None
    softcap: float | None = None
    temperature: float | Tensor | None = None
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        check_kind("Teacher", self.kind, self.beta)

    def __repr__(self) -> str:
        shapes = f"hidden {_shape(self.hidden)}, weight {_shape(self.weight)}"
        return f"Teacher({shapes}, kind={self.kind!r}, beta={self.beta!r}, coef={self.coef!r})"


def _shape(x: Any) -> tuple[int, ...] | str:
    return tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__


def check_kind(op: str, kind: Any, beta: Any) -> tuple[str, float]:
    """The kind whose terms are formed and its β, or ValueError or TypeError."""
    if kind not in KINDS:
        raise ValueError(f"{op}: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if isinstance(beta, bool) or not isinstance(beta, (int, float)):
        raise TypeError(f"{op}: beta must be a number, got {type(beta).__name__}")
    if not 0.0 <= beta <= 1.0 or math.isnan(beta):
        raise ValueError(f"{op}: beta must be in [0, 1], got {beta}")
    if kind == "jsd" and beta in (0, 1):
        raise ValueError(f"{op}: beta must be in (0, 1) with kind 'jsd', got {beta}")
    if kind == "mixed" and beta in (0, 1):
        return ("forward", "reverse")[int(beta)], float(beta)  # 0·inf has no place in a sum
    return kind, float(beta)
