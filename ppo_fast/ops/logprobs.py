"""`token_logprobs`: log-probability and entropy of given tokens from one read of the logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ppo_fast import _backend, _checks, reference
from ppo_fast._results import TokenLogProbs
from ppo_fast._schema import HANDLES, compute_dtype
from ppo_fast.ops.backward import once_differentiable, saveable
from ppo_fast.ops.forward_mode import derivatives
from ppo_fast.ops.shards import Shard, Softmax, shard_of

_OP = "token_logprobs"


class Scoring(NamedTuple):
    """The checked arguments but the logits; with a shard, `mask` leaves ignored tokens out."""

    tokens: Tensor
    mask: Tensor | None
    heat: Tensor | None
    codes: list[int]
    params: list[float]
    shard: Shard | None
    backend: str


def _softmax(logits: Tensor, s: Scoring) -> Softmax:
    tokens = s.tokens if s.shard is None else s.shard.local(s.tokens)
    part = Softmax(*HANDLES["logprobs_fwd"][s.backend](logits, tokens, *s[1:5]))
    if s.shard is None:
        return part
    return s.shard.merge(part, logits, _heat(s), s.tokens, s.mask)


def _heat(s: Scoring) -> Tensor | float:
    return s.params[0] if s.heat is None else s.heat


class _TokenLogProbs(torch.autograd.Function):
    """Saves three numbers per row; the backward reads the logits once more."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, scoring: Scoring, inplace: bool) -> Any:
        part = _softmax(logits, scoring)
        ctx.save_for_backward(logits, *saveable(*scoring[:3]), *part)
        ctx.scoring, ctx.inplace = scoring, inplace
        ctx.set_materialize_grads(False)
        return part.logprobs, part.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> Any:
        if grad_logprobs is None and grad_entropy is None:
            return None, None, None
        logits, tokens, mask, heat, *numbers = ctx.saved_tensors
        s: Scoring = ctx.scoring._replace(tokens=tokens, mask=mask, heat=heat)
        part = Softmax(*numbers)

        def kernel(label: Tensor, g: Tensor | None) -> Tensor:
            args = (g, grad_entropy, logits, label, s.mask, s.heat, *part[1:], *s[3:5])
            if not ctx.inplace:
                return HANDLES["logprobs_bwd"][s.backend](*args)
            HANDLES["logprobs_bwd_"][s.backend](*args)
            return logits.detach()

        if s.shard is None:
            dlogits = kernel(s.tokens, grad_logprobs)
        else:
            zero = torch.zeros_like(part.logprobs)
            arrived = [zero if x is None else x for x in (grad_logprobs, grad_entropy)]
            dlogits = s.shard.gradient(
                kernel, logits.detach(), _heat(s), part, s.tokens, s.mask, *arrived
            )
        if ctx.inplace:
            torch.autograd.graph.increment_version(logits)
        return dlogits, None, None


@derivatives("logits")
def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    process_group: dist.ProcessGroup | None = None,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> TokenLogProbs:
    """Log-probability of each token and entropy of its distribution, both differentiable.

    With z = logits / temperature: logprobs = z[token] − ln Σ exp z, entropy = −Σ p ln p, in nats,
    from one read of the logits (online softmax, Milakov & Gimelshein 2018). There is no shift:
    `logits[..., t, :]` scores `tokens[..., t]`.

    Args:
        logits: `(..., V)` fp32, bf16 or fp16 (fp64 except on Triton), any strides with the last
            dimension contiguous; never copied.
        tokens: `(...)` int32 or int64. Outside [0, V) the row is NaN, nothing out of bounds is
            read; `PPO_FAST_DEBUG=1` raises IndexError instead.
        temperature: a positive number, or a tensor that broadcasts to `(...)`.
        mask: `(...)` of any real dtype, non-zero keeps.
        ignore_index: tokens of this value are treated as masked.
        process_group: ranks that hold an equal share of the vocabulary each, in rank order, with
            identical tokens (global ids) and masks; `logits` is this rank's `(..., V / ranks)`.
        inplace_backward: let the backward write the gradient over the logits. They must not be
            used by anything else; their version is bumped, so a second backward raises.
        backend: "reference", "cpu", "triton" or "cuda"; by default the device's.

    Returns:
        `TokenLogProbs(logprobs, entropy)`, each `(...)` fp32 (fp64 for fp64 logits). Masked or
        ignored rows are 0, their gradient exactly 0, and they are never read.

    Raises:
        ValueError: shape, device or range. TypeError: dtype. IndexError: see `tokens`.
        NotImplementedError: a forward-mode tangent of a constant, or on a named kernel backend.
    """
    check_logits(_OP, logits)
    shape = logits.shape[:-1]
    _checks.indices(_OP, "tokens", tokens, shape, logits.device)
    mask = _checks.flags(_OP, "mask", mask, shape, logits.device)
    scalar, per_token = check_temperature(_OP, temperature, logits)
    check_ignore_index(_OP, ignore_index)
    name = _backend.select(_OP, backend, logits)
    shard = shard_of(_OP, "logits", process_group, logits, -1, name)
    if _checks.DEBUG or shard is not None:
        keep = tokens != ignore_index
        keep = keep if mask is None else keep & (mask != 0)
        mask = mask if shard is None else keep
    if _checks.DEBUG:
        vocab = logits.shape[-1] if shard is None else shard.vocab
        _checks.tokens_in_range(_OP, tokens, keep, vocab)
    if name == "reference":
        if inplace_backward:
            raise ValueError(f"{_OP}: inplace_backward must be False on 'reference', got True")
        heat = scalar if per_token is None else per_token
        return reference.token_logprobs(
            logits, tokens, temperature=heat, mask=mask, ignore_index=ignore_index
        )
    scoring = Scoring(tokens, mask, per_token, [ignore_index], [scalar], shard, name)
    return TokenLogProbs(*score(logits, scoring, inplace_backward))


def score(logits: Tensor, scoring: Scoring, inplace_backward: bool) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of checked arguments, differentiable where the logits are."""
    if torch.is_grad_enabled() and logits.requires_grad:
        out: tuple[Tensor, Tensor] = _TokenLogProbs.apply(logits, scoring, inplace_backward)
        return out
    return _softmax(logits, scoring)[:2]


def check_logits(op: str, logits: Tensor) -> None:
    """A floating `(..., V)` with a contiguous last dimension, or ValueError or TypeError."""
    if _checks.floating(op, "logits", logits).dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(
            f"{op}: logits must have shape (..., V) with V >= 1, got {tuple(logits.shape)}"
        )
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        raise ValueError(
            f"{op}: logits must have a contiguous last dimension, got strides {logits.stride()}"
        )


def check_ignore_index(op: str, ignore_index: Any) -> None:
    """An int that fits in 64 bits, or TypeError or ValueError."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"{op}: ignore_index must be an int, got {type(ignore_index).__name__}")
    if not -(1 << 63) <= ignore_index < 1 << 63:
        raise ValueError(f"{op}: ignore_index must fit in 64 bits, got {ignore_index}")


def check_temperature(op: str, temperature: Any, main: Tensor) -> tuple[float, Tensor | None]:
    """The number and None, or 1 and the tensor for every token; `main` is `(..., V or H)`."""
    if not isinstance(temperature, Tensor):
        return _checks.positive(op, "temperature", temperature, main), None
    _checks.floating(op, "temperature", temperature)
    shape = main.shape[:-1]
    if temperature.device != main.device:
        raise ValueError(f"{op}: temperature must be on {main.device}, got {temperature.device}")
    try:
        heat = temperature.detach().expand(shape)
    except RuntimeError as error:
        raise ValueError(
            f"{op}: temperature must broadcast to {_checks.label(shape)},"
            f" got {tuple(temperature.shape)}"
        ) from error
    return 1.0, heat.to(compute_dtype(main))
