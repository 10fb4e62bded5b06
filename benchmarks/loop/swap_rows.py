"""Inputs and samples of the rows that time a trainer's functions beside what replaces them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.timing import Sampler

MIN_SAMPLE = 4e-3  # seconds of a sample, by repeating short calls


class Draws:
    """Inputs of a row, from one seed."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator)

    def leaf(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (scale * self.normal(*shape)).requires_grad_()

    def tokens(self, rows: int, vocab: int) -> Tensor:
        return torch.randint(vocab, (rows,), generator=self._generator)


def sampler(call: Callable[[], Any]) -> Sampler:
    """Samples of a call: seconds of the processor each."""

    def seconds(number: int) -> float:
        start = time.process_time()
        for _ in range(number):
            call()
        return time.process_time() - start

    number = 1
    while seconds(number) < MIN_SAMPLE:
        number *= 2
    return lambda: seconds(number) / number
