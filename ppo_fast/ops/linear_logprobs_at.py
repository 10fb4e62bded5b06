"""`linear_logprobs_at`: the head's log-probabilities at several ids of every row."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ppo_fast import _checks, reference
from ppo_fast._boundary import calls
from ppo_fast._boundary.options import Scoring, Softmax
from ppo_fast._results import TokenLogProbs
from ppo_fast.ops.backward import n_grads, once_differentiable, saveable
from ppo_fast.ops.forward_mode import derivatives
from ppo_fast.ops.head import Head, HeadOperands, HeadRows, live_rows
from ppo_fast.ops.head_inputs import HeadForm, HeadInputs, check_head
from ppo_fast.ops.shards import unlabelled_gradient
from ppo_fast.support import ABSENT

_OP = "linear_logprobs_at"


class Columns(NamedTuple):
    """The ids of some rows, (R, K) each, as columns of the logits that are here."""

    column: Tensor  # int64; 0 where the id is elsewhere
    here: Tensor  # the id's logit is this rank's
    read: Tensor  # neither absent nor of a masked row
    wrong: Tensor  # read, and in no vocabulary

    @classmethod
    def of(cls, ids: Tensor, head: Head) -> Columns:
        """The columns of a head's rows."""
        shard, keep = head.options.shard, head.rows.keep
        legal, read = (ids >= 0) & (ids < head.options.vocab), ids != ABSENT
        if keep is not None:
            read = read & keep[:, None]
        here = legal if shard is None else shard.holds(ids)
        local = ids if shard is None else ids - shard.first
        return cls(torch.where(here, local, 0).long(), here, read, read & ~legal)

    def rows(self, at: Tensor | slice) -> Columns:
        """Those of a chunk."""
        return Columns(*(x[at] for x in self))


class _At:
    """The chunks of one call: log-probabilities (R, K) and softmax numbers, and their gradient."""

    def __init__(self, head: Head, ids: Tensor) -> None:
        self.head, self.columns = head, Columns.of(ids, head)

    def forward(self) -> tuple[Tensor, Softmax]:
        """Log-probabilities (R, K) and the rows' softmax numbers, without the label's own."""
        head, (count, k) = self.head, self.columns.column.shape
        out = torch.empty(count, k, dtype=head.wide, device=head.hidden.device)
        part = torch.empty(3, count, dtype=head.wide, device=head.hidden.device)
        wrong = self.columns.wrong.any(-1)
        for at in head.chunks(count):
            z = head.logits(head.inputs(at))
            _, *numbers = head.softmax(z, at)
            for to, x in zip(part, numbers, strict=True):
                to[at] = torch.where(wrong[at], float("nan"), x)
            out[at] = self._logprobs(z, at, part[1, at], part[2, at])
        return out, Softmax(part[0], *part)

    def _logprobs(self, z: Tensor, at: slice, row_max: Tensor, log_sum: Tensor) -> Tensor:
        columns, shard = self.columns.rows(at), self.head.options.shard
        gap = z.gather(-1, columns.column) / self._divisor(at) - row_max[:, None]
        if shard is not None:
            gap = torch.where(columns.here, gap, -float("inf"))
            dist.all_reduce(gap, dist.ReduceOp.MAX, shard.group)
        # An id's own share of the sum is e^gap, of which rounding may leave less.
        out = gap - torch.maximum(log_sum[:, None], gap)
        return torch.where(columns.read, out, torch.zeros_like(out))

    def _divisor(self, at: Tensor | slice) -> float | Tensor:
        """The temperature, for each of a row's ids."""
        divisor = self.head.scoring(at).divisor()
        return divisor[:, None] if isinstance(divisor, Tensor) else divisor

    def backward(self, logprobs: Tensor, part: Softmax, g: Tensor, h: Tensor) -> None:
        """Accumulate the gradients of Σ g·logprobs + h·entropy, g (R, K)."""
        head = self.head
        # An id of probability 0 passes no gradient; neither does what is not read.
        passes = self.columns.read & ~logprobs.isneginf()
        g = torch.where(passes, g, torch.zeros_like(g))
        sums, live = row_sums(g), live_rows((g != 0).any(-1), h)
        for at in head.blocks(g.shape[0] if live is None else live.shape[0]):
            rows = at if live is None else live[at]
            x, columns = head.inputs(rows), self.columns.rows(rows)
            z, numbers = head.logits(x), Softmax(*(number[rows] for number in part))
            bend = head.bend(z)
            dz = self._dense(z, rows, numbers, sums[rows], h[rows])
            own = g[rows] / self._divisor(rows)
            add_in_rows_(dz, columns.column, torch.where(columns.here, own, 0.0))
            if bend is not None:
                dz *= bend
            head.accumulate(dz, x, rows)

    def _dense(
        self, z: Tensor, rows: Tensor | slice, numbers: Softmax, g: Tensor, h: Tensor
    ) -> Tensor:
        """−p (g + h (ln p + H)) / τ over the logits."""
        backend = self.head.options.backend

        def kernel(s: Scoring, g: Tensor) -> Tensor:
            calls.logprobs_bwd_(backend, z, s, numbers, g, h)
            return z

        return unlabelled_gradient(kernel, z, self.head.scoring(rows), numbers, g, h)


def row_sums(x: Tensor) -> Tensor:
    """Sums of the rows of (R, K), in a tree that depends on neither R nor zeros behind."""
    while x.shape[-1] > 1:
        left, right = x[:, ::2], x[:, 1::2]
        x = left + torch.nn.functional.pad(right, (0, left.shape[-1] - right.shape[-1]))
    return x.sum(-1)  # of one or none


def add_in_rows_(z: Tensor, columns: Tensor, x: Tensor) -> None:
    """z[r, columns[r, k]] += x[r, k] in the order of k, without float atomics."""
    if z.is_cuda:  # sorts the indices, where scatter_add_ would use atomics
        each = torch.arange(z.shape[0], device=z.device)[:, None].expand_as(columns)
        z.index_put_((each, columns), x, accumulate=True)
    else:  # a row is one thread's, where index_put_ would use atomics
        z.scatter_add_(-1, columns, x)


class _LinearLogProbsAt(torch.autograd.Function):
    """Saves three numbers per row and the log-probabilities; the backward runs the GEMM again."""

    @staticmethod
    def forward(ctx: Any, given: HeadInputs, ids: Tensor, *operands: Any) -> Any:
        rows = given.rows
        with given.exact():
            head = Head(HeadOperands(*operands), rows, given.options)
            logprobs, part = _At(head, ids).forward()
        tensors = (*operands, ids, rows.places, rows.keep, rows.temperature)
        ctx.save_for_backward(logprobs, *part[1:], *saveable(*tensors))
        ctx.given = given
        ctx.set_materialize_grads(False)
        return rows.spread(logprobs), rows.spread(part.entropy)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> Any:
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 7
        saved = ctx.saved_tensors
        logprobs, *part = saved[:4]
        *operands, ids, places, keep, temperature = saved[4:]
        given: HeadInputs = ctx.given
        numbers = Softmax(part[0], *part)  # no kernel reads the label's own
        rows = HeadRows(places, given.rows.tokens, keep, temperature, given.rows.n)
        g = torch.zeros_like(logprobs) if grad_logprobs is None else _pick(rows, grad_logprobs)
        h = torch.zeros_like(part[0]) if grad_entropy is None else rows.pick(grad_entropy)
        with given.exact():
            head = Head(HeadOperands(*operands), rows, given.options)
            head.allocate(*ctx.needs_input_grad[2:])
            _At(head, ids).backward(logprobs, numbers, g, h)
        return None, None, *head.gradients()


def _pick(rows: HeadRows, x: Tensor) -> Tensor:
    """The (N, K) values, or (..., K), of the rows that are computed, (R, K)."""
    flat = x.reshape(rows.n, x.shape[-1])
    return flat if rows.places is None else flat[rows.places]


@derivatives("hidden", "weight", "bias", "extra")
def linear_logprobs_at(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    extra: tuple[Tensor, Tensor] | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
    row_index: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> TokenLogProbs:
    """Log-probabilities at K ids of every row, and the entropy, both over the whole vocabulary.

    As `linear_token_logprobs` with K tokens a row from one pass: what a distillation from a
    teacher's top K needs. The logits never exist as a whole.

    Args:
        hidden, weight, bias, temperature, softcap, extra, logit_scale, vocab_size, row_index:
            as in `linear_token_logprobs`.
        ids: `(..., K)` int32 or int64; -1 is no id: 0 there, and no gradient. An id may stand
            several times. With an id outside [0, V) the row is NaN, nothing out of bounds is
            read; `PPO_FAST_DEBUG=1` raises IndexError instead.
        mask: `(...)` of any real dtype, non-zero keeps.
        process_group: ranks that hold a share of the vocabulary each, with identical ids (global).

    Returns:
        `TokenLogProbs(logprobs, entropy)`, `(..., K)` and `(...)`, fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: shape, device or range. TypeError: dtype. IndexError: see `ids`.
        NotImplementedError: a forward-mode tangent of a constant, or on a named kernel backend.
    """
    lead = _checks.tensor(_OP, "hidden", hidden).shape[:-1]
    given = check_head(
        _OP,
        hidden,
        weight,
        # A label that every row has, for its kernels.
        torch.zeros(lead, dtype=torch.int32, device=hidden.device),
        HeadForm(bias, temperature, softcap, extra, logit_scale, vocab_size),
        mask=mask,
        ignore_index=ABSENT,
        row_index=row_index,
        process_group=process_group,
        support=None,
        backend=backend,
    )
    _check_ids(ids, given)
    if given.options.backend == "reference":
        inputs = given.for_reference()
        del inputs["tokens"], inputs["support"]
        with given.exact():
            return reference.linear_logprobs_at(ids=ids, **inputs)
    logprobs, entropy = _score(ids, given)
    return TokenLogProbs(logprobs.view(ids.shape), entropy.view(lead))


def _check_ids(ids: Any, given: HeadInputs) -> None:
    lead = given.hidden.shape[:-1]
    if _checks.tensor(_OP, "ids", ids).dim() != len(lead) + 1 or ids.shape[:-1] != lead:
        raise ValueError(
            f"{_OP}: ids must have shape (..., K) beside hidden {tuple(given.hidden.shape)},"
            f" got {tuple(ids.shape)}"
        )
    _checks.indices(_OP, "ids", ids, ids.shape, given.hidden.device)
    if _checks.DEBUG and given.keep is not None:
        live = given.keep[..., None] & (ids != ABSENT)
        _checks.tokens_in_range(_OP, ids, live, given.options.vocab, "ids")


def _score(ids: Tensor, given: HeadInputs) -> tuple[Tensor, Tensor]:
    """(N, K) log-probabilities and (N,) entropies, differentiable where the head is."""
    picked = _pick(given.rows, ids)
    if n_grads(*given.operands):
        out: tuple[Tensor, Tensor] = _LinearLogProbsAt.apply(given, picked, *given.operands)
        return out
    with given.exact():
        logprobs, part = _At(Head(given.operands, given.rows, given.options), picked).forward()
    return given.rows.spread(logprobs), given.rows.spread(part.entropy)
