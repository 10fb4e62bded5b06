"""Log-probabilities over a support: the pairs (row, id) of a call, their softmax and gradient.

Where logits exist there is nothing to save by a kernel: the pairs' logits are gathered from them,
and the pairs' gradient is added into zeros.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppo_fast import _checks
from ppo_fast._boundary import calls
from ppo_fast._boundary.options import Pairs, Scoring, Softmax
from ppo_fast._boundary.schema import compute_dtype
from ppo_fast.ops.backward import once_differentiable, saveable
from ppo_fast.ops.head import unravelled
from ppo_fast.ops.shards import Shard, softmax_gradient, softmax_of
from ppo_fast.support import ABSENT, Support

_WRONG = -2


class Kept(NamedTuple):
    """The pairs of a call's rows, a row's token first, and the row of each pair, (M,) int32.

    `ends` are the offsets on the host.
    """

    pairs: Pairs
    rows: Tensor
    ends: Tensor

    def part(self, at: slice) -> Kept:
        """The pairs of the rows of a slice."""
        first, last = int(self.ends[at.start]), int(self.ends[at.stop])
        ids, offsets, mask = self.pairs
        pairs = Pairs(ids[first:last], offsets[at.start : at.stop + 1] - first, mask[at])
        rows = self.rows[first:last] - at.start
        return Kept(pairs, rows, self.ends[at.start : at.stop + 1] - first)

    def columns(self, vocab: int) -> Tensor:
        """A column to read or to add to for every pair, absent and wrong ones too, (M,) int64."""
        return self.pairs.ids.long().clamp(0, vocab - 1)

    def marked(self, z: Tensor, vocab: int) -> Tensor:
        """z (M,), with -inf where a pair is absent, and NaN where its id is wrong."""
        ids = self.pairs.ids
        z = z.masked_fill(ids == ABSENT, -torch.inf)
        return z.masked_fill((ids < ABSENT) | (ids >= vocab), torch.nan)


def check_support(op: str, support: Any, tokens: Tensor, keep: Any, vocab: int) -> None:
    """A support of the tokens' rows, or TypeError or ValueError. None passes."""
    if support is None:
        return
    if not isinstance(support, Support):
        raise TypeError(f"{op}: support must be a ppo_fast.Support, got {type(support).__name__}")
    if support.n_rows != tokens.numel():
        raise ValueError(
            f"{op}: support must have a row for each of the {tokens.numel()} tokens, got"
            f" {support.n_rows}"
        )
    if support.ids.device != tokens.device:
        raise ValueError(f"{op}: support must be on {tokens.device}, got {support.ids.device}")
    if _checks.DEBUG:
        _check_ids(op, support, keep.reshape(-1), vocab)


def _check_ids(op: str, support: Support, keep: Tensor, vocab: int) -> None:
    """Debug only: raise at the first kept row with a wrong id, or one id twice."""
    rows, ids = support.row_of_pairs().long(), support.ids.long()
    bad = keep[rows] & ((ids < 0) | (ids >= vocab))
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        raise IndexError(
            f"{op}: support must have ids in [0, {vocab}), got {int(ids[at])} at row"
            f" {int(rows[at])}"
        )
    order = (rows * vocab + ids).sort()
    again = (order.values.diff() == 0) & keep[rows[order.indices[1:]]]
    if bool(again.any()):
        at = int(order.indices[int(again.nonzero()[0])])
        raise ValueError(
            f"{op}: support must have an id once in a row, got {int(ids[at])} twice at row"
            f" {int(rows[at])}"
        )


def kept_pairs(
    support: Support, tokens: Tensor, keep: Tensor, vocab: int, shard: Shard | None
) -> Kept:
    """The pairs of N rows: the row's token, then its kept ids but the token's first occurrence.

    `keep` (N,) bool. Rows with nothing kept have a pair too, and are masked. With a shard, ids are
    columns of its share, absent where they are elsewhere.
    """
    n, total = support.n_rows, support.ids.numel()
    device = support.ids.device
    label = tokens.clamp(_WRONG, (1 << 31) - 1).int()
    label = torch.where(label == ABSENT, _WRONG, label)
    row = support.row_of_pairs()
    own = support.ids == label[row]
    found = own.cumsum(0)
    before = torch.cat([found.new_zeros(1), found])[support.offsets[:-1]]
    first = own & (found - before[row] == 1)
    ids = torch.empty(total + n, dtype=torch.int32, device=device)
    ids[torch.arange(1, total + 1, device=device) + row] = torch.where(first, ABSENT, support.ids)
    offsets = support.offsets + torch.arange(n + 1, device=device)
    ids[offsets[:-1]] = label
    rows = torch.arange(n, dtype=torch.int32, device=device).repeat_interleave(
        offsets.diff(), output_size=total + n
    )
    if shard is not None:
        ids = shard.columns(ids)
    mask = keep & ~support.whole
    ends = support.ends + torch.arange(n + 1)
    return Kept(Pairs(ids, offsets, mask), rows, ends)


def flat_scoring(s: Scoring) -> Scoring:
    """The same with (N,) tensors."""
    mask, t = (None if x is None else x.reshape(-1) for x in (s.mask, s.temperature_tensor))
    return s._replace(tokens=s.tokens.reshape(-1), mask=mask, temperature_tensor=t)


def softmax_over(backend: str, z: Tensor, kept: Kept, s: Scoring, shard: Shard | None) -> Softmax:
    """Softmax numbers (N,) over the pairs' logits z (M,), of which a shard has its share."""
    part = calls.support_fwd(backend, z, kept.pairs, s)
    if shard is None:
        return part
    alive = torch.cat([z.new_zeros(1, dtype=torch.int64), (z != -torch.inf).cumsum(0)])
    dead = alive[kept.pairs.offsets].diff() == 0
    return shard.merge(part, dead, s._replace(mask=kept.pairs.mask))


def gradient_over(
    backend: str,
    z: Tensor,
    kept: Kept,
    s: Scoring,
    softmax: Softmax,
    grads: tuple[Tensor | None, Tensor | None],
    shard: Shard | None,
) -> Tensor:
    """dz (M,) of Σ g·logprobs + h·entropy, wide; 0 for absent pairs and in masked rows."""
    absent = kept.pairs.ids == ABSENT
    if shard is None:
        dz = calls.support_bwd(backend, z, kept.pairs, s, softmax, *grads)
        return dz.masked_fill_(absent, 0.0)  # of a row that is NaN too
    zero = torch.zeros_like(softmax.logprobs)
    g, h = (zero if x is None else x for x in grads)
    # A label of probability 0 passes no gradient, on whatever rank it is.
    g = torch.where(softmax.logprobs.isneginf(), zero, g)
    temperature = torch.as_tensor(s.divisor(), dtype=z.dtype, device=z.device).expand(zero.shape)
    row = kept.rows
    ln_p = z / temperature[row] - softmax.row_max[row] - softmax.log_sum[row]
    p = ln_p.exp()
    bent = h[row] * (ln_p + softmax.entropy[row])
    dz = torch.where(p == 0, p, -p * (g[row] + bent) / temperature[row])
    at = kept.pairs.offsets[:-1]
    own = (
        -g * torch.expm1(ln_p[at]) - torch.where(p[at] == 0, p[at], p[at] * bent[at])
    ) / temperature
    dz = dz.index_put((at,), torch.where(shard.holds(s.tokens), own, dz[at]))
    return torch.where(kept.pairs.mask[row] & ~absent, dz, 0.0)


class _KeptLogProbs(torch.autograd.Function):
    """Saves the pairs' logits and the rows' numbers; the backward does not read the logits, but
    for rows that take the whole vocabulary."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        s: Scoring,
        kept: Kept,
        has_whole: bool,
        constants: tuple[Shard | None, str, bool],
    ) -> Any:
        shard, backend, _ = constants
        flat = flat_scoring(s)
        vocab = logits.shape[-1]
        places = unravelled(kept.rows.long(), logits.shape[:-1])
        z = logits.detach()[(*places, kept.columns(vocab))].to(compute_dtype(logits))
        z = kept.marked(z, vocab)
        over = softmax_over(backend, z, kept, flat, shard)
        logprobs, entropy = (x.view(s.tokens.shape) for x in over[:2])
        whole: tuple[Any, ...] = (None,) * 4
        if has_whole:
            whole = softmax_of(backend, logits, _of_whole(s, kept), shard)
            logprobs, entropy = logprobs + whole[0], entropy + whole[1]
        tensors = (s.tokens, s.mask, s.temperature_tensor, *kept.pairs, kept.rows)
        ctx.save_for_backward(logits, *saveable(*tensors), z, *over, *whole)
        ctx.constants = (s.temperature, s.ignore_index, kept.ends, has_whole, *constants)
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> Any:
        if grad_logprobs is None and grad_entropy is None:
            return None, None, None, None, None
        logits, tokens, mask, temperature, ids, offsets, live, rows, z, *numbers = (
            ctx.saved_tensors
        )
        number, ignored, ends, has_whole, shard, backend, inplace = ctx.constants
        s = Scoring(tokens, mask, temperature, number, ignored)
        kept, vocab = Kept(Pairs(ids, offsets, live), rows, ends), logits.shape[-1]
        grads = (grad_logprobs, grad_entropy)
        g, h = (None if x is None else x.reshape(-1) for x in grads)
        over = Softmax(*numbers[:4])
        dz = gradient_over(backend, z, kept, flat_scoring(s), over, (g, h), shard)
        if has_whole:
            softmax = Softmax(*numbers[4:])
            args = (backend, logits, _of_whole(s, kept), softmax, grads, shard, inplace)
            dlogits = softmax_gradient(*args)
        else:
            dlogits = logits.detach().zero_() if inplace else torch.zeros_like(logits)
        places = (*unravelled(rows.long(), logits.shape[:-1]), kept.columns(vocab))
        add_pairs_(dlogits, places, dz)
        return dlogits, None, None, None, None


def add_pairs_(z: Tensor, places: tuple[Tensor, ...], x: Tensor) -> None:
    """z[places] += x (M,) in the order of the pairs, without float atomics."""
    x = x.to(z.dtype)
    if x.numel() == 0:
        return
    if z.is_cuda:  # sorts the indices, where scatter_add_ would use atomics
        z.index_put_(places, x, accumulate=True)
        return
    # Along one dimension a thread adds, where index_put_ would use atomics.
    extent = 1 + sum((n - 1) * step for n, step in zip(z.shape, z.stride(), strict=True))
    at: Any = sum(index * step for index, step in zip(places, z.stride(), strict=True))
    z.as_strided((extent,), (1,)).scatter_add_(0, at, x)


def _of_whole(s: Scoring, kept: Kept) -> Scoring:
    """The rows that take the whole vocabulary, the others masked."""
    mask: Any = s.mask  # of all that is not ignored
    return s._replace(mask=mask & ~kept.pairs.mask.view(mask.shape))


def score_kept(
    logits: Tensor,
    s: Scoring,
    support: Support,
    shard: Shard | None,
    backend: str,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy over a support of checked arguments; `s.mask` is a bool."""
    keep: Any = s.mask
    vocab = logits.shape[-1] if shard is None else shard.vocab
    kept = kept_pairs(support, s.tokens.reshape(-1), keep.reshape(-1), vocab, shard)
    constants = (shard, backend, inplace_backward)
    out: tuple[Tensor, Tensor] = _KeptLogProbs.apply(
        logits, s, kept, support.n_whole > 0, constants
    )
    return out
