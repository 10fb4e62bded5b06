"""Weights that their owner splits over ranks: DTensors (FSDP2, tensor parallel) and ZeRO-3's."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def require_plain(op: str, name: str, x: Any) -> None:
    """Raise TypeError for a DTensor: its rows may be all, or this rank's."""
    if _is_distributed(x):
        raise TypeError(
            f"{op}: {name} must be a plain tensor, to_local() or full_tensor() of it, got a"
            f" DTensor of placements {x.placements}"
        )


def _is_distributed(x: Any) -> bool:
    """True for a DTensor, without an import of its module."""
    return hasattr(x, "full_tensor")


def plain_parameter(op: str, name: str, x: Any, group: dist.ProcessGroup | None) -> Any:
    """A DTensor as this rank's share with a group, whole without one; others as they are.

    Raises ValueError for a ZeRO-3 parameter that is not gathered.
    """
    shape = getattr(x, "ds_shape", None)  # of DeepSpeed, whose own shape is (0,) unless gathered
    if shape is not None and x.shape != shape:
        raise ValueError(
            f"{op}: {name} must be whole, got a ZeRO-3 partition of shape {tuple(x.shape)} for"
            f" {tuple(shape)}: call the op and its backward inside"
            f" deepspeed.zero.GatheredParameters([{name}])"
        )
    if not _is_distributed(x):
        return x
    return _Whole.apply(x) if group is None else x.to_local()


def require_whole(weight: Tensor, size: int) -> None:
    """Raise RuntimeError where a weight of `size` rows or more in the forward has gone since."""
    if weight.dim() != 2 or weight.shape[0] < size:
        raise RuntimeError(
            f"the head's weight has shape {tuple(weight.shape)} in the backward, which needs its"
            f" {size} rows again: keep it gathered (deepspeed.zero.GatheredParameters) until then"
        )


class _Whole(torch.autograd.Function):
    """A DTensor gathered. Its gradient is the mean over the ranks, as FSDP2's own is.

    `full_tensor` would give every rank a slice of its own gradient. Ranks of FSDP2 have tokens of
    their own, whose gradients would be lost; where all have the same, their mean is that of one.
    """

    @staticmethod
    def forward(ctx: Any, x: Any) -> Tensor:
        ctx.mesh, ctx.placements = x.device_mesh, x.placements
        whole: Tensor = x.full_tensor()
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        from torch.distributed.tensor import DTensor, Partial

        each = DTensor.from_local(grad, ctx.mesh, [Partial()] * ctx.mesh.ndim, run_check=False)
        return each.redistribute(placements=ctx.placements) / ctx.mesh.size()
