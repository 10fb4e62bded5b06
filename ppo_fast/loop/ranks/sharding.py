"""FSDP2: every weight is split over the ranks, layer by layer, and whole only while it is used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(root: nn.Module, layers: list[nn.Module]) -> None:
    """Shard `layers` one by one and the rest of `root` together.

    Gradients are summed over the ranks, not averaged: a loss divides by the tokens of all ranks.
    The root's own weights, the output head's among them, stay whole from a forward to the end of
    its backward, so that the head can be used outside the model.
    """
    for module in (*layers, root):
        fully_shard(module)
        module.set_gradient_divide_factor(1.0)  # type: ignore[operator]
        module.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Keep all weights of a sharded model on every rank; nothing is sent inside.

    A rollout reads every weight once a token, and its ranks end after different numbers of them.
    """
    sharded = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for module in sharded:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in sharded:
            module.set_reshard_after_forward(module is not model, recurse=False)
            module.reshard()


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """The whole weights on the CPU, by name; every rank must ask."""
    state: dict[str, Any] = model.state_dict()
    return {name: full(x) for name, x in state.items()}


def full(x: Tensor) -> Tensor:
    """A tensor whole and on the CPU; every rank must ask."""
    return (x.full_tensor() if isinstance(x, DTensor) else x).cpu()


def split_like(x: Tensor, p: Tensor) -> Tensor:
    """The whole `x`, which every rank has, sharded as `p` of its shape is; nothing is sent."""
    if not isinstance(p, DTensor) or x.shape != p.shape:
        return x
    whole = x.to(p.device)
    return distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)
