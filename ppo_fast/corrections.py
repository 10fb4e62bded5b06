"""`Correction`: weights and rejections of tokens that another policy sampled.

A sampler (an engine in bf16, a stale copy, quantised weights) does not sample from the policy
that scores the tokens. Everything here is a function of x = old_logprobs − rollout_logprobs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

LEVELS = (None, "token", "sequence", "geometric")
FORMS = ("truncate", "mask")
RATIOS = ("old", "current")
DROPS = ("policy", "all")
COUNTS = ("all", "kept")
# A rejection's key is "<range>-<statistic>".
RANGES = ("token", "seq-sum", "seq-mean", "seq-min", "seq-max")
STATISTICS = ("ratio", "k1", "k2", "k3")

# Largest |x| that is exponentiated: e^20 is 4.9e8.
MAX_LOG_RATIO = 20.0

Bound = float | tuple[float, float]
Reject = Mapping[str, Bound] | tuple[tuple[str, Bound], ...]
# A range's bounds: lowest and highest x, highest k2, highest k3.
Window = tuple[float, float, float, float]
OPEN: Window = (-math.inf, math.inf, math.inf, math.inf)


@dataclass(frozen=True)
class Correction:
    """Weights and rejections of tokens that another policy sampled; x = old − rollout logprobs.

    Args:
        level: the weight is e^x of the "token", e^Σx of the "sequence", e^mean x ("geometric"), or
            1 (None: rejections alone). x is clamped to ±20 before it is exponentiated.
        form: "truncate" clamps the weight to [low, high] (Espeholt et al. 2018; Yao et al. 2025);
            "mask" makes it 0 outside of them (IcePop, Ring-1T 2025).
        low, high: bounds of the weight, open where None; one is needed unless `level` is None.
        ratio: "old" takes x from `old_logprobs`, "current" from the current log-probabilities,
            detached. A loss without `old_logprobs` takes the current ones.
        reject: statistic → bound; a token is kept where all of them hold. Keys are
            {token, seq-sum, seq-mean, seq-min, seq-max}-{ratio, k1, k2, k3}. "ratio" keeps
            low ≤ e^x ≤ high, a pair; "k1" keeps log low ≤ −x ≤ log high, a pair, or one number c
            for (1/c, c); "k2" (x²/2) and "k3" (e^x − 1 − x) have an upper bound. Sums, means and
            extremes are those of a sequence's unmasked tokens, each x clamped to ±20.
        drops: a rejected token leaves the "policy" term (TRL, OpenRLHF, verl's bypass mode), or
            "all" terms as a masked one does (verl's decoupled mode).
        count: the loss's divisor and |y| count "all" tokens of the mask given, or those "kept".

    Raises:
        ValueError: a name, key or bound that does not fit.
    """

    level: str | None
    form: str = "truncate"
    low: float | None = None
    high: float | None = None
    _: KW_ONLY
    ratio: str = "old"
    reject: Reject = ()
    drops: str = "policy"
    count: str = "all"
    _windows: tuple[Window, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                allowed = ", ".join(str(c) for c in choices)
                raise ValueError(f"Correction: {name} must be one of {allowed}, got {value!r}")
        low, high = self.bounds()
        if self.level is not None and self.low is None and self.high is None:
            raise ValueError(
                f"Correction: low or high must be given with level {self.level!r}, got None"
            )
        if self.level is None and (self.low is not None or self.high is not None):
            raise ValueError(
                f"Correction: low and high must be None with level None, got"
                f" {self.low!r}, {self.high!r}"
            )
        if not 0.0 <= low <= high:
            raise ValueError(f"Correction: low and high must be 0 <= low <= high, got {low, high}")
        given = _pairs(self.reject)
        if self.level is None and not given:
            raise ValueError("Correction: reject must be given with level None, got nothing")
        object.__setattr__(self, "reject", given)
        object.__setattr__(self, "_windows", _windows(given))

    def bounds(self) -> tuple[float, float]:
        """The weight's bounds, 0 and inf where open."""
        low = 0.0 if self.low is None else _number("low", self.low)
        return low, math.inf if self.high is None else _number("high", self.high)

    def windows(self) -> tuple[Window, ...]:
        """Bounds of a token's and a sequence's statistics, one window for each of `RANGES`."""
        return self._windows

    def needs_sequences(self) -> bool:
        """True if a token's weight or rejection depends on its sequence's other tokens."""
        bounded = any(window != OPEN for window in self._windows[1:])
        return self.level in ("sequence", "geometric") or bounded


_CHOICES: dict[str, tuple[Any, ...]] = {
    "level": LEVELS,
    "form": FORMS,
    "ratio": RATIOS,
    "drops": DROPS,
    "count": COUNTS,
}


def _pairs(reject: Any) -> tuple[tuple[str, Bound], ...]:
    """Sorted and hashable pairs of a mapping, or of such pairs."""
    try:
        given = {str(key): bound for key, bound in dict(reject).items()}
    except (TypeError, ValueError):
        raise ValueError(
            f"Correction: reject must be a mapping of statistics to bounds, got {reject!r}"
        ) from None
    whole = ((k, tuple(b) if isinstance(b, list) else b) for k, b in given.items())
    return tuple(sorted(whole, key=lambda pair: pair[0]))


def _windows(reject: tuple[tuple[str, Bound], ...]) -> tuple[Window, ...]:
    """Windows of a sorted `reject`.

    The largest of −x is minus the smallest x: "seq-max-k1" bounds `seq-min`'s x, and the other
    way round.
    """
    found = {name: list(OPEN) for name in RANGES}
    for key, bound in reject:
        where, _, what = key.rpartition("-")
        if where not in RANGES or what not in STATISTICS:
            raise ValueError(
                f"Correction: reject's keys must be <{'|'.join(RANGES)}>-"
                f"<{'|'.join(STATISTICS)}>, got {key!r}"
            )
        if what in ("k2", "k3"):
            upper = STATISTICS.index(what)
            found[where][upper] = min(found[where][upper], _upper(key, bound))
            continue
        low, high = _pair(key, bound, reciprocal=what == "k1")
        if what == "k1":
            low, high = -high, -low
            where = {"seq-min": "seq-max", "seq-max": "seq-min"}.get(where, where)
        window = found[where]
        window[0], window[1] = max(window[0], low), min(window[1], high)
    return tuple((a, b, c, d) for a, b, c, d in found.values())


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise ValueError(f"Correction: {name} must be a number, got {value!r}")
    return float(value)


def _upper(key: str, bound: Any) -> float:
    number = _number(f"reject[{key!r}]", bound)
    if number < 0.0:
        raise ValueError(f"Correction: reject[{key!r}] must be at least 0, got {bound!r}")
    return number


def _pair(key: str, bound: Any, *, reciprocal: bool) -> tuple[float, float]:
    """Logarithms of (low, high); one number c is (1/c, c) where `reciprocal`."""
    name = f"reject[{key!r}]"
    if reciprocal and not isinstance(bound, tuple):
        c = _number(name, bound)
        if c < 1.0:
            raise ValueError(
                f"Correction: {name} must be at least 1 or (low, high), got {bound!r}"
            )
        return -math.log(c), math.log(c)
    if not isinstance(bound, tuple) or len(bound) != 2:
        raise ValueError(f"Correction: {name} must be (low, high), got {bound!r}")
    low, high = (_number(name, x) for x in bound)
    if not 0.0 <= low <= high or high == 0.0:
        raise ValueError(f"Correction: {name} must be 0 <= low <= high > 0, got {bound!r}")
    return math.log(low) if low > 0.0 else -math.inf, math.log(high)
