"""History of a run: the numbers of every update that alarms, plot and outcome need.

Eight bytes a number: a whole record, of some two thousand bytes, stays in the log on the disk.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ppo_fast.loop.log import fields
from ppo_fast.loop.log.fields import Record

__all__ = ["NUMBERS", "Array", "History", "Record", "mean"]

Array = NDArray[np.float64]
NUMBERS = (
    "update",
    "reward",
    "kl",
    "batch",
    "n_tokens",
    "n_seqs",
    "clip_frac",
    "explained_variance",
    "entropy",
    "divergence",
    "rollout_gap_mean",
    "response_length",
    "eval_reward",
    "eval_best",
)
# Not finite in runs that go well, too: no sample of a batch has a reward; all returns are equal.
_MAY_LACK = ("reward", "explained_variance", "eval_reward", "eval_best")


def with_baseline(record: Record) -> Record:
    """The record, with the evaluation before the first update where it has none after it."""
    before = {
        name: record[f"{name}_before"]
        for name in ("eval_reward", "eval_best")
        if f"{name}_before" in record
    }
    return before | record


class History:
    """The `NUMBERS` of a run's records, with how many samples each dropped and the last fault."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._columns = {name: array("d") for name in (*NUMBERS, "dropped")}
        self._faults: dict[int, str] = {}
        self._lost: dict[int, str] = {}
        for record in records:
            self.append(record)

    def __len__(self) -> int:
        return len(self._columns["update"])

    def append(self, record: Record) -> None:
        """Add a record; a number that it lacks, or has as None or not finite, is NaN.

        Raises `FieldError`, and adds nothing, where something else stands for a number.
        """
        record = with_baseline(record)
        numbers = {name: fields.number(record, name) for name in NUMBERS}
        faults = list(fields.texts(record, "dropped").values())
        lost = [
            name
            for name, value in numbers.items()
            if name in record and name not in _MAY_LACK and math.isnan(value)
        ]
        if faults:
            self._faults[len(self)] = faults[-1]
        if lost:
            self._lost[len(self)] = ", ".join(lost)
        for name, value in (numbers | {"dropped": float(len(faults))}).items():
            self._columns[name].append(value)

    def column(self, name: str) -> Array:
        """One of `NUMBERS`, or "dropped", of every update, (updates,): a copy."""
        return np.array(self._columns[name])

    def fault(self, i: int) -> str:
        """The last fault of the i-th update or of those before; there must be one."""
        return self._faults[max(k for k in self._faults if k <= i)]

    @property
    def lost(self) -> dict[int, str]:
        """The numbers that an update has, but not as finite ones, by its place; a copy."""
        return dict(self._lost)


def mean(values: Iterable[float]) -> float:
    """Mean of the finite values, NaN if there are none. No sum of theirs overflows."""
    kept = [value for value in values if math.isfinite(value)]
    if not kept:
        return math.nan
    total = sum(kept)
    if math.isfinite(total):
        return total / len(kept)
    # A power of two, which rounds nothing that matters beside numbers this large.
    found = math.fsum(math.ldexp(value, -64) for value in kept) / len(kept)
    return min(max(math.ldexp(found, 64), min(kept)), max(kept))


def fifths(rewards: list[float]) -> tuple[float, float]:
    """Mean reward of the first and of the last fifth of the updates, skipped ones left out."""
    n = max(1, len(rewards) // 5)
    return mean(rewards[:n]), mean(rewards[-n:])
