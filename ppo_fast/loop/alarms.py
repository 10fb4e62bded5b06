"""What looks wrong in a run's log, in words, with what to try.

Pure functions of the records: a run says an alarm when it sets in, the report finds the same ones
in the log. Each rule looks at rolling means, so that one bad batch is none, and at nothing later
than the update it speaks of. An alarm that ends and comes back within `_QUIET` updates is one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Record = dict[str, Any]
_WINDOW, _QUIET = 5, 10
# What counts as wrong. The bundled model's default runs reach a KL of 1 nat a token, clip 0.2 of
# the ratios and explain 0.2 to 0.4 of the returns after 40 updates.
_KL_TOKEN, _KL_FROM, _KL_TIMES = 2.0, 0.1, 3
_CLIP_FRAC = 0.5
_CRITIC_UPDATES, _CRITIC_WINDOW, _EXPLAINED = 40, 20, 0.01
_ENTROPY_LEFT = 0.1
_GAP = 0.05
_DROPPED = 0.25


class Alarm(NamedTuple):
    """What set in at which update, the number that was seen and what to try."""

    update: int
    name: str
    text: str


class _Seen(NamedTuple):
    """Where a rule holds, (updates,) bool, and what it says of update i."""

    holds: NDArray[np.bool_]
    says: Callable[[int], str]


def alarms(records: Sequence[Record]) -> list[Alarm]:
    """Every alarm of a log, by update; each once, when it sets in."""
    found = []
    for name, rule in _RULES.items():
        holds, says = rule(records)
        for i in map(int, np.flatnonzero(holds)):
            if not holds[max(0, i - _QUIET) : i].any():
                found.append(Alarm(records[i]["update"], name, f"{name}: {says(i)}"))
    return sorted(found)


def column(records: Sequence[Record], name: str) -> Array:
    """One number of every record, (updates,), NaN where there is none."""
    values = (r.get(name) for r in records)
    return np.array([np.nan if v is None else float(v) for v in values])


def rolling(values: Array, n: int) -> Array:
    """Mean of the last `n` values, NaN left out; NaN until n values are there, or if all are."""
    mean = np.full(len(values), np.nan)
    if len(values) >= n:
        # No running sum: its rounding would set windows of equal numbers apart.
        windows = np.lib.stride_tricks.sliding_window_view(values, n)
        kept = np.isfinite(windows)
        count = kept.sum(1)
        total = np.where(kept, windows, 0.0).sum(1)
        np.divide(total, count, out=mean[n - 1 :], where=count > 0)
    return mean


def _lagged(values: Array, n: int) -> Array:
    return np.concatenate([np.full(min(n, len(values)), np.nan), values[:-n]])


def _kl(records: Sequence[Record]) -> _Seen:
    tokens = column(records, "n_tokens") / column(records, "n_seqs")
    per_token = rolling(column(records, "kl") / tokens, _WINDOW)
    reward = rolling(column(records, "reward"), _WINDOW)
    before, reward_before = _lagged(per_token, 10), _lagged(reward, 10)
    rising = (before > _KL_FROM) & (per_token > _KL_TIMES * before) & (reward <= reward_before)

    def says(i: int) -> str:
        seen = f"{per_token[i]:.2f} nats a token from the reference"
        if per_token[i] <= _KL_TOKEN:
            seen += f", {before[i]:.2f} ten updates ago, and no more reward for it"
        return f"{seen}. Try a larger kl_coef, a kl_target, or a smaller lr"

    return _Seen((per_token > _KL_TOKEN) | rising, says)


def _ratios(records: Sequence[Record]) -> _Seen:
    clipped = rolling(column(records, "clip_frac"), _WINDOW)
    return _Seen(
        clipped > _CLIP_FRAC,
        lambda i: (
            f"{clipped[i]:.0%} of the tokens are clipped and give no gradient."
            " Try a smaller lr, fewer epochs or minibatches, or kl_stop"
        ),
    )


def _critic(records: Sequence[Record]) -> _Seen:
    explained = rolling(column(records, "explained_variance"), _CRITIC_WINDOW)
    explained[: _CRITIC_UPDATES - 1] = np.nan
    return _Seen(
        explained <= _EXPLAINED,
        lambda i: (
            f"explained variance {explained[i]:+.2f} over {_CRITIC_WINDOW} updates: no"
            " better than a constant. Try a larger vf_coef or vf_clip, or critic=separate"
        ),
    )


def _reward(records: Sequence[Record]) -> _Seen:
    """Half of what was gained is lost again, and more than five standard errors of noise."""
    rewards = column(records, "reward")
    mean = rolling(rewards, _WINDOW)
    start = mean[_WINDOW - 1] if len(mean) >= _WINDOW else np.nan
    best = np.fmax.accumulate(mean) if len(mean) else mean
    squares = np.concatenate([[0.0], np.diff(rewards) ** 2])[: len(rewards)]
    kept = np.isfinite(squares)
    count = np.maximum(np.cumsum(kept) - 1, 1)
    # Differences of neighbours: the noise of one batch, without the trend.
    noise = np.sqrt(np.cumsum(np.where(kept, squares, 0.0)) / count / 2)
    lost = best - mean
    return _Seen(
        (lost > 0.5 * (best - start)) & (lost > 5 * noise * np.sqrt(2 / _WINDOW)),
        lambda i: (
            f"{mean[i]:+.3f} after a best of {best[i]:+.3f}."
            " Try a smaller lr, a larger kl_coef, or an earlier checkpoint"
        ),
    )


def _entropy(records: Sequence[Record]) -> _Seen:
    entropy = rolling(column(records, "entropy"), _WINDOW)
    start = entropy[_WINDOW - 1] if len(entropy) >= _WINDOW else np.nan
    return _Seen(
        entropy < _ENTROPY_LEFT * start,
        lambda i: (
            f"{entropy[i]:.3f} nats a token, {start:.2f} at the start: the samples are"
            " all but the same. Try entropy_coef, a larger kl_coef, or a smaller lr"
        ),
    )


def _gap(records: Sequence[Record]) -> _Seen:
    gap = rolling(column(records, "rollout_gap_mean"), _WINDOW)
    return _Seen(
        gap > _GAP,
        lambda i: (
            f"rollout and training forward differ by {gap[i]:.3f} nats a token. Try the"
            " same dtype, temperature and weights in both, or importance weights"
        ),
    )


def _dropped(records: Sequence[Record]) -> _Seen:
    counts = np.array([float(len(r.get("dropped", {}))) for r in records])
    share = rolling(counts / column(records, "batch"), _WINDOW)
    return _Seen(
        share > _DROPPED,
        lambda i: (
            f"{share[i]:.0%} of the samples have no reward."
            f" Mend the reward function; the last fault: {_last_fault(records[: i + 1])}"
        ),
    )


def _last_fault(records: Sequence[Record]) -> str:
    return next(str(f) for r in reversed(records) for f in reversed(r["dropped"].values()))


_RULES: dict[str, Callable[[Sequence[Record]], _Seen]] = {
    "KL runs away": _kl,
    "ratios saturate": _ratios,
    "critic explains nothing": _critic,
    "reward collapses": _reward,
    "entropy collapses": _entropy,
    "rollout gap": _gap,
    "samples dropped": _dropped,
}
