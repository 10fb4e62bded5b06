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
from ppo_fast.ops.head import HeadOperands, HeadOptions, HeadRows
from ppo_fast.ops.logprobs import check_ignore_index, check_temperature, kept_tokens
from ppo_fast.ops.shards import check_vocab_size, shard_of
from ppo_fast.ops.support import check_support
from ppo_fast.support import Support


class HeadForm(NamedTuple):
    """Logits that a head makes of its product, as a caller gives them:
    cap·tanh(logit_scale·(hidden·weightᵀ + u·bᵀ + bias) / cap) / temperature, of `vocab_size` ids,
    `extra` being (u, b)."""

    bias: Tensor | None
    temperature: float | Tensor
    softcap: float | None
    extra: tuple[Tensor, Tensor] | None
    logit_scale: float
    vocab_size: int | None


class HeadInputs(NamedTuple):
    """Arguments of one call; `keep` is bool in the tokens' shape, ignored tokens left out."""

    operands: HeadOperands
    tokens: Tensor
    keep: Tensor | None
    row_index: Tensor | None
    temperature: float | Tensor
    logit_scale: float
    divisor: Tensor | None  # of every token, where they differ: see `over_scale`
    rows: HeadRows
    options: HeadOptions
    support: Support | None

    @property
    def hidden(self) -> Tensor:
        """Hidden states, (..., H)."""
        return self.operands.hidden

    @property
    def weight(self) -> Tensor:
        """The head's weight, (V, H)."""
        return self.operands.weight

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
        hidden, weight, bias, u, b = self.operands
        return {
            "hidden": hidden,
            "weight": weight,
            "tokens": self.tokens,
            "bias": bias,
            "extra": None if u is None else (u, b),
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
    operands = plain_head(op, hidden, weight, form.bias, form.extra, process_group)
    hidden, weight = operands.hidden, operands.weight
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
        operands,
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
    extra: Any,
    group: dist.ProcessGroup | None,
    owner: str = "",
) -> HeadOperands:
    """A head's tensors, of one type and on one device; `owner` stands before their names."""
    u, b = _pair(op, extra)
    x, w = f"{owner}hidden", f"{owner}weight"
    require_plain(op, x, hidden)
    weight = plain_parameter(op, w, weight, group)
    bias = None if bias is None else plain_parameter(op, f"{owner}bias", bias, group)
    if extra is not None:
        require_plain(op, "extra[0]", u)
        b = plain_parameter(op, "extra[1]", b, group)
    if _checks.floating(op, x, hidden).dim() < 1:
        raise ValueError(f"{op}: {x} must have shape (..., H), got {tuple(hidden.shape)}")
    _check_weight(op, w, weight, hidden, "H")
    if weight.shape[0] < (1 if group is None else 0):
        raise ValueError(f"{op}: {w} must have at least one row, got {tuple(weight.shape)}")
    if extra is not None:
        _check_extra(op, u, b, hidden, weight)
    hidden, weight, u, b = _autocast(hidden, weight, u, b)
    for name, y in ((w, weight), ("extra[0]", u), ("extra[1]", b)):
        if y is not None and y.dtype != hidden.dtype:
            raise TypeError(f"{op}: {name} must be {hidden.dtype} as {x} is, got {y.dtype}")
    for name, y in ((x, hidden), ("extra[0]", u)):
        if y is not None and y.shape[-1] > 1 and y.stride(-1) != 1:
            raise ValueError(
                f"{op}: {name} must have a contiguous last dimension, got strides {y.stride()}"
            )
    if bias is not None:
        _checks.sized(op, f"{owner}bias", bias, hidden, (weight.shape[0],), "(V,)")
    return HeadOperands(hidden, weight, bias, u, b)


def _pair(op: str, extra: Any) -> tuple[Any, Any]:
    """Both tensors of `extra`, or None twice."""
    if extra is None:
        return None, None
    if not isinstance(extra, tuple | list) or len(extra) != 2:
        got = f"{len(extra)} of them" if isinstance(extra, tuple | list) else type(extra).__name__
        raise TypeError(f"{op}: extra must be a pair of tensors (u, b), got {got}")
    return extra[0], extra[1]


def _check_extra(op: str, u: Any, b: Any, hidden: Tensor, weight: Tensor) -> None:
    lead = hidden.shape[:-1]
    if _checks.floating(op, "extra[0]", u).dim() != len(lead) + 1 or u.shape[:-1] != lead:
        raise ValueError(
            f"{op}: extra[0] must have shape (..., r) beside hidden {tuple(hidden.shape)}, got"
            f" {tuple(u.shape)}"
        )
    if u.shape[-1] < 1:
        raise ValueError(f"{op}: extra[0] must have a rank r of 1 or more, got {tuple(u.shape)}")
    if u.device != hidden.device:
        raise ValueError(f"{op}: extra[0] must be on {hidden.device}, got {u.device}")
    _check_weight(op, "extra[1]", b, u, "r")
    if b.shape[0] != weight.shape[0]:
        raise ValueError(
            f"{op}: extra[1] must have the weight's {weight.shape[0]} rows, got {tuple(b.shape)}"
        )


def _check_weight(op: str, name: str, weight: Any, rows: Tensor, letter: str) -> None:
    """A matrix (V, K) on the device of rows (..., K), K being called `letter`."""
    width = rows.shape[-1]
    if _checks.floating(op, name, weight).dim() != 2 or weight.shape[1] != width:
        raise ValueError(
            f"{op}: {name} must have shape (V, {letter}) = (V, {width}), got {tuple(weight.shape)}"
        )
    if weight.device != rows.device:
        raise ValueError(f"{op}: {name} must be on {rows.device}, got {weight.device}")


def _autocast(hidden: Tensor, *others: Any) -> tuple[Any, ...]:
    """The operands of the products, in the type that autocast gives them."""
    kind = hidden.device.type
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if not enabled or hidden.dtype == torch.float64:
        return hidden, *others
    dtype = torch.get_autocast_dtype(kind)
    return tuple(None if x is None else x.to(dtype) for x in (hidden, *others))


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
