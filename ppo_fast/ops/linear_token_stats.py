"""`linear_token_stats`: six statistics of a head's distributions from one read of its logits."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ppo_fast import reference
from ppo_fast._boundary import calls
from ppo_fast._boundary.options import RowStats, Scoring, Softmax
from ppo_fast._results import TokenStats
from ppo_fast.ops.forward_mode import derivatives
from ppo_fast.ops.head import Head, HeadOperands
from ppo_fast.ops.head_inputs import HeadForm, HeadInputs, check_head
from ppo_fast.ops.shards import Shard

_OP = "linear_token_stats"


@derivatives()
def linear_token_stats(
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
    backend: str | None = None,
) -> TokenStats:
    """Statistics of every token's distribution, for baselines and metrics: constants, always six.

    Of z, the logits over the temperature, and p = softmax(z), as TRL names them; the logits never
    exist as a whole, and are read once. Log-probability and entropy have the bits of
    `linear_token_logprobs`. exp of `log_sum_sq_probs` is verl's `sum_pi_squared`, which
    `optimal_token_baseline` takes.

    Args:
        hidden, weight, bias, temperature, softcap, extra, logit_scale, vocab_size, row_index:
            as in `linear_token_logprobs`.
        tokens, mask, ignore_index: as in `token_logprobs`.
        process_group: ranks that hold a share of the vocabulary each, with identical tokens.
        backend: "reference", "cpu" or "triton"; by default the device's.

    Returns:
        `TokenStats(logprobs, entropy, lse, log_sum_sq_probs, is_top1, mean_logit)`, each `(...)`
        fp32 (fp64 for fp64 inputs), `is_top1` bool: the token is the largest logit's id, the
        lowest of equal ones. Masked rows are 0 and False. A row whose logits are no distribution
        (a NaN, an inf, or all -inf) is NaN and False, and `mean_logit` what its sum gives: -inf
        where a logit is. Tokens outside [0, V) make a row NaN and False.

    Raises:
        ValueError: shape, device or range. TypeError: dtype. IndexError: see `token_logprobs`.
        NotImplementedError: a forward-mode tangent, as the op has no derivative.
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
        support=None,
        backend=backend,
        beside="these statistics",
    )
    given = _detached(given)
    if given.options.backend == "reference":
        inputs = given.for_reference()
        del inputs["support"]
        with given.exact():
            return reference.linear_token_stats(**inputs)
    with given.exact():
        head = Head(given.operands, given.rows, given.options)
        part = _all_rows(head)
    stats = _statistics(part, head.scoring(slice(None)), given.options.vocab)
    return TokenStats(*(given.rows.spread(x).view(tokens.shape) for x in stats))


def _detached(given: HeadInputs) -> HeadInputs:
    operands = (None if x is None else x.detach() for x in given.operands)
    return given._replace(operands=HeadOperands._make(operands))


def _all_rows(head: Head) -> RowStats:
    """The numbers of every row that is computed, (R,) each."""
    count, device = head.rows.tokens.shape[0], head.hidden.device
    top = torch.empty(count, dtype=torch.int64, device=device)
    logprobs, entropy, row_max, log_sum, squares, mean = torch.empty(
        6, count, dtype=head.wide, device=device
    )
    out = RowStats(logprobs, entropy, row_max, log_sum, squares, mean, top)
    for at in head.chunks(count):
        part = _of_rows(head, head.logits(head.inputs(at)), head.scoring(at))
        for to, x in zip(out, part, strict=True):
            to[at] = x
    return out


def _of_rows(head: Head, z: Tensor, s: Scoring) -> RowStats:
    """A chunk's numbers over the whole vocabulary, `top` an id of it."""
    shard, backend = head.options.shard, head.options.backend
    if shard is None:
        return calls.token_stats(backend, z, s)
    part = calls.token_stats(backend, z, s._replace(tokens=shard.local(s.tokens)))
    return _merged(shard, part, z, s)


def _merged(shard: Shard, part: RowStats, z: Tensor, s: Scoring) -> RowStats:
    """The whole vocabulary's from every share's, in rank order."""
    dead = z.amax(-1).isneginf()
    whole = shard.merge(Softmax(*part[:4]), dead, s)
    peak = z.gather(-1, part.top[:, None])[:, 0]
    # A share without a finite logit has no weight, and without a column no mean. Ids are exact in
    # fp64.
    mean = part.mean_logit.double() * (shard.size / shard.vocab)
    mine = torch.stack(
        [
            torch.where(dead, -float("inf"), part.row_max).double(),
            torch.where(dead, 0.0, part.log_sum_sq).double(),
            mean if shard.size else torch.zeros_like(mean),
            peak.double(),
            part.top.double() + shard.first,
        ]
    )
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(shard.group))]
    dist.all_gather(every, mine, group=shard.group)
    squares, mean = (torch.zeros_like(mine[0]) for _ in range(2))
    best, top = every[0][3:]
    for row_max, log_sum_sq, own_mean, own_peak, own_top in every:
        squares = squares + (log_sum_sq + 2 * (row_max - whole.row_max.double())).exp()
        mean = mean + own_mean
        top = torch.where(own_peak > best, own_top, top)
        best = torch.maximum(best, own_peak)
    if shard.changed is not None:
        mean = mean.masked_fill(shard.changed, torch.nan)
    return RowStats(*whole, squares.log().to(z.dtype), mean.to(z.dtype), top.long())


def _statistics(part: RowStats, s: Scoring, vocab: int) -> TokenStats:
    """The results of rows, from numbers of which masked rows' are 0 but for those of shards."""
    nowhere = (s.tokens < 0) | (s.tokens >= vocab)
    zero = torch.zeros_like(part.row_max)
    poison = torch.where(nowhere, float("nan"), zero)
    out = TokenStats(
        part.logprobs,
        part.entropy,
        part.row_max + part.log_sum + poison,
        # Σp² is at most 1.
        (part.log_sum_sq - 2 * part.log_sum).clamp(max=0) + poison,
        (part.top == s.tokens) & ~part.log_sum.isnan() & ~nowhere,
        part.mean_logit + poison,
    )
    if s.mask is None:
        return out
    return TokenStats(*(torch.where(s.mask, x, torch.zeros_like(x)) for x in out))
