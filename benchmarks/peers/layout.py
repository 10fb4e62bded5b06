"""Layouts of a `gae` call's inputs for the peers: one sequence a row, or one flat batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.peers.base import Named
from ppo_fast.testing import Call


class SequenceRows:
    """Rewards and values `(B, T)`: as they are, a view of time-major ones, packed ones padded.

    Padding with zeros after a sequence's end leaves what comes before it as it is.
    """

    def __init__(self, call: Call) -> None:
        self._time_major = call.options.get("time_major", False)
        self._offsets = call.tensors.get("cu_seqlens")
        self.rewards, self.values = (self._rows(call.tensors[k]) for k in ("rewards", "values"))
        self.exists = self._rows(torch.ones_like(call.tensors["rewards"]))

    def _rows(self, x: Tensor) -> Tensor:
        if self._offsets is None:
            return x.T if self._time_major else x
        return pad_sequence(list(x.split(self._offsets.diff().tolist())), batch_first=True)

    def back(self, x: Tensor) -> Tensor:
        """A result in the call's own layout."""
        if self._offsets is None:
            return x.T if self._time_major else x
        return x[self.exists != 0]

    def named(self, *names: str) -> Callable[[Any], Named]:
        """Names for the members of a result tuple of rows."""
        return lambda out: {k: self.back(x) for k, x in zip(names, out, strict=True)}

    def last(self) -> Tensor:
        """Flags of the last step of a sequence, and of the padding after it."""
        after = torch.zeros_like(self.exists)
        after[:, :-1] = self.exists[:, 1:]
        return after == 0

    def next_values(self) -> Tensor:
        """The value after each step; 0 after the last."""
        return torch.cat([self.values[:, 1:], torch.zeros_like(self.values[:, :1])], 1)


class Flat(SequenceRows):
    """Every sequence after the other in one row `(1, N)`, with the ends flagged."""

    def __init__(self, call: Call) -> None:
        self._apart = SequenceRows(call)
        self._keep = self._apart.exists != 0
        self.rewards, self.values, self.exists = (
            self._joined(x) for x in (self._apart.rewards, self._apart.values, self._apart.exists)
        )

    def _joined(self, x: Tensor) -> Tensor:
        return x[self._keep][None]

    def back(self, x: Tensor) -> Tensor:
        out = x.new_zeros(self._keep.shape)
        out[self._keep] = x[0]
        return self._apart.back(out)

    def last(self) -> Tensor:
        return self._joined(self._apart.last())

    def next_values(self) -> Tensor:
        return self._joined(self._apart.next_values())
