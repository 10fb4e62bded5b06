"""Seconds that a step spends in each op, its backward included."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import ppo_fast
from ppo_fast.testing import FACTORIES

Seconds = dict[str, float]


class _Mark(torch.autograd.Function):
    """An identity whose backward says that the gradient has come out of an op."""

    @staticmethod
    def forward(ctx: Any, note: Callable[[], None], x: Tensor) -> Tensor:
        ctx.note = note
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        ctx.note()
        return None, grad


class _Watched:
    """An op that adds up its own seconds.

    Autograd runs the newest node that is ready, so between the arrival of an output's gradient
    and the marks on the inputs it runs this op's nodes alone.
    """

    def __init__(self, op: Callable[..., Any], device: torch.device) -> None:
        self._op, self._device, self._began = op, device, 0.0
        self.seconds = 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args = tuple(self._marked(x) for x in args)
        kwargs = {name: self._marked(x) for name, x in kwargs.items()}
        self._start()
        result = self._op(*args, **kwargs)
        self._stop()
        for x in result:
            if isinstance(x, Tensor) and x.requires_grad:
                x.register_hook(lambda grad: self._start())
        return result

    def _marked(self, x: Any) -> Any:
        wanted = isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled()
        return _Mark.apply(self._stop, x) if wanted else x

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _start(self) -> None:
        self._began = self._now()

    def _stop(self) -> None:
        now = self._now()
        self.seconds += now - self._began
        self._began = now


@contextlib.contextmanager
def watched(device: torch.device) -> Iterator[Seconds]:
    """Seconds in each op of the public API while the block runs, filled in at its end."""
    ops = {name: _Watched(getattr(ppo_fast, name), device) for name in FACTORIES}
    seconds: Seconds = {}
    with mock.patch.multiple(ppo_fast, **ops):
        yield seconds
    seconds |= {name: op.seconds for name, op in ops.items() if op.seconds}
