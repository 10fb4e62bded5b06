"""A vocabulary split over ranks: the merge of each rank's share of a row's softmax.

Every rank holds a share of the weight's rows, in rank order, and all tokens. Shares may differ in
size, and be empty; rows beyond `vocab_size` are padding, which no rank reads. Per token four
numbers travel: the share's maximum m, Σ e^(z−m), Σ (z−m) e^(z−m), and z−m of the token itself,
−∞ but on the rank that holds it. They are merged in rank order, so every rank has the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ppo_fast._boundary import calls
from ppo_fast._boundary.options import Scoring, Softmax
from ppo_fast.support import ABSENT


class Shard:
    """This rank's rows of the vocabulary: [first, first + size), of `sizes` by rank."""

    def __init__(
        self, group: dist.ProcessGroup, sizes: list[int], changed: Tensor | None = None
    ) -> None:
        rank = dist.get_rank(group)
        self.group, self.size = group, sizes[rank]
        self.first, self.vocab = sum(sizes[:rank]), sum(sizes)
        # All ranks take the chunks of the largest share: of others they would wait for ever.
        self.largest = max(sizes)
        # 0-d bool on a GPU, True where the sizes are no longer those that the host has looked at.
        self.changed = changed

    def holds(self, tokens: Tensor) -> Tensor:
        """True for tokens whose logit is on this rank."""
        return (tokens >= self.first) & (tokens < self.first + self.size)

    def local(self, tokens: Tensor) -> Tensor:
        """Each token's row here, 0 where it is elsewhere."""
        return torch.where(self.holds(tokens), tokens - self.first, torch.zeros_like(tokens))

    def columns(self, ids: Tensor) -> Tensor:
        """Each id's column here, int32: ABSENT where another rank holds it, wrong where none."""
        there = torch.where((ids >= ABSENT) & (ids < self.vocab), ABSENT, ABSENT - 1)
        return torch.where(self.holds(ids), ids - self.first, there).int()

    def summed(self, *parts: Tensor) -> list[Tensor]:
        """Sums over the ranks, in rank order."""
        mine = torch.stack(parts)
        every = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(every, mine, group=self.group)
        total = every[0]
        for other in every[1:]:
            total = total + other
        return list(total.unbind())

    def merge(self, part: Softmax, dead: Tensor, s: Scoring) -> Softmax:
        """The whole vocabulary's softmax, from this share's.

        `dead` is True where the share has no logit but −inf: it has no weight; alone it is no
        distribution, hence its NaN.
        """
        tokens, keep = s.tokens, s.mask
        zero = torch.zeros_like(part.row_max)
        none = zero - float("inf")
        total = torch.where(dead, zero, part.log_sum.exp())
        mine = torch.stack(
            [
                torch.where(dead, none, part.row_max),
                total,
                torch.where(dead, zero, (part.log_sum - part.entropy) * total),
                torch.where(self.holds(tokens) & ~dead, part.logprobs + part.log_sum, none),
            ]
        )
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, mine, group=self.group)
        whole = self._fold(parts, tokens)
        if keep is None:
            return whole
        return Softmax(*(torch.where(keep, x, zero) for x in whole))

    def _fold(self, parts: list[Tensor], tokens: Tensor) -> Softmax:
        row_max = torch.stack([part[0] for part in parts]).amax(0)
        total, dot = (torch.zeros_like(row_max) for _ in range(2))
        label = total - float("inf")
        for part_max, part_sum, part_dot, own in parts:
            delta = part_max - row_max
            scale = delta.exp()
            total = total + part_sum * scale
            moved = (part_dot + delta * part_sum) * scale
            dot = dot + torch.where(part_sum == 0, part_sum, moved)
            label = torch.maximum(label, own + delta)
        # The label's own share of the total is e^label, of which rounding may leave less.
        log_sum = torch.maximum(total.log(), label)
        entropy = (total.log() - dot / total).clamp(min=0)
        if self.changed is not None:
            entropy, log_sum = (x.masked_fill(self.changed, torch.nan) for x in (entropy, log_sum))
        outside = (tokens < 0) | (tokens >= self.vocab)
        poison = torch.where(outside, float("nan"), 0.0).to(total.dtype)
        return Softmax(label - log_sum + poison, entropy + poison, row_max, log_sum)

    def gradient(
        self,
        kernel: Callable[[Scoring, Tensor], Tensor],
        z: Tensor,
        s: Scoring,
        part: Softmax,
        g: Tensor,
        h: Tensor,
    ) -> Tensor:
        """dz of Σ g·logprobs + h·entropy, from `kernel(s, g)`, which may write it over z.

        A kernel wants a label in every row. Where the token is elsewhere it gets the likeliest
        column of this share, whose gradient, that of any other column, is then put in its place.
        """
        tokens, keep = s.tokens, s.mask
        # A label of probability 0 passes no gradient, on whatever rank it is.
        g = torch.where(part.logprobs.isneginf(), torch.zeros_like(g), g)
        stays = self.holds(tokens) if keep is None else self.holds(tokens) | ~keep
        label = torch.where(self.holds(tokens), self.local(tokens), z.argmax(-1).to(tokens.dtype))
        slope = _other_column(z, label, s, part, g, h)
        dz = kernel(s._replace(tokens=label), g)
        there = torch.where(stays, _at(dz, label), slope.to(dz.dtype))
        return dz.scatter_(-1, label.long()[..., None], there[..., None])


def unlabelled_gradient(
    kernel: Callable[[Scoring, Tensor], Tensor],
    z: Tensor,
    s: Scoring,
    part: Softmax,
    g: Tensor,
    h: Tensor,
) -> Tensor:
    """The same without the label's own term: dz_j = −p_j (g + h (ln p_j + H)) / τ everywhere."""
    label = z.argmax(-1).to(s.tokens.dtype)  # no kernel takes it for impossible
    slope = _other_column(z, label, s, part, g, h)
    if s.mask is not None:
        slope = torch.where(s.mask, slope, torch.zeros_like(slope))
    dz = kernel(s._replace(tokens=label), g)
    return dz.scatter_(-1, label.long()[..., None], slope.to(dz.dtype)[..., None])


def _other_column(
    z: Tensor, column: Tensor, s: Scoring, part: Softmax, g: Tensor, h: Tensor
) -> Tensor:
    """dz of one column of every row, were it not the label."""
    temperature = s.divisor()
    ln_p = _at(z, column) / temperature - part.row_max - part.log_sum
    p = ln_p.exp()
    return torch.where(p == 0, p, -p * (g + h * (ln_p + part.entropy)) / temperature)


def softmax_of(backend: str, z: Tensor, s: Scoring, shard: Shard | None) -> Softmax:
    """Softmax numbers over the whole vocabulary, of which z (..., V) holds all or this share."""
    if shard is None:
        return calls.logprobs_fwd(backend, z, s)
    part = calls.logprobs_fwd(backend, z, s._replace(tokens=shard.local(s.tokens)))
    return shard.merge(part, z.amax(-1).isneginf(), s)


def softmax_gradient(
    backend: str,
    z: Tensor,
    s: Scoring,
    softmax: Softmax,
    grads: tuple[Tensor | None, Tensor | None],
    shard: Shard | None,
    inplace: bool,
) -> Tensor:
    """dz (..., V) of Σ g·logprobs + h·entropy, of which z holds all or this share."""

    def kernel(s: Scoring, grad_logprobs: Tensor | None) -> Tensor:
        args = (backend, z, s, softmax, grad_logprobs, grads[1])
        if not inplace:
            return calls.logprobs_bwd(*args)
        calls.logprobs_bwd_(*args)
        return z

    z = z.detach()
    if shard is None:
        return kernel(s, grads[0])
    zero = torch.zeros_like(softmax.logprobs)
    grads = (zero if grads[0] is None else grads[0], zero if grads[1] is None else grads[1])
    return shard.gradient(kernel, z, s, softmax, *grads)


def _at(x: Tensor, column: Tensor) -> Tensor:
    return x.gather(-1, column.long()[..., None])[..., 0]


# Rows on every rank, as the host has seen them and on the device, by what a rank knows itself.
_SEEN: dict[tuple[object, ...], tuple[list[int], Tensor]] = {}


def check_vocab_size(op: str, vocab_size: Any, rows: int) -> int:
    """The vocabulary's share of so many rows, or TypeError or ValueError; None takes all."""
    if vocab_size is None:
        return rows
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
        raise TypeError(f"{op}: vocab_size must be an int, got {type(vocab_size).__name__}")
    if not 1 <= vocab_size <= rows:
        raise ValueError(
            f"{op}: vocab_size must be in [1, {rows}] with a weight of {rows} rows, got"
            f" {vocab_size}"
        )
    return vocab_size


def shard_of(
    op: str,
    name: str,
    group: dist.ProcessGroup | None,
    x: Tensor,
    dim: int,
    backend: str,
    vocab_size: int | None = None,
) -> Shard | None:
    """This rank's share, x.shape[dim] columns; None without a group.

    The ranks always exchange their sizes, whatever each has seen before: a rank that did not
    would leave the others in a collective of their own. The host looks at a GPU's once for what a
    rank knows itself; later ones are compared there, and where they differ results are NaN.
    """
    if group is None:
        return None
    if backend == "reference":
        raise ValueError(f"{op}: process_group must be None on 'reference', got {group}")
    size = x.shape[dim]
    asked = 0 if vocab_size is None else check_vocab_size(op, vocab_size, 1 << 62)
    mine = torch.full((2,), size, device=x.device)
    mine[1:].fill_(asked)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group=group)
    gathered = torch.stack(every)
    if x.device.type == "cpu":
        return Shard(group, _sizes(op, name, gathered.tolist()))
    width = x.shape[1] if dim == 0 else 0
    key = (id(group), name, size, asked, width, x.dtype)
    return Shard(group, *remembered(op, name, key, gathered))


def remembered(
    op: str, name: str, key: tuple[object, ...], gathered: Tensor
) -> tuple[list[int], Tensor]:
    """The sizes that the host has looked at, at the first call, and True on the device where the
    gathered rows are others now."""
    if key not in _SEEN:
        _SEEN[key] = _sizes(op, name, gathered.tolist()), gathered
    sizes, before = _SEEN[key]
    return sizes, (gathered != before).any()


def _sizes(op: str, name: str, every: list[list[int]]) -> list[int]:
    """The vocabulary's rows on every rank, of (rows, vocab_size or 0) each, or ValueError."""
    rows, asked = zip(*every, strict=True)
    total = sum(rows)
    if len(set(asked)) > 1:
        raise ValueError(
            f"{op}: vocab_size must be the same on all ranks, got {[n or None for n in asked]}"
        )
    if total == 0:
        raise ValueError(f"{op}: {name} must have a share on some rank, got {list(rows)}")
    left = check_vocab_size(op, asked[0] or None, total)
    sizes = []
    for n in rows:
        sizes.append(min(n, left))
        left -= sizes[-1]
    return sizes
