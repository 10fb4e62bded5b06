"""Bad input as data: an op, the change to a good call, the error, and the text of its message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

import ppo_fast
from ppo_fast import testing

STATS = {"linear_token_stats": testing.token_stats_call}
EVERY = testing.FACTORIES | testing.HEADS | testing.DIVERGENCES | STATS
ONES = torch.ones(4, 9)
SHAPE, TYPE = ValueError, TypeError
Change = Callable[[dict[str, Any]], dict[str, Any]]


class Row(NamedTuple):
    op: str
    change: str | Change
    value: Any
    error: type[Exception]
    text: str
    packed: bool = False


def cut(name: str) -> Change:
    """One step fewer."""
    return lambda args: {name: args[name][:, :-1]}


def cast(name: str, dtype: torch.dtype) -> Change:
    return lambda args: {name: args[name].to(dtype)}


def moved(name: str) -> Change:
    return lambda args: {name: args[name].to("meta")}


def both(**values: Any) -> Change:
    return lambda args: values


def assert_refused(row: Row) -> None:
    """The changed call raises, naming the op, the argument and what was given."""
    call = EVERY[row.op](
        (40,) if row.packed else (4, 9), **({"packed": True} if row.packed else {})
    )
    args = {**call.tensors, **call.options, "backend": "reference"}
    change = {row.change: row.value} if isinstance(row.change, str) else row.change(args)
    with pytest.raises(row.error, match=row.text) as caught:
        getattr(ppo_fast, row.op)(**testing.arguments({**args, **change}))
    assert str(caught.value).startswith(f"{row.op}: ")
