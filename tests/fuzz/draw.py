"""Tensors and choices out of a fuzzer's bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
HALVES = (torch.float32, torch.bfloat16, torch.float16)
MASKS = (torch.bool, torch.uint8, torch.int8, torch.float32, torch.int64)
WILD = (torch.int32, torch.complex64, torch.float64, torch.bool, torch.float32)
# Around vectors of 8 and 16, chunks of 8, pieces of 1024 and what a mask's counters hold.
EDGES = (7, 8, 9, 15, 16, 17, 31, 33, 64, 127, 129, 255, 257, 1023, 1025, 2049)
ODD = (float("nan"), float("inf"), float("-inf"), 3e38, -3e38, 1e-40, 700.0, -0.0)
INTEGERS = (-100, -1, 2**31 - 1, -(2**31))


class Draw:
    """Reads choices from atheris' FuzzedDataProvider; the same bytes give the same call.

    `tame` calls are what a user means to write, of numbers on a grid of eighths: sums and
    differences of those are exact, so that no rounding decides a branch and every backend has to
    give the reference's result. The others hold any float, any stride, any dtype, wrong shapes.
    """

    def __init__(self, data: Any) -> None:
        self.data = data
        self.tame = self.one_in(3)
        self.rng = torch.Generator().manual_seed(self.upto(2**31))

    def upto(self, high: int) -> int:
        return self.data.ConsumeIntInRange(0, high)

    def one_in(self, n: int) -> bool:
        return self.upto(n - 1) == 0

    def one_of(self, options: Sequence[T]) -> T:
        return options[self.upto(len(options) - 1)]

    def wild(self, n: int) -> bool:
        """One in n, in calls that are not tame."""
        return not self.tame and self.one_in(n)

    def size(self) -> int:
        return self.one_of(EDGES) if self.one_in(4) else self.upto(12)

    def number(self, *usual: Any) -> Any:
        """A usual value of an option, or any number or object."""
        if not self.wild(6):
            return self.one_of(usual)
        return self.one_of((*ODD, -1.0, 1e-12, 1e12, True, "1", self.data.ConsumeFloat()))

    def name(self, options: Sequence[str]) -> Any:
        return self.one_of((None, "", 3)) if self.wild(20) else self.one_of(options)

    def strided(self, shape: Sequence[int], dtype: torch.dtype, fill: Tensor) -> Tensor:
        """`fill` in a layout of its own, in an allocation that ends with its last element."""
        if self.tame and self.one_in(2):
            return fill.to(dtype)
        strides, step = [0] * len(shape), 1
        order = list(range(len(shape)))
        if self.one_in(3):
            order.reverse()
        for i in reversed(order):
            strides[i] = step * self.one_of((1, 1, 1, 2, 3, 0)) if shape[i] else step
            step = max(step, strides[i] * shape[i] + self.upto(2))
        first = self.upto(3)
        empty = 0 in shape
        last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        base = torch.zeros(first if empty else first + 1 + last, dtype=dtype)
        view = base.as_strided(tuple(shape), strides, first)
        flat = base.as_strided((0 if empty else last + 1,), (1,), first)
        source = fill.to(dtype).reshape(-1)
        if source.numel() and flat.numel():
            flat.copy_(source[torch.arange(flat.numel()) % source.numel()])
        return view

    def floats(self, shape: Sequence[int], dtype: torch.dtype, scale: float = 2.0) -> Tensor:
        x = (torch.randn(tuple(shape), generator=self.rng) * scale * 8).round() / 8
        if not self.tame and self.one_in(2) and x.numel():
            spoilt = torch.rand(tuple(shape), generator=self.rng) < self.one_of((0.02, 0.3, 1.0))
            x = x.masked_fill(spoilt, self.one_of(ODD))
        return self.tensor(shape, dtype, x)

    def tensor(self, shape: Sequence[int], dtype: torch.dtype, fill: Tensor) -> Any:
        """A tensor of these numbers; seldom one that does not fit, or none at all."""
        if self.wild(12):
            if self.one_in(4):
                return self.one_of((None, 1.0, [1.0]))
            wrong = list(shape)
            if wrong and self.one_in(2):
                wrong[self.upto(len(wrong) - 1)] = self.one_of((0, 1, 2, 5))
            else:
                wrong.append(self.upto(3))
            return torch.zeros(wrong, dtype=dtype)
        return self.strided(shape, self.one_of(WILD) if self.wild(12) else dtype, fill)

    def mask(self, shape: Sequence[int]) -> Any:
        share = self.one_of((0.0, 0.1, 0.5, 0.9, 1.0))
        keep = torch.rand(tuple(shape), generator=self.rng) < share
        return self.tensor(shape, self.one_of(MASKS), keep)

    def tokens(self, shape: Sequence[int], vocab: int) -> Any:
        x = torch.randint(0, max(vocab, 1), tuple(shape), generator=self.rng)
        if not self.tame and self.one_in(2):
            spoilt = torch.rand(tuple(shape), generator=self.rng) < 0.3
            x = x.masked_fill(spoilt, self.one_of((*INTEGERS, vocab)))
        return self.tensor(shape, self.one_of((torch.int64, torch.int32)), x)

    def offsets(self, n: int) -> Any:
        """Of packed sequences over n slots, some of them empty; or garbage."""
        cuts = [self.upto(n) for _ in range(self.upto(5))]
        ends = torch.tensor([0, *sorted(cuts), n])
        if self.wild(4):
            ends[self.upto(len(ends) - 1)] = self.one_of((*INTEGERS, n + 1))
        if self.wild(20):
            ends = ends[: self.upto(1)]
        dtype = self.one_of((torch.int64, torch.int32))
        return ends.to(dtype) if self.tame else self.tensor(ends.shape, dtype, ends)

    def maybe(self, make: Any, *args: Any) -> Any:
        return make(*args) if self.one_in(2) else None
