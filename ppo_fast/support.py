"""`Support`: the token ids that a sampler kept at every position (top-k, top-p, min-p).

Truncated sampling draws from the softmax over a subset of the vocabulary. A log-probability over
the whole vocabulary is not that of the sample: it is lower by the logarithm of the kept mass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Sparse is chosen where pairs · this < rows · V: V over the kept ids of a row at which products
# with these rows of the weight alone cost as much as the dense way over a support. Measured on a
# CPU (benchmarks/README.md), computed from bytes for a GPU.
BREAK_EVEN = {"cpu": 8, "cuda": 192}
ABSENT = -1
_INTEGERS = (torch.int64, torch.int32)
_LARGEST = (1 << 31) - 1  # ids are kept as int32; a larger one is wrong in every vocabulary


class Support:
    """Kept token ids of N rows, the rows of an op's tokens in row-major order, masked ones too.

    Ops given one take log-probability, entropy and gradient over each row's kept ids, after
    bias, softcap and temperature. A row with nothing kept takes the whole vocabulary (`whole`
    says which do). A row's own token is always in (`missed` says where it was not). An id counts
    as often as it stands in its row. An id outside of the vocabulary makes its row NaN.

    It is made outside of the loss, and looks at the ids on the host once. The head multiplies the
    kept rows of the weight alone where that is less work than the whole vocabulary's products.
    Which it is, is decided from the counts of the support that was made first, for all that
    `rows` takes from it: scoring and update take the same way, to the bit.

    Args:
        ids: `(M,)` int32 or int64 with `offsets`, one row after the other, as vLLM's sampling
            masks and slime have them; without, `(..., K)`, the same number in every row.
            -1 is no id.
        offsets: `(N + 1,)` int64 or int32: row r has `ids[offsets[r]:offsets[r + 1]]`.
        sparse: True or False instead of that decision.

    Raises:
        ValueError: shape, device, offsets that do not rise from 0 to M. TypeError: dtype.
    """

    def __init__(
        self, ids: Tensor, offsets: Tensor | None = None, *, sparse: bool | None = None
    ) -> None:
        if sparse is not None and not isinstance(sparse, bool):
            raise TypeError(f"Support: sparse must be True, False or None, got {sparse!r}")
        ids, offsets = _checked(ids, offsets)
        present = ids != ABSENT
        if not bool(present.all()):
            before = torch.cat([offsets.new_zeros(1), present.cumsum(0)])
            ids, offsets = ids[present], before[offsets]
        self.ids = ids.clamp(ABSENT - 1, _LARGEST).int()
        self.offsets = offsets
        self.ends = offsets.cpu()  # the offsets on the host
        self.sparse = sparse
        # The counts that decide, of this support's rows and of all that are taken from it.
        self._counted = int(self.ends[-1]), int((self.ends.diff() > 0).sum())
        self._find_whole()

    def _find_whole(self) -> None:
        at = (self.ends.diff() == 0).nonzero()[:, 0]
        self.n_whole = at.numel()
        self.whole_index = at.to(self.ids.device)

    @property
    def n_rows(self) -> int:
        """The number of rows, N."""
        return self.ends.numel() - 1

    @property
    def counts(self) -> Tensor:
        """Kept ids of every row, (N,) int64."""
        return self.offsets.diff()

    @property
    def whole(self) -> Tensor:
        """True for rows with nothing kept, which take the whole vocabulary, (N,) bool."""
        return self.counts == 0

    def missed(self, tokens: Tensor) -> Tensor:
        """True for rows that keep ids but not their token, in the shape of `tokens`, N in all."""
        flat = tokens.reshape(-1)
        found = (self.ids == flat[self.row_of_pairs()]).cumsum(0)
        before = torch.cat([found.new_zeros(1), found])
        missing = (before[self.offsets].diff() == 0) & ~self.whole
        return missing.view(tokens.shape)

    def rows(self, index: Tensor) -> Support:
        """The support of the rows `index`, (R,) int64, in that order, decided as this one was."""
        index = index.to(self.ids.device)
        on_host = index.cpu()
        counts = self.ends.diff()[on_host]
        ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        total = int(ends[-1])
        offsets = ends.to(self.ids.device)
        shift = (self.offsets[:-1][index] - offsets[:-1]).repeat_interleave(
            offsets.diff(), output_size=total
        )
        places = torch.arange(total, device=self.ids.device) + shift
        part = object.__new__(Support)
        part.ids, part.offsets, part.ends = self.ids[places], offsets, ends
        part.sparse, part._counted = self.sparse, self._counted
        part._find_whole()
        return part

    def to(self, device: torch.device | str) -> Support:
        """The same support on a device."""
        moved = object.__new__(Support)
        moved.ids, moved.offsets = self.ids.to(device), self.offsets.to(device)
        moved.ends, moved.sparse, moved._counted = self.ends, self.sparse, self._counted
        moved.n_whole, moved.whole_index = self.n_whole, self.whole_index.to(device)
        return moved

    def row_of_pairs(self) -> Tensor:
        """The row of every id, (M,) int32."""
        each = torch.arange(self.n_rows, dtype=torch.int32, device=self.ids.device)
        return each.repeat_interleave(self.counts, output_size=self.ids.numel())

    def is_sparse(self, vocab: int) -> bool:
        """True where the head multiplies the kept rows of its weight alone, of `vocab` in all."""
        if self.sparse is not None:
            return self.sparse
        pairs, rows = self._counted
        kind = "cpu" if self.ids.device.type == "cpu" else "cuda"
        return pairs * BREAK_EVEN[kind] < rows * vocab

    def __repr__(self) -> str:
        return f"Support({self.n_rows} rows, {self.ids.numel()} ids, sparse={self.sparse})"


def _checked(ids: Any, offsets: Any) -> tuple[Tensor, Tensor]:
    """Flat ids and int64 offsets, or ValueError or TypeError."""
    for name, x in (("ids", ids), ("offsets", offsets)):
        if name == "offsets" and x is None:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"Support: {name} must be a tensor, got {type(x).__name__}")
        if x.dtype not in _INTEGERS:
            raise TypeError(f"Support: {name} must be int64 or int32, got {x.dtype}")
    if offsets is None:
        if ids.dim() < 2:
            raise ValueError(
                f"Support: ids must have shape (..., K) without offsets, got {tuple(ids.shape)}"
            )
        n, k = ids.shape[:-1].numel(), ids.shape[-1]
        return ids.reshape(-1), torch.arange(n + 1, device=ids.device) * k
    if ids.dim() != 1 or offsets.dim() != 1 or offsets.numel() < 1:
        raise ValueError(
            f"Support: ids and offsets must have shapes (M,) and (N + 1,),"
            f" got {tuple(ids.shape)} and {tuple(offsets.shape)}"
        )
    if offsets.device != ids.device:
        raise ValueError(f"Support: offsets must be on {ids.device}, got {offsets.device}")
    ends = offsets.long().cpu()
    first, last = int(ends[0]), int(ends[-1])
    if first != 0 or last != ids.numel():
        raise ValueError(
            f"Support: offsets must rise from 0 to the number of ids, {ids.numel()},"
            f" got {first} to {last}"
        )
    falls = (ends.diff() < 0).nonzero()
    if falls.numel():
        at = int(falls[0])
        raise ValueError(
            f"Support: offsets must not fall, got {int(ends[at + 1])} after {int(ends[at])} at row"
            f" {at}"
        )
    return ids, offsets.long()
