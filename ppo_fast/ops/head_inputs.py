"""Validated arguments of the linear ops, and the rows that are computed."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ppo_fast import _backend, _checks, reference
from ppo_fast.ops.distributed_weight import plain_parameter, require_plain
from ppo_fast.ops.exact import exact_products
from ppo_fast.ops.head import HeadOptions, HeadRows
from ppo_fast.ops.logprobs import check_ignore_index, check_temperature, kept_tokens
from ppo_fast.ops.shards import check_vocab_size, shard_of
from ppo_fast.ops.support import check_support
from ppo_fast.support import Support


class HeadForm(NamedTuple):
    """Logits that a head makes of its product, as a caller gives them:
    cap·tanh(logit_scale·(hidden·weightᵀ + bias) / cap) / temperature, of `vocab_size` ids."""

    bias: Tensor | None
    temperature: float | Tensor
    softcap: float | None
    logit_scale: float
    vocab_size: int | None


class HeadInputs(NamedTuple):
    """Arguments of one call; `keep` is bool in the tokens' shape, ignored tokens left out."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    tokens: Tensor
    keep: Tensor | None
    row_index: Tensor | None
    temperature: float | Tensor
    logit_scale: float
    divisor: Tensor | None  # of every token, where they differ: see `over_scale`
    rows: HeadRows
    options: HeadOptions
    support: Support | None

    def named(self) -> Tensor:
        """The unmasked rows that `row_index` names, (N,) bool."""
        keep = all_kept(self.tokens) if self.keep is None else self.keep
        return reference.linear_logprobs.rows_of(self.tokens, keep, self.row_index).reshape(-1)

    def whole(self) -> HeadInputs:
        """The rows that take the whole vocabulary, alone."""
        support: Any = self.support
        keep = self.named().view(self.tokens.shape)
        rows = computed_rows(self.tokens, keep, self.divisor, support.whole_index)
        return self._replace(rows=rows, support=None)

    def exact(self) -> contextlib.AbstractContextManager[Any]:
        """The op's own precision inside."""
        return exact_products(self.hidden.device)

    def for_reference(self) -> dict[str, Any]:
        """Keyword arguments of the reference."""
        return {
            "hidden": self.hidden,
            "weight": self.weight,
            "tokens": self.tokens,
            "bias": self.bias,
            "temperature": self.temperature,
            "softcap": self.options.softcap,
            "logit_scale": self.logit_scale,
            "vocab_size": self.options.vocab,
            "mask": self.keep,
            "row_index": self.row_index,
            "support": self.support,
        }


def check_head(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    form: HeadForm,
    *,
    mask: Tensor | None,
    ignore_index: int,
    row_index: Tensor | None,
    process_group: dist.ProcessGroup | None,
    support: Support | None,
    backend: str | None,
    beside: str | None = None,
) -> HeadInputs:
    """The arguments of the chunks, or ValueError, TypeError or IndexError.

    `beside` names another argument that CUDA C++ does not take.
    """
    hidden, weight, bias = plain_head(op, hidden, weight, form.bias, process_group)
    shape, device = hidden.shape[:-1], hidden.device
    _checks.indices(op, "tokens", tokens, shape, device)
    mask = _checks.flags(op, "mask", mask, shape, device)
    scalar, per_token = check_temperature(op, form.temperature, hidden)
    check_ignore_index(op, ignore_index)
    cap = form.softcap
    cap = None if cap is None else _checks.positive(op, "softcap", cap, hidden)
    factor = _checks.positive(op, "logit_scale", form.logit_scale, hidden)
    number, divisor, left = over_scale(op, scalar, per_token, cap, factor, hidden)
    beside = beside if support is None else "a support"
    name = _backend.select_beside(op, backend, hidden, beside)
    shard = shard_of(op, "weight", process_group, weight, 0, name, form.vocab_size)
    if shard is None:
        size = check_vocab_size(op, form.vocab_size, weight.shape[0])
    else:
        size = shard.size
    options = HeadOptions(number, cap, shard, name, size, left)
    keep = kept_tokens(tokens, mask, ignore_index)
    check_support(op, support, tokens, keep, options.vocab)
    if _checks.DEBUG:
        _checks.tokens_in_range(op, tokens, keep, options.vocab)
    if row_index is not None:
        row_index = _check_rows(op, row_index, tokens)
    return HeadInputs(
        hidden,
        weight,
        bias,
        tokens,
        keep,
        row_index,
        scalar if per_token is None else per_token,
        factor,
        divisor,
        computed_rows(tokens, keep, divisor, row_index),
        options,
        support,
    )


def over_scale(
    op: str, number: float, tensor: Tensor | None, cap: float | None, scale: float, main: Tensor
) -> tuple[float, Tensor | None, float]:
    """A temperature, and the factor that is left to the logits.

    cap·tanh(scale·x / cap) / τ has the factor before the cap; without one it is x / (τ / scale).
    """
    if cap is not None or scale == 1.0:
        return number, tensor, scale
    number = _checks.positive(op, "temperature / logit_scale", number / scale, main)
    return number, None if tensor is None else tensor / scale, 1.0


def plain_head(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    group: dist.ProcessGroup | None,
    owner: str = "",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A head's tensors, of one type and on one device; `owner` stands before their names."""
    require_plain(op, f"{owner}hidden", hidden)
    weight = plain_parameter(op, f"{owner}weight", weight, group)
    bias = None if bias is None else plain_parameter(op, f"{owner}bias", bias, group)
    return _cast(op, hidden, weight, bias, owner, least=1 if group is None else 0)


def _cast(
    op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, owner: str, least: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    x, w = f"{owner}hidden", f"{owner}weight"
    if _checks.floating(op, x, hidden).dim() < 1:
        raise ValueError(f"{op}: {x} must have shape (..., H), got {tuple(hidden.shape)}")
    width = hidden.shape[-1]
    if _checks.floating(op, w, weight).dim() != 2 or weight.shape[1] != width:
        raise ValueError(
            f"{op}: {w} must have shape (V, H) = (V, {width}), got {tuple(weight.shape)}"
        )
    if weight.shape[0] < least:
        raise ValueError(f"{op}: {w} must have at least one row, got {tuple(weight.shape)}")
    if weight.device != hidden.device:
        raise ValueError(f"{op}: {w} must be on {hidden.device}, got {weight.device}")
    kind = hidden.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if autocast and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if weight.dtype != hidden.dtype:
        raise TypeError(f"{op}: {w} must be {hidden.dtype} as {x} is, got {weight.dtype}")
    if width > 1 and hidden.stride(-1) != 1:
        raise ValueError(
            f"{op}: {x} must have a contiguous last dimension, got strides {hidden.stride()}"
        )
    if bias is not None:
        _checks.sized(op, f"{owner}bias", bias, hidden, (weight.shape[0],), "(V,)")
    return hidden, weight, bias


def _check_rows(op: str, index: Any, tokens: Tensor) -> Tensor:
    n = tokens.numel()
    if _checks.tensor(op, "row_index", index).dtype != torch.int64 or index.dim() != 1:
        raise TypeError(
            f"{op}: row_index must be (R,) int64, got {tuple(index.shape)} {index.dtype}"
        )
    if index.device != tokens.device:
        raise ValueError(f"{op}: row_index must be on {tokens.device}, got {index.device}")
    if index.device.type == "cpu" or _checks.DEBUG:
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= n):
            raise ValueError(
                f"{op}: row_index must be in [0, {n}), got {int(index.min())}..{int(index.max())}"
            )
        if bool((index[1:] <= index[:-1]).any()):
            at = int((index[1:] <= index[:-1]).nonzero()[0])
            raise ValueError(
                f"{op}: row_index must ascend without repeats,"
                f" got {int(index[at])} before {int(index[at + 1])}"
            )
    # Elsewhere what is out of range is not read out of bounds.
    return index.clamp(0, max(0, n - 1))


def computed_rows(
    tokens: Tensor, keep: Tensor, temperature: Tensor | None, row_index: Tensor | None
) -> HeadRows:
    """The rows that are computed: on a CPU the unmasked ones, else `row_index` or all."""
    index, flat = row_index, keep.reshape(-1)
    on_host = tokens.device.type == "cpu"
    if on_host and index is not None:
        index = index[flat[index]]
    elif on_host and not bool(flat.all()):
        index = flat.nonzero()[:, 0]
    rows = HeadRows(index, tokens, None, None, tokens.numel())
    return rows._replace(
        tokens=rows.pick(tokens),
        keep=None if on_host else rows.pick(flat),
        temperature=rows.pick_some(temperature),
    )


def all_kept(tokens: Tensor) -> Tensor:
    """A mask that keeps every token."""
    return torch.ones(tokens.shape, dtype=torch.bool, device=tokens.device)
