"""Linear head over a support: products with the kept rows of its weight alone, or dense logits.

Sparse, the pairs' logits are the only ones that are formed, and are kept for the backward: three
products in all. Dense, chunks of all logits go through `ops/head.py`, and the pairs are gathered
from them; the backward forms them again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ppo_fast._boundary import calls
from ppo_fast._boundary.options import Pairs, Scoring, Softmax
from ppo_fast._boundary.schema import compute_dtype
from ppo_fast.ops.backward import once_differentiable, saveable
from ppo_fast.ops.distributed_weight import require_whole
from ppo_fast.ops.exact import exact_products
from ppo_fast.ops.head import (
    NOTHING_IGNORED,
    Head,
    HeadOperands,
    HeadOptions,
    HeadRows,
    softcap_slope,
)
from ppo_fast.ops.head_inputs import HeadInputs, computed_rows
from ppo_fast.ops.kept_divergence import KeptPair, KeptTeacher, compare_kept, kept_slopes
from ppo_fast.ops.support import Kept, add_pairs_, gradient_over, kept_pairs, softmax_over
from ppo_fast.ops.teacher import TeacherHead, TeacherInputs
from ppo_fast.ops.z_loss import with_lse
from ppo_fast.support import ABSENT, Support
from ppo_fast.teacher import KINDS

# Pairs that are sorted at a time: a sort takes 24 bytes of each.
_SORTED = 1 << 25


# Gradients by (logprobs, entropy, ln Σe^z, divergence).
Grads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class _Call(NamedTuple):
    """Constants of one call: its rows with something kept, their pairs and how they are scored."""

    kept: Kept
    s: Scoring
    options: HeadOptions
    teacher: KeptTeacher | None

    def saved(self) -> tuple[Tensor | None, ...]:
        """The tensors, for autograd to watch."""
        s, kept = self.s, self.kept
        return saveable(s.tokens, s.temperature_tensor, *kept.pairs, kept.rows)

    def with_saved(self, *tensors: Any) -> _Call:
        """The same of those tensors."""
        tokens, temperature, ids, offsets, mask, rows = tensors
        s = self.s._replace(tokens=tokens, temperature_tensor=temperature)
        return self._replace(kept=Kept(Pairs(ids, offsets, mask), rows, self.kept.ends), s=s)

    def part(self, at: slice) -> _Call:
        """The call of a slice of the rows."""
        t = self.s.temperature_tensor
        s = self.s._replace(
            tokens=self.s.tokens[at], temperature_tensor=None if t is None else t[at]
        )
        teacher = self.teacher and self.teacher.part(at)
        return self._replace(kept=self.kept.part(at), s=s, teacher=teacher)

    def softmax(self, z: Tensor) -> Softmax:
        """Softmax numbers of the rows, from the pairs' logits z (M,)."""
        return softmax_over(self.options.backend, z, self.kept, self.s, self.options.shard)

    def compared(self, z: Tensor, y: Tensor | None, softmax: Softmax) -> KeptPair | None:
        """The divergences of the rows from their teacher's, of pairs' logits y (M,)."""
        o = self.options
        if self.teacher is None or y is None:
            return None
        args = (o.backend, z, y, self.kept, self.s, softmax, self.teacher, o.shard)
        return compare_kept(*args)

    def results(self, softmax: Softmax, pair: KeptPair | None) -> tuple[Tensor, ...]:
        """Results of the rows: log-probability, entropy, ln Σe^z and divergence, 0 without one."""
        lse = softmax.row_max + softmax.log_sum
        divergence = torch.zeros_like(lse) if pair is None else pair.divergence
        return softmax.logprobs, softmax.entropy, lse, divergence

    def gradient(self, z: Tensor, y: Tensor | None, softmax: Softmax, grads: Grads) -> Tensor:
        """The gradient by the pairs' logits before the soft cap, (M,), of a row's results."""
        o = self.options
        g, h, k, c = grads
        bent = softmax
        if k is not None:
            bent, h = with_lse(softmax, torch.zeros_like(k) if h is None else h, k)
        dz = gradient_over(o.backend, z, self.kept, self.s, bent, (g, h), o.shard)
        pair = None if c is None else self.compared(z, y, softmax)
        if pair is not None and self.teacher is not None and c is not None:
            dz = dz + kept_slopes(pair, self.kept, self.s, self.teacher, c)
        if o.softcap is None:
            return dz
        # Absent pairs and masked rows may hold anything.
        return torch.where(dz == 0, 0.0, dz * softcap_slope(z, o.softcap, o.logit_scale))


class _SparseHead(torch.autograd.Function):
    """Saves the pairs' logits, of a teacher too, and four numbers per row."""

    @staticmethod
    def forward(ctx: Any, call: _Call, teacher: TeacherInputs | None, *operands: Any) -> Any:
        z, y = _pair_logits(call.kept, HeadOperands(*operands), call.options), None
        if teacher is not None:
            t = teacher
            y = _pair_logits(call.kept, HeadOperands(t.hidden, t.weight, t.bias), t.options)
        softmax = call.softmax(z)
        ctx.save_for_backward(*saveable(*operands), *call.saved(), z, y, *softmax)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return call.results(softmax, call.compared(z, y, softmax))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        if all(grad is None for grad in grads):
            return (None,) * 7
        every = ctx.saved_tensors
        operands, saved = HeadOperands(*every[:5]), every[5:]
        call: _Call = ctx.call.with_saved(*saved[:6])
        z, y, softmax = saved[6], saved[7], Softmax(*saved[8:])
        dz = call.gradient(z, y, softmax, grads)
        return None, None, *_gradients(call, dz, operands, ctx.needs_input_grad[2:])


def _flat(x: Tensor) -> Tensor:
    """Rows of hidden states, (N, K)."""
    return x.reshape(-1, x.shape[-1])


def _pair_logits(kept: Kept, operands: HeadOperands, o: HeadOptions) -> Tensor:
    """The pairs' logits of a head, (M,)."""
    hidden, weight, bias, u, b = operands
    x = _flat(hidden)
    if o.size == 0:  # no pair is here, and no kernel meets a weight without rows
        return kept.marked(x.new_zeros(kept.rows.shape, dtype=compute_dtype(x)), 0)
    z = calls.sparse_logits(o.backend, x, weight[: o.size], kept.pairs)
    if u is not None and b is not None:
        z = z + calls.sparse_logits(o.backend, _flat(u), b[: o.size], kept.pairs)
    if bias is not None:
        z = z + bias[kept.columns(o.size)]
    if o.softcap is not None:
        z = z.div_(o.softcap / o.logit_scale).tanh_().mul_(o.softcap)
        z = kept.marked(z, o.size)
    return z


def _gradients(
    call: _Call, dz: Tensor, operands: HeadOperands, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of the operands that are wanted, in their order."""
    hidden, weight, bias, u, b = operands
    of_hidden, of_weight, of_bias, of_u, of_b = wanted
    dx = _hidden_gradient(call, dz, hidden, weight) if of_hidden else None
    du = _hidden_gradient(call, dz, u, b) if of_u else None
    if not (of_weight or of_bias or of_b):
        return dx, None, None, du, None
    # The bias's gradient comes with any product, one of no columns too.
    x = _flat(hidden)
    parts = [x if of_weight else x[:, :0]] + ([_flat(u)] if u is not None and of_b else [])
    dw, *db_extra, dbias = _weight_gradients(call, dz, parts, weight.shape[0])
    return (
        dx,
        dw if of_weight else None,
        dbias.to(bias.dtype) if bias is not None and of_bias else None,
        du,
        db_extra[0] if db_extra else None,
    )


def _hidden_gradient(call: _Call, dz: Tensor, hidden: Any, weight: Any) -> Tensor:
    """Of hidden states (..., K) beside a weight (V, K)."""
    o = call.options
    require_whole(weight, o.size)
    if o.size == 0:
        dx = weight.new_zeros(call.kept.pairs.mask.shape[0], weight.shape[1])
    else:
        dx = calls.sparse_hidden_grad(o.backend, dz, weight[: o.size], call.kept.pairs)
    if o.shard is not None:
        wide = dx.to(dz.dtype)
        dist.all_reduce(wide, group=o.shard.group)
        dx = wide.to(dx.dtype)
    return dx.view(hidden.shape)


def _weight_gradients(call: _Call, dz: Tensor, inputs: list[Tensor], padded: int) -> list[Tensor]:
    """dzᵀ · x (V, K) of each input x (N, K), in its dtype, and the sums of dz (V,), wide; where
    there are many pairs, some rows at a time.

    `padded` are the rows of the weight, of which those of the padding get 0.
    """
    sizes = call.options.size, padded
    if dz.numel() <= _SORTED:
        return _of_sorted(call.options.backend, call.kept, dz, inputs, *sizes)
    totals = [dz.new_zeros(padded, x.shape[1]) for x in inputs] + [dz.new_zeros(padded)]
    ends, first = call.kept.ends, 0
    while first < len(ends) - 1:
        fits = int(torch.searchsorted(ends, ends[first] + _SORTED, right=True)) - 1
        last = min(max(fits, first + 1), len(ends) - 1)
        part = dz[int(ends[first]) : int(ends[last])]
        rows = call.kept.part(slice(first, last))
        # Wide, so that the sum of the parts is rounded once.
        wide = [x[first:last].to(dz.dtype) for x in inputs]
        found = _of_sorted(call.options.backend, rows, part, wide, *sizes)
        for total, x in zip(totals, found, strict=True):
            total += x
        first = last
    *weights, bias = totals
    return [*(w.to(x.dtype) for w, x in zip(weights, inputs, strict=True)), bias]


def _of_sorted(
    backend: str, kept: Kept, dz: Tensor, inputs: list[Tensor], size: int, padded: int
) -> list[Tensor]:
    ids = kept.pairs.ids
    order = ids.sort(stable=True).indices
    # Counts of absent ids, of every id and of those beyond: a tenth of a search for every id.
    places = (ids.clamp(ABSENT, size) - ABSENT).long()
    counts = places.new_zeros(size + 2).scatter_add_(0, places, torch.ones_like(places))
    starts = counts.cumsum(0)[: size + 1]
    if padded > size:
        starts = torch.cat([starts, starts[-1:].expand(padded - size)])
    args = (backend, dz[order], kept.rows[order], starts)
    found = [calls.sparse_weight_grad(*args, x) for x in inputs]
    return [*(dw for dw, _ in found), found[0][1]]


class _DenseHead(torch.autograd.Function):
    """Saves four numbers per row; the backward runs the GEMMs once more."""

    @staticmethod
    def forward(
        ctx: Any, rows: HeadRows, call: _Call, teacher: TeacherInputs | None, *operands: Any
    ) -> Any:
        head = Head(HeadOperands(*operands), rows, call.options)
        other = teacher and TeacherHead(teacher, head)
        count, device = rows.tokens.shape[0], head.hidden.device
        out = Softmax(*torch.empty(4, count, dtype=head.wide, device=device))
        results = torch.empty(4, count, dtype=head.wide, device=device)
        for at in head.chunks(count):
            part = call.part(at)
            z = _gathered(head.logits(head.inputs(at)), part.kept)
            y = None if other is None else _gathered(other.logits(at), part.kept)
            softmax = part.softmax(z)
            for to, x in zip(out, softmax, strict=True):
                to[at] = x
            found = part.results(softmax, part.compared(z, y, softmax))
            for to, x in zip(results, found, strict=True):
                to[at] = x
        tensors = saveable(*operands, rows.places)
        theirs = (None, None, None) if teacher is None else teacher[:3]
        ctx.save_for_backward(*tensors, *call.saved(), *out, *saveable(*theirs))
        ctx.call, ctx.n, ctx.teacher = call, rows.n, teacher
        ctx.set_materialize_grads(False)
        return tuple(rows.spread(x) for x in results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        if all(grad is None for grad in grads):
            return (None,) * 8
        every = ctx.saved_tensors
        operands, (places, *saved) = HeadOperands(*every[:5]), every[5:]
        call: _Call = ctx.call.with_saved(*saved[:6])
        numbers = Softmax(*saved[6:10])
        rows = HeadRows(places, call.s.tokens, call.kept.pairs.mask, None, ctx.n)
        g, h, k, c = (rows.pick_some(x) for x in grads)
        with exact_products(operands.hidden.device):
            head = Head(operands, rows, call.options)
            head.allocate(*ctx.needs_input_grad[3:])
            other = ctx.teacher and TeacherHead(ctx.teacher, head)
            _accumulate(head, other, call, numbers, (g, h, k, c))
        return None, None, None, *head.gradients()


def _accumulate(
    head: Head, other: TeacherHead | None, call: _Call, numbers: Softmax, grads: Grads
) -> None:
    """Form the logits of each block anew, and accumulate the gradients of its pairs."""
    for at in head.blocks(head.rows.tokens.shape[0]):
        part, x = call.part(at), head.inputs(at)
        logits = head.logits(x)
        z = _gathered(logits, part.kept)
        y = None if other is None else _gathered(other.logits(at), part.kept)
        softmax = Softmax(*(number[at] for number in numbers))
        g, h, k, c = (None if grad is None else grad[at] for grad in grads)
        dz = part.gradient(z, y, softmax, (g, h, k, c))
        places = part.kept.rows.long(), part.kept.columns(logits.shape[1])
        add_pairs_(logits.zero_(), places, dz)
        head.accumulate(logits, x, at)


def _gathered(logits: Tensor, kept: Kept) -> Tensor:
    """The pairs' logits, (M,), of a chunk's, (R, V)."""
    vocab = logits.shape[1]
    return kept.marked(logits[kept.rows.long(), kept.columns(vocab)], vocab)


def score_kept(
    given: HeadInputs, support: Support, teacher: TeacherInputs | None = None
) -> tuple[Tensor, ...]:
    """(N,) log-probabilities, entropies, ln Σe^z and divergences over what is kept of a row, 0 for
    a row with nothing."""
    vocab = given.options.vocab
    tokens, keep = given.tokens.reshape(-1), given.named() & ~support.whole
    t = None if given.divisor is None else given.divisor.reshape(-1)
    rows: HeadRows | None = None
    other = None if teacher is None or teacher.per_token is None else teacher.per_token.reshape(-1)
    if not support.is_sparse(vocab):
        rows = computed_rows(tokens, keep, t, None)
        tokens, t, keep = rows.tokens, rows.temperature, rows.pick(keep)
        other = rows.pick_some(other)
        support = support if rows.places is None else support.rows(rows.places)
    kept = kept_pairs(support, tokens, keep, vocab, given.options.shard)
    s = Scoring(tokens, keep, t, given.options.temperature, NOTHING_IGNORED)
    beside = None
    if teacher is not None:
        # Of zeros, for its log-probabilities are not used.
        own = Scoring(torch.zeros_like(tokens), keep, other, teacher.number, NOTHING_IGNORED)
        beside = KeptTeacher(own, KINDS[teacher.kind], teacher.beta)
    call = _Call(kept, s, given.options, beside)
    out: tuple[Tensor, ...]
    with given.exact():
        if rows is None:
            out = _SparseHead.apply(call, teacher, *given.operands)
        else:
            out = _DenseHead.apply(rows, call, teacher, *given.operands)
    return out
