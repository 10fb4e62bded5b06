"""The same numbers in other layouts, some rows of a call, garbage where it must not matter."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_fast.testing.calls import Call

LAYOUTS = ("transposed", "sliced", "offset", "expanded")
_ALIGNED = (
    "logits",
    "hidden",
    "teacher_logits",
    "teacher_hidden",
    "extra_u",
)  # their last dimension stays contiguous


def laid_out(x: Tensor, kind: str, *, aligned: bool = False) -> Tensor:
    """x as a view with other strides (`aligned`: last dimension contiguous), garbage around it.

    "expanded" repeats x's first row (first element if flat), so its numbers differ from x's.
    """
    lead = x.dim() - 1 if aligned else x.dim()
    if kind == "transposed" and lead >= 2:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == "offset":
        buffer = _garbage((x.numel() + 1,), x)
        out = buffer[1:].view(x.shape)
        out.copy_(x)
        return out
    if kind == "expanded" and x.dim() and x.shape[0] and lead:
        return x[:1].clone().expand(x.shape)
    return _sliced(x, aligned)


def _sliced(x: Tensor, aligned: bool) -> Tensor:
    """Every second slot of a wider buffer; aligned rows keep their last dimension dense."""
    if x.dim() == 0:
        return x.clone()
    shape = list(x.shape)
    shape[-1] = shape[-1] + 5 if aligned else 2 * shape[-1]
    if aligned and x.dim() > 1:
        shape[0] *= 2
    buffer = _garbage(tuple(shape), x)
    out = buffer[..., 3 : 3 + x.shape[-1]] if aligned else buffer[..., ::2]
    out = out[::2] if aligned and x.dim() > 1 else out
    out.copy_(x)
    return out


def _garbage(shape: tuple[int, ...], like: Tensor) -> Tensor:
    fill = float("nan") if like.is_floating_point() else 1
    return torch.full(shape, fill, dtype=like.dtype, device=like.device)


def with_layout(call: Call, kind: str) -> tuple[Call, Call]:
    """(the call in that layout, the contiguous call of the same numbers).

    `cu_seqlens` stays: what it holds is the layout of everything else.
    """
    still = ("cu_seqlens",)
    views = {
        k: v if k in still else laid_out(v, kind, aligned=k in _ALIGNED)
        for k, v in call.tensors.items()
    }
    grads = {k: laid_out(v, kind) for k, v in call.cotangents.items()}
    dense = call._replace(
        tensors={k: v.clone(memory_format=torch.contiguous_format) for k, v in views.items()},
        cotangents={k: v.clone(memory_format=torch.contiguous_format) for k, v in grads.items()},
    )
    return call._replace(tensors=views, cotangents=grads), dense


def with_rows(call: Call, rows: Tensor) -> Call:
    """Only some rows (first dimension) of every tensor of a padded call."""
    return call._replace(
        tensors={k: v[rows] if v.dim() else v for k, v in call.tensors.items()},
        cotangents={k: v[rows] if v.dim() else v for k, v in call.cotangents.items()},
    )


def with_garbage(call: Call, value: float, live: Tensor | None = None) -> Call:
    """`value` in every slot that the mask drops, of every tensor that has such a slot.

    Integers take their largest value there (tokens far out of range), flags are set. `live`
    replaces the mask where an op reads more than it. Cotangents of dropped slots take it too.
    """
    keep = call.tensors["mask"] != 0 if live is None else live

    def spoil(name: str, x: Tensor) -> Tensor:
        if name == "mask" or x.shape[: keep.dim()] != keep.shape or keep.dim() == 0:
            return x
        drop = ~keep.reshape(keep.shape + (1,) * (x.dim() - keep.dim()))
        if x.dtype == torch.bool:
            return x | drop
        filler = value if x.is_floating_point() else torch.iinfo(x.dtype).max
        return x.masked_fill(drop, filler)

    return call._replace(
        tensors={k: spoil(k, v) for k, v in call.tensors.items()},
        cotangents={k: spoil(k, v) for k, v in call.cotangents.items()},
    )
