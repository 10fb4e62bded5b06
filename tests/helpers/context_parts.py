"""Calls of the policy losses split along their sequences over ranks, and their results joined."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from ppo_fast import Stats
from ppo_fast.testing import Call

LAYOUTS = ("blocks", "zigzag", "last empty")
# What every rank has whole.
_WHOLE = (
    "weight",
    "bias",
    "sequence_weights",
    "cu_seqlens",
    "row_index",
    "teacher_weight",
    "teacher_bias",
)
Results = dict[str, Tensor]


def _pieces(length: int, world: int, layout: str) -> list[Tensor]:
    """Each rank's places of one sequence; a short one leaves some ranks with none."""
    every = torch.arange(length)
    if layout == "blocks":
        return list(every.tensor_split(world))
    if layout == "last empty":
        return [*every.tensor_split(world - 1), every[:0]]
    halves = every.tensor_split(2 * world)
    return [torch.cat([halves[r], halves[-1 - r]]) for r in range(world)]


def _shape(call: Call) -> torch.Size:
    return call.tensors["advantages"].shape


def _rows(call: Call, rank: int, world: int, layout: str) -> tuple[Tensor, Tensor | None]:
    """Flat slots that are on a rank, and its own offsets."""
    if "cu_seqlens" not in call.tensors:
        shape = _shape(call)
        length = shape[-1]
        own = _pieces(length, world, layout)[rank]
        rows = torch.arange(shape.numel()).view(shape)[..., own]
        return rows.reshape(-1), None
    spans = itertools.pairwise(call.tensors["cu_seqlens"].tolist())
    parts = [first + _pieces(last - first, world, layout)[rank] for first, last in spans]
    ends = torch.tensor([0, *map(len, parts)]).cumsum(0)
    return torch.cat(parts), ends.to(call.tensors["cu_seqlens"].dtype)


def part(call: Call, rank: int, world: int, layout: str) -> Call:
    """A rank's own part of every sequence."""
    rows, ends = _rows(call, rank, world, layout)
    shape = _shape(call)
    own = shape if len(shape) == 1 else (shape[0], rows.numel() // max(shape[0], 1))
    own = (rows.numel(),) if len(shape) == 1 else own

    def split(x: Tensor) -> Tensor:
        tail = x.shape[len(shape) :]
        return x.reshape(-1, *tail)[rows].view(*own, *tail)

    tensors = {k: x if k in _WHOLE else split(x) for k, x in call.tensors.items()}
    if ends is not None:
        tensors["cu_seqlens"] = ends
    if "row_index" in tensors:
        chosen = torch.isin(rows, tensors.pop("row_index"))
        if not chosen.all():  # a rank that computes all of its rows passes none
            tensors["row_index"] = chosen.nonzero()[:, 0]
    options = dict(call.options)
    if "support" in options:
        options["support"] = options["support"].rows(rows)
    return call._replace(tensors=tensors, options=options)


def joined(call: Call, results: list[Results], layout: str) -> Results:
    """One call's results, from all ranks': per token in their places, everything else added."""
    shape, out = _shape(call), {}
    rows = [_rows(call, r, len(results), layout)[0] for r in range(len(results))]
    for name in results[0]:
        every = [r[name] for r in results]
        if name == "stats":
            total = functools.reduce(lambda a, b: a + b, map(Stats, every))
            out[name] = total.values
        elif name == "loss" or name.removeprefix("grad_") in _WHOLE:
            out[name] = functools.reduce(torch.add, every)
        else:
            tail = every[0].shape[len(shape) :]
            whole = every[0].new_empty((shape.numel(), *tail))
            for own, x in zip(rows, every, strict=True):
                whole[own] = x.reshape(-1, *tail)
            out[name] = whole.view(*shape, *tail)
    return out
