"""A batch whose sequences are split over ranks: the check that all of them make the same call."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ppo_fast.corrections import Correction
from ppo_fast.ops.loss_options import LossOptions
from ppo_fast.surrogates import Surrogate

Call = TypeVar("Call", bound=Callable[..., Any])


def eager(fn: Call) -> Call:
    """The function; under `torch.compile` out of the graph, as Dynamo traces no exchange there."""
    return torch.compiler.disable(fn) if torch.compiler.is_compiling() else fn


def check_context(
    op: str,
    group: dist.ProcessGroup,
    main: Tensor,
    cu_seqlens: Tensor | None,
    options: LossOptions,
    correction: Correction | None,
    constants: tuple[Tensor | None, ...],
) -> None:
    """ValueError on every rank of `group` where one has other sequences or options.

    Otherwise they would wait for each other's sums for ever, or add up sums of different things.
    The host reads all ranks' numbers, for which it waits on a GPU.
    """
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{op}: context_group must be a ProcessGroup that this rank is in,"
            f" got {type(group).__name__}"
        )
    if cu_seqlens is None:
        count = main.shape[0] if main.dim() == 2 else 1
    else:
        count = cu_seqlens.numel() - 1
    call = [main.dtype, correction, *map(_shown, options), *(x is None for x in constants)]
    mine = torch.tensor([count, zlib.crc32(repr(call).encode())], device=main.device)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group=group)
    counts, calls = zip(*torch.stack(every).tolist(), strict=True)
    if len(set(counts)) > 1:
        raise ValueError(
            f"{op}: context_group must have as many sequences on every rank, got {list(counts)}"
        )
    others = [rank for rank, call in enumerate(calls) if call != calls[0]]
    if others:
        raise ValueError(
            f"{op}: context_group must have the same options, dtypes and given tensors on every"
            f" rank, got others than rank 0's on {others}"
        )


def _shown(option: Any) -> Any:
    """An option as something whose text is the same on every rank."""
    if isinstance(option, Surrogate):
        return option.name, option.couples, option.weighted
    return "tensor" if isinstance(option, Tensor) else option
