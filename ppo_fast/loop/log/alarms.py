"""Alarms: signs of trouble in a run's log, in words, with what to try.

Pure functions of the history: a run says an alarm when it sets in, the report finds the same ones
in the log. Each rule looks at rolling means, so that one bad batch is none, and at nothing later
than the update it speaks of. An alarm that ends and comes back within `_QUIET` updates is one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ppo_fast.loop.log.history import Array, History

_WINDOW, _QUIET = 5, 10
# What counts as wrong. The bundled model's default runs reach a KL of 1 nat a token, clip 0.2 of
# the ratios and explain 0.2 to 0.4 of the returns after 40 updates.
_KL_TOKEN, _KL_FROM, _KL_TIMES = 2.0, 0.1, 3
_CLIP_FRAC = 0.5
_CRITIC_UPDATES, _CRITIC_WINDOW, _EXPLAINED = 40, 20, 0.01
_ENTROPY_LEFT = 0.1
_GAP = 0.05
_DROPPED = 0.25
# Sums and differences are of numbers this much smaller, so that they stay finite. It is a power of
# two, which changes no digit of what is larger than 1e-296.
_SCALE = 2.0**-40
_MAX = np.finfo(np.float64).max


class Alarm(NamedTuple):
    """An alarm: the update it set in at, its name, and a text with the number and advice."""

    update: int
    name: str
    text: str


class _Seen(NamedTuple):
    """A rule's result: `holds` (updates,) bool, and `says`, the text for update i."""

    holds: NDArray[np.bool_]
    says: Callable[[int], str]


def alarms(history: History) -> list[Alarm]:
    """Every alarm of a log, by update; each once, when it sets in."""
    found, updates = [], history.column("update")
    for name, rule in _RULES.items():
        holds, says = rule(history)
        for i in map(int, np.flatnonzero(holds)):
            if not holds[max(0, i - _QUIET) : i].any():
                found.append(Alarm(int(updates[i]), name, f"{name}: {says(i)}"))
    return sorted(found)


def by_name(found: list[Alarm]) -> dict[str, list[Alarm]]:
    """The alarms of each name, by update: those after the first are returns."""
    named: dict[str, list[Alarm]] = {}
    for alarm in found:
        named.setdefault(alarm.name, []).append(alarm)
    return named


def rolling(values: Array, n: int) -> Array:
    """Mean of the last `n` values, NaN left out; NaN until n values are there, or if all are."""
    mean = np.full(len(values), np.nan)
    if len(values) >= n:
        # No running sum: its rounding would set windows of equal numbers apart.
        windows = np.lib.stride_tricks.sliding_window_view(values, n)
        kept = np.isfinite(windows)
        count = kept.sum(1)
        total = np.where(kept, windows * _SCALE, 0.0).sum(1)
        np.divide(total, count, out=mean[n - 1 :], where=count > 0)
    return _bounded(lambda: mean / _SCALE)


def _bounded(formula: Callable[[], Array]) -> Array:
    """Result of a formula of finite numbers and NaN, clipped to the largest float."""
    with np.errstate(over="ignore"):
        return np.clip(formula(), -_MAX, _MAX)


def _ratio(above: Array, below: Array) -> Array:
    """Quotient of two columns; NaN where there is nothing to divide by."""
    some = np.where(below > 0, below, np.nan)
    return _bounded(lambda: above / some)


def _first(mean: Array) -> float:
    """The first number that is there; NaN if none is. At each update before it nothing is."""
    found = mean[np.isfinite(mean)]
    return float(found[0]) if len(found) else np.nan


def _lagged(values: Array, n: int) -> Array:
    return np.concatenate([np.full(min(n, len(values)), np.nan), values[:-n]])


def _kl(history: History) -> _Seen:
    tokens = _ratio(history.column("n_tokens"), history.column("n_seqs"))
    per_token = rolling(_ratio(history.column("kl"), tokens), _WINDOW)
    reward = rolling(history.column("reward"), _WINDOW)
    before, reward_before = _lagged(per_token, 10), _lagged(reward, 10)
    limit = _bounded(lambda: _KL_TIMES * before)
    rising = (before > _KL_FROM) & (per_token > limit) & (reward <= reward_before)

    def says(i: int) -> str:
        seen = f"{per_token[i]:.2f} nats a token from the reference"
        if per_token[i] <= _KL_TOKEN:
            seen += f", {before[i]:.2f} ten updates ago, and no more reward for it"
        return f"{seen}. Try a larger kl_coef, a kl_target, or a smaller lr"

    return _Seen((per_token > _KL_TOKEN) | rising, says)


def _ratios(history: History) -> _Seen:
    clipped = rolling(history.column("clip_frac"), _WINDOW)
    return _Seen(
        clipped > _CLIP_FRAC,
        lambda i: (
            f"{clipped[i]:.0%} of the tokens are clipped and give no gradient."
            " Try a smaller lr, fewer epochs or minibatches, or kl_stop"
        ),
    )


def _critic(history: History) -> _Seen:
    explained = rolling(history.column("explained_variance"), _CRITIC_WINDOW)
    explained[: _CRITIC_UPDATES - 1] = np.nan
    return _Seen(
        explained <= _EXPLAINED,
        lambda i: (
            f"explained variance {explained[i]:+.2f} over {_CRITIC_WINDOW} updates: no"
            " better than a constant. Try a larger vf_coef or vf_clip, or critic=separate"
        ),
    )


def _reward(history: History) -> _Seen:
    """Half of what was gained is lost again, and more than five standard errors of noise."""
    rewards = history.column("reward")
    mean = rolling(rewards, _WINDOW)
    best = np.fmax.accumulate(mean) if len(mean) else mean
    # Differences of neighbours: the noise of one batch, without the trend. Neighbours are those
    # that have a reward, however many updates without one lie between.
    known = np.isfinite(rewards)
    at = np.flatnonzero(known)
    steps = np.zeros(len(rewards))
    steps[at[1:]] = np.diff(rewards[at] * _SCALE)
    count = np.maximum(np.cumsum(known) - 1, 1)
    noise = np.hypot.accumulate(steps) / np.sqrt(2 * count)
    lost, gained = best * _SCALE - mean * _SCALE, best * _SCALE - _first(mean) * _SCALE
    return _Seen(
        (lost > 0.5 * gained) & (lost > 5 * noise * np.sqrt(2 / _WINDOW)),
        lambda i: (
            f"{mean[i]:+.3f} after a best of {best[i]:+.3f}."
            " Try a smaller lr, a larger kl_coef, or an earlier checkpoint"
        ),
    )


def _entropy(history: History) -> _Seen:
    entropy = rolling(history.column("entropy"), _WINDOW)
    start = _first(entropy)
    return _Seen(
        entropy < _ENTROPY_LEFT * start,
        lambda i: (
            f"{entropy[i]:.3f} nats a token, {start:.2f} at the start: the samples are"
            " all but the same. Try entropy_coef, a larger kl_coef, or a smaller lr"
        ),
    )


def _gap(history: History) -> _Seen:
    gap = rolling(history.column("rollout_gap_mean"), _WINDOW)
    return _Seen(
        gap > _GAP,
        lambda i: (
            f"rollout and training forward differ by {gap[i]:.3f} nats a token. Try the"
            " same dtype, temperature and weights in both, or importance weights"
        ),
    )


def _dropped(history: History) -> _Seen:
    share = rolling(_ratio(history.column("dropped"), history.column("batch")), _WINDOW)
    return _Seen(
        share > _DROPPED,
        lambda i: (
            f"{share[i]:.0%} of the samples have no reward."
            f" Mend the reward function; the last fault: {history.fault(i)}"
        ),
    )


def _not_finite(history: History) -> _Seen:
    """No rolling mean: these leave such a number out, and one alone is a fault."""
    lost = history.lost
    holds = np.zeros(len(history), dtype=bool)
    holds[list(lost)] = True
    return _Seen(
        holds,
        lambda i: f"{lost[i]}. Other alarms leave these out. Try a smaller lr, or a wider dtype",
    )


_RULES: dict[str, Callable[[History], _Seen]] = {
    "KL runs away": _kl,
    "ratios saturate": _ratios,
    "critic explains nothing": _critic,
    "reward collapses": _reward,
    "entropy collapses": _entropy,
    "rollout gap": _gap,
    "samples dropped": _dropped,
    "numbers not finite": _not_finite,
}
