"""`token_logprobs`: log-probability and entropy of given tokens from one read of the logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ppo_fast import _backend, _checks, reference
from ppo_fast._boundary.options import Scoring, Softmax
from ppo_fast._boundary.schema import compute_dtype
from ppo_fast._results import TokenLogProbs
from ppo_fast.ops.backward import once_differentiable, saveable
from ppo_fast.ops.forward_mode import derivatives
from ppo_fast.ops.shards import Shard, shard_of, softmax_gradient, softmax_of
from ppo_fast.ops.support import check_support, score_kept
from ppo_fast.support import Support

_OP = "token_logprobs"


class _TokenLogProbs(torch.autograd.Function):
    """Saves three numbers per row; the backward reads the logits once more."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, constants: tuple[Scoring, Shard | None, str, bool]
    ) -> Any:
        s, shard, backend, _ = constants
        softmax = softmax_of(backend, logits, s, shard)
        tensors = saveable(s.tokens, s.mask, s.temperature_tensor)
        ctx.save_for_backward(logits, *tensors, *softmax)
        ctx.constants = constants
        ctx.set_materialize_grads(False)
        return softmax.logprobs, softmax.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> Any:
        if grad_logprobs is None and grad_entropy is None:
            return None, None
        logits, tokens, mask, temperature, *numbers = ctx.saved_tensors
        given, shard, backend, inplace = ctx.constants
        s: Scoring = given._replace(tokens=tokens, mask=mask, temperature_tensor=temperature)
        softmax = Softmax(*numbers)

        grads = (grad_logprobs, grad_entropy)
        dlogits = softmax_gradient(backend, logits, s, softmax, grads, shard, inplace)
        if inplace:
            torch.autograd.graph.increment_version(logits)
        return dlogits, None


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
    support: Support | None = None,
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
        process_group: ranks that hold a share of the vocabulary each, in rank order, with
            identical tokens (global ids) and masks; `logits` are this rank's. Shares may differ
            in size and be empty.
        inplace_backward: let the backward write the gradient over the logits. They must not be
            used by anything else; their version is bumped, so a second backward raises.
        support: kept ids of every row, over which softmax and entropy are taken, as a sampler with
            top-k, top-p or min-p drew from them. Not on "cuda".
        backend: "reference", "cpu", "triton" or "cuda"; by default the device's.

    Returns:
        `TokenLogProbs(logprobs, entropy)`, each `(...)` fp32 (fp64 for fp64 logits). Masked or
        ignored rows are 0, their gradient exactly 0, and they are never read.

    Raises:
        ValueError: shape, device or range. TypeError: dtype. IndexError: see `tokens`.
        NotImplementedError: a forward-mode tangent of a constant, or on a named kernel backend.
    """
    least = 1 if process_group is None else 0
    s = check_scoring(_OP, logits, tokens, mask, temperature, ignore_index, least)
    name = _backend.select_beside(_OP, backend, logits, None if support is None else "a support")
    shard = shard_of(_OP, "logits", process_group, logits, -1, name)
    if shard is not None and shard.size == 0:
        # One logit, −∞: no kernel meets V = 0.
        logits = torch.nn.functional.pad(logits, (0, 1), value=-torch.inf)
    if shard is not None or support is not None:
        # Every rank masks what is ignored, whoever holds its label.
        s = s._replace(mask=kept(s))
    vocab = logits.shape[-1] if shard is None else shard.vocab
    check_support(_OP, support, tokens, s.mask, vocab)
    if _checks.DEBUG:
        _checks.tokens_in_range(_OP, tokens, kept(s), vocab)
    if name == "reference":
        if inplace_backward:
            raise ValueError(f"{_OP}: inplace_backward must be False on 'reference', got True")
        return reference.token_logprobs(
            logits,
            tokens,
            temperature=s.divisor(),
            mask=s.mask,
            ignore_index=ignore_index,
            support=support,
        )
    return TokenLogProbs(*score(logits, s, shard, name, inplace_backward, support))


def score(
    logits: Tensor,
    s: Scoring,
    shard: Shard | None,
    backend: str,
    inplace_backward: bool,
    support: Support | None,
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of checked arguments, differentiable where the logits are."""
    if support is not None:
        return score_kept(logits, s, support, shard, backend, inplace_backward)
    if torch.is_grad_enabled() and logits.requires_grad:
        constants = (s, shard, backend, inplace_backward)
        out: tuple[Tensor, Tensor] = _TokenLogProbs.apply(logits, constants)
        return out
    softmax = softmax_of(backend, logits, s, shard)
    return softmax.logprobs, softmax.entropy


def kept(s: Scoring) -> Tensor:
    """The tokens that are neither masked nor ignored, bool."""
    return kept_tokens(s.tokens, s.mask, s.ignore_index)


def kept_tokens(tokens: Tensor, mask: Tensor | None, ignore_index: int) -> Tensor:
    """The same of the arguments themselves."""
    keep = tokens != ignore_index
    if mask is None:
        return keep
    return keep & (mask if mask.dtype == torch.bool else mask != 0)


def check_scoring(
    op: str,
    logits: Tensor,
    tokens: Tensor,
    mask: Any,
    temperature: Any,
    ignore_index: Any,
    least: int = 1,
) -> Scoring:
    """The arguments other than the logits, or ValueError or TypeError."""
    check_logits(op, logits, least=least)
    shape = logits.shape[:-1]
    _checks.indices(op, "tokens", tokens, shape, logits.device)
    mask = _checks.flags(op, "mask", mask, shape, logits.device)
    number, tensor = check_temperature(op, temperature, logits)
    check_ignore_index(op, ignore_index)
    return Scoring(tokens, mask, tensor, number, ignore_index)


def check_logits(op: str, logits: Tensor, name: str = "logits", least: int = 1) -> None:
    """A floating `(..., V)` with a contiguous last dimension, or ValueError or TypeError."""
    if _checks.floating(op, name, logits).dim() < 1 or logits.shape[-1] < least:
        raise ValueError(
            f"{op}: {name} must have shape (..., V) with V >= {least}, got {tuple(logits.shape)}"
        )
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        raise ValueError(
            f"{op}: {name} must have a contiguous last dimension, got strides {logits.stride()}"
        )


def check_ignore_index(op: str, ignore_index: Any) -> None:
    """An int that fits in 64 bits, or TypeError or ValueError."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"{op}: ignore_index must be an int, got {type(ignore_index).__name__}")
    if not -(1 << 63) <= ignore_index < 1 << 63:
        raise ValueError(f"{op}: ignore_index must fit in 64 bits, got {ignore_index}")


def check_temperature(
    op: str, temperature: Any, main: Tensor, name: str = "temperature"
) -> tuple[float, Tensor | None]:
    """The number and None, or 1 and the tensor for every token; `main` is `(..., V or H)`."""
    if not isinstance(temperature, Tensor):
        return _checks.positive(op, name, temperature, main), None
    _checks.floating(op, name, temperature)
    shape = main.shape[:-1]
    if temperature.device != main.device:
        raise ValueError(f"{op}: {name} must be on {main.device}, got {temperature.device}")
    try:
        expanded = temperature.detach().expand(shape)
    except RuntimeError as error:
        raise ValueError(
            f"{op}: {name} must broadcast to {_checks.label(shape)},"
            f" got {tuple(temperature.shape)}"
        ) from error
    return 1.0, expanded.to(compute_dtype(main))
