"""`linear_token_logprobs`: the head's log-probabilities and entropies without its logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ppo_fast import reference
from ppo_fast._boundary.options import Softmax
from ppo_fast._results import TokenLogProbs
from ppo_fast.ops.backward import n_grads, once_differentiable, saveable
from ppo_fast.ops.forward_mode import derivatives
from ppo_fast.ops.head import Head, HeadOperands, HeadRows, live_rows
from ppo_fast.ops.head_inputs import HeadForm, HeadInputs, check_head
from ppo_fast.ops.sparse_head import score_kept
from ppo_fast.support import Support

_OP = "linear_token_logprobs"


def all_rows(head: Head) -> Softmax:
    """The softmax numbers of every row that is computed, (R,) each."""
    count = head.rows.tokens.shape[0]
    out = Softmax(*torch.empty(4, count, dtype=head.wide, device=head.hidden.device))
    for at in head.chunks(count):
        for to, x in zip(out, head.softmax(head.logits(head.inputs(at)), at), strict=True):
            to[at] = x
    return out


def accumulate(head: Head, part: Softmax, g: Tensor, h: Tensor) -> None:
    """Recompute the blocks with a gradient and accumulate it."""
    live = live_rows(g, h)
    for at in head.blocks(g.shape[0] if live is None else live.shape[0]):
        rows = at if live is None else live[at]
        x = head.inputs(rows)
        chosen = Softmax(*(number[rows] for number in part))
        head.backward(head.logits(x), x, rows, chosen, g[rows], h[rows])


class _LinearLogProbs(torch.autograd.Function):
    """Saves four numbers per row; the backward runs the GEMM once more."""

    @staticmethod
    def forward(ctx: Any, given: HeadInputs, *operands: Any) -> Any:
        rows = given.rows
        with given.exact():
            part = all_rows(Head(HeadOperands(*operands), rows, given.options))
        # The rows too: one that is changed in place before the backward raises there.
        tensors = (*operands, rows.places, rows.tokens, rows.keep, rows.temperature)
        ctx.save_for_backward(*part, *saveable(*tensors))
        ctx.given = given
        ctx.set_materialize_grads(False)
        return rows.spread(part.logprobs), rows.spread(part.entropy)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> Any:
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 6
        saved, given = ctx.saved_tensors, ctx.given
        numbers, operands = Softmax(*saved[:4]), HeadOperands(*saved[4:9])
        places, tokens, keep, temperature = saved[9:]
        rows = HeadRows(places, tokens, keep, temperature, given.rows.n)
        zero = torch.zeros_like(numbers.logprobs)
        g = zero if grad_logprobs is None else rows.pick(grad_logprobs)
        h = zero if grad_entropy is None else rows.pick(grad_entropy)
        with given.exact():
            head = Head(operands, rows, given.options)
            head.allocate(*ctx.needs_input_grad[1:])
            accumulate(head, numbers, g, h)
        return None, *head.gradients()


@derivatives("hidden", "weight", "bias", "extra")
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    extra: tuple[Tensor, Tensor] | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    row_index: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
    support: Support | None = None,
    backend: str | None = None,
) -> TokenLogProbs:
    """`token_logprobs` of cap(logit_scale·(hidden·weightᵀ + bias)), logits that never exist whole.

    Rows go through the GEMM in chunks of a height that the vocabulary alone decides, with or
    without gradients: the bits are the same. The backward recomputes each chunk.

    Args:
        hidden: `(..., H)` fp32, bf16 or fp16 (fp64 except on Triton), last dimension contiguous.
        weight: `(V, H)` of the same dtype; with `process_group` this rank's share of it, in rank
            order (tokens stay global ids): shares may differ in size and be empty. A DTensor is
            taken as its local share with a group and whole without. Frozen weights cost no
            gradient GEMM.
        tokens, temperature, mask, ignore_index: as in `token_logprobs`.
        bias: `(V,)`, or this rank's share.
        softcap: z ← cap·tanh(z / cap), before the temperature.
        extra: (u, b), `(..., r)` and `(V, r)` of hidden's dtype: u·bᵀ is added to
            hidden·weightᵀ, as an adapter of rank r on the head does (LoRA, Hu et al. 2021:
            u = scale·dropout(hidden)·Aᵀ, b = B), while neither weight + b·A nor a copy of the
            weight is formed. Gradients flow to both. With `process_group` b is this rank's share.
        logit_scale: a positive number that multiplies the logits before the cap (Cohere; Granite
            divides by `logits_scaling`).
        vocab_size: rows of weight, b and bias from this one on are padding: never read, tokens
            there are out of range, their gradient is 0. With `process_group`, of all ranks' rows.
        row_index: `(R,)` int64, ascending and unique: the flat rows to compute. The others give 0
            and no gradient. On a CPU masked rows are left out by themselves; on a GPU, where their
            number is not known to the host, by this alone.
        process_group: ranks that hold a share of the vocabulary each, with identical tokens.
        support: as in `token_logprobs`; where it keeps few ids, only those rows of the weight are
            multiplied. It decides that itself, once. Not on "cuda".

    Returns:
        `TokenLogProbs(logprobs, entropy)`, each `(...)` fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: shape, device or range. TypeError: dtype. IndexError: see `token_logprobs`.
        NotImplementedError: a forward-mode tangent of a constant, or on a named kernel backend.
    """
    given = check_head(
        _OP,
        hidden,
        weight,
        tokens,
        HeadForm(bias, temperature, softcap, extra, logit_scale, vocab_size),
        mask=mask,
        ignore_index=ignore_index,
        row_index=row_index,
        process_group=process_group,
        support=support,
        backend=backend,
    )
    shape = tokens.shape
    if given.options.backend == "reference":
        with given.exact():
            return reference.linear_token_logprobs(**given.for_reference())
    logprobs, entropy = score(given)
    return TokenLogProbs(logprobs.view(shape), entropy.view(shape))


def score(given: HeadInputs) -> tuple[Tensor, Tensor]:
    """(N,) log-probabilities and entropies, differentiable where the head is."""
    if given.support is None:
        return _score_whole(given)
    logprobs, entropy, *_ = score_kept(given, given.support)
    if given.support.n_whole == 0:
        return logprobs, entropy
    of_others = _score_whole(given.whole())
    return logprobs + of_others[0], entropy + of_others[1]


def _score_whole(given: HeadInputs) -> tuple[Tensor, Tensor]:
    """The same over the whole vocabulary."""
    if n_grads(*given.operands):
        out: tuple[Tensor, Tensor] = _LinearLogProbs.apply(given, *given.operands)
        return out
    with given.exact():
        part = all_rows(Head(given.operands, given.rows, given.options))
    return given.rows.spread(part.logprobs), given.rows.spread(part.entropy)
