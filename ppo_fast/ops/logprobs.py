"""`token_logprobs`: log-probability and entropy of given tokens from one read of the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ppo_fast import _backend, _checks, reference
from ppo_fast._results import TokenLogProbs
from ppo_fast._schema import HANDLES, compute_dtype
from ppo_fast.ops.backward import once_differentiable

_OP = "token_logprobs"


class _TokenLogProbs(torch.autograd.Function):
    """Saves three numbers per row; the backward reads the logits once more."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, args: tuple[Any, ...], backend: str, inplace: bool
    ) -> Any:
        logprobs, entropy, row_max, log_sum = HANDLES["logprobs_fwd"][backend](logits, *args)
        ctx.save_for_backward(logits, *args[:3], entropy, row_max, log_sum)
        ctx.codes, ctx.params, ctx.backend, ctx.inplace = *args[3:], backend, inplace
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> Any:
        if grad_logprobs is None and grad_entropy is None:
            return None, None, None, None
        logits, *rest = ctx.saved_tensors
        args = (grad_logprobs, grad_entropy, logits, *rest, ctx.codes, ctx.params)
        if not ctx.inplace:
            return HANDLES["logprobs_bwd"][ctx.backend](*args), None, None, None
        HANDLES["logprobs_bwd_"][ctx.backend](*args)
        torch.autograd.graph.increment_version(logits)
        return logits.detach(), None, None, None


def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
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
        inplace_backward: let the backward write the gradient over the logits. They must not be
            used by anything else; their version is bumped, so a second backward raises.
        backend: "reference", "cpu" or "triton"; by default the fastest for the device.

    Returns:
        `TokenLogProbs(logprobs, entropy)`, each `(...)` fp32 (fp64 for fp64 logits). Masked or
        ignored rows are 0, their gradient exactly 0, and they are never read.

    Raises:
        ValueError: shape, device or range. TypeError: dtype. IndexError: see `tokens`.
    """
    check_logits(_OP, logits)
    shape = logits.shape[:-1]
    _checks.indices(_OP, "tokens", tokens, shape, logits.device)
    mask = _checks.flags(_OP, "mask", mask, shape, logits.device)
    scalar, per_token = check_temperature(_OP, temperature, logits)
    check_ignore_index(_OP, ignore_index)
    if _checks.DEBUG:
        keep = tokens != ignore_index
        keep = keep if mask is None else keep & (mask != 0)
        _checks.tokens_in_range(_OP, tokens, keep, logits.shape[-1])
    name = _backend.select(_OP, backend, logits)
    if name == "reference":
        if inplace_backward:
            raise ValueError(f"{_OP}: inplace_backward must be False on 'reference', got True")
        heat = scalar if per_token is None else per_token
        return reference.token_logprobs(
            logits, tokens, temperature=heat, mask=mask, ignore_index=ignore_index
        )
    args = (tokens, mask, per_token, [ignore_index], [scalar])
    if torch.is_grad_enabled() and logits.requires_grad:
        return TokenLogProbs(*_TokenLogProbs.apply(logits, args, name, inplace_backward))
    return TokenLogProbs(*HANDLES["logprobs_fwd"][name](logits, *args)[:2])


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
    """An int, or TypeError."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"{op}: ignore_index must be an int, got {type(ignore_index).__name__}")


def check_temperature(op: str, temperature: Any, main: Tensor) -> tuple[float, Tensor | None]:
    """The number and None, or 1 and the tensor for every token; `main` is `(..., V or H)`."""
    if not isinstance(temperature, Tensor):
        return _checks.positive(op, "temperature", temperature), None
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
