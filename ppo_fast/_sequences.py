"""Sums and means over the sequences of a batch, and their way back to the tokens."""

from __future__ import annotations

import torch
from torch import Tensor


class Sequences:
    """Sequences of a call's slots: rows of `(B, T)`, or segments of `(N,)`; masked slots are out.

    `count` is S. Sums run in a fixed order on every device. Token values come in the slots' shape
    or flat.
    """

    def __init__(self, keep: Tensor, cu_seqlens: Tensor | None = None) -> None:
        self.keep, self.shape = keep, keep.shape
        self._offsets: Tensor | None = None
        if keep.dim() == 2:
            self.count = keep.shape[0]
        elif cu_seqlens is None:
            self.count = 1
        else:
            self.count = cu_seqlens.numel() - 1
            # Offsets are not checked on a GPU: none leads out of bounds.
            self._offsets = cu_seqlens.long().clamp(0, keep.shape[0])
            position = torch.arange(keep.shape[0], device=keep.device)
            last = self._offsets[1:].contiguous()
            self._index = torch.bucketize(position, last, right=True).clamp(max=self.count - 1)
        self._tokens: Tensor | None = None

    @property
    def tokens(self) -> Tensor:
        """Unmasked slots of each sequence, (S,) float64."""
        if self._tokens is None:
            self._tokens = self.sum(self.keep.double())
        return self._tokens

    def flat(self) -> Sequences:
        """The same sequences of flat slots, (B·T,)."""
        other = object.__new__(Sequences)
        other.__dict__.update(self.__dict__)
        other.shape = torch.Size((self.keep.numel(),))
        return other

    def sum(self, x: Tensor) -> Tensor:
        """Sum of `x` over each sequence, (S,)."""
        return self._reduce(self._kept(x, 0.0), "sum", 0.0)

    def mean(self, x: Tensor) -> Tensor:
        """Mean of `x` over each sequence, (S,); 0 where it is empty."""
        return self.sum(x) / self.tokens.clamp(min=1).to(x.dtype)

    def min(self, x: Tensor) -> Tensor:
        """Smallest `x` of each sequence, (S,); inf where it is empty."""
        return self._reduce(self._kept(x, float("inf")), "min", float("inf"))

    def max(self, x: Tensor) -> Tensor:
        """Largest `x` of each sequence, (S,); −inf where it is empty."""
        return -self.min(-x)

    def spread(self, per_sequence: Tensor) -> Tensor:
        """Each slot's own sequence's value, masked slots included."""
        if self._offsets is not None:
            return per_sequence[self._index]
        whole = per_sequence[:, None] if self.keep.dim() == 2 else per_sequence
        return whole.expand(self.keep.shape).reshape(self.shape)

    def _kept(self, x: Tensor, other: float) -> Tensor:
        return torch.where(self.keep, x.reshape(self.keep.shape), other)

    def _reduce(self, x: Tensor, how: str, empty: float) -> Tensor:
        if self._offsets is not None:
            return torch.segment_reduce(
                x, how, offsets=self._offsets, initial=empty, unsafe=True, axis=0
            )
        rows = x if x.dim() == 2 else x[None]
        if rows.shape[1] == 0:
            return rows.new_full((rows.shape[0],), empty)
        return rows.sum(1) if how == "sum" else rows.amin(1)
