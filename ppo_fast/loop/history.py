"""What alarms, plot and outcome need of every update, in eight bytes a number.

A whole record is some two thousand bytes; it is in the log on the disk, and memory does not grow
by it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Record = dict[str, Any]
NUMBERS = (
    "update", "reward", "kl", "batch", "n_tokens", "n_seqs", "clip_frac", "explained_variance",
    "entropy", "rollout_gap_mean",
)  # fmt: skip


class History:
    """The `NUMBERS` of a run's records, with how many samples each dropped and the last fault."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._columns = {name: array("d") for name in (*NUMBERS, "dropped")}
        self._faults: dict[int, str] = {}
        for record in records:
            self.append(record)

    def __len__(self) -> int:
        return len(self._columns["update"])

    def append(self, record: Record) -> None:
        """Add a record; a number that it lacks, or has as None, is NaN."""
        faults = [str(fault) for fault in record.get("dropped", {}).values()]
        if faults:
            self._faults[len(self)] = faults[-1]
        for name in NUMBERS:
            value = record.get(name)
            self._columns[name].append(np.nan if value is None else float(value))
        self._columns["dropped"].append(len(faults))

    def column(self, name: str) -> Array:
        """One of `NUMBERS`, or "dropped", of every update, (updates,): a copy."""
        return np.array(self._columns[name])

    def fault(self, i: int) -> str:
        """The last fault of the i-th update or of those before; there must be one."""
        return self._faults[max(k for k in self._faults if k <= i)]
