"""Precision of the head's products: the ops' own, whatever the process has set for its own."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

from ppo_fast.reference.common import exact

# Settings of the process that would round an operand or a partial sum: owner, name, exact value.
_BACKENDS: Any = torch.backends
_CUDA, _CPU = _BACKENDS.cuda.matmul, _BACKENDS.mkldnn.matmul
_SETTINGS: tuple[tuple[Any, str, Any], ...] = (
    (_CUDA, "fp32_precision", "ieee"),
    (_CUDA, "allow_bf16_reduced_precision_reduction", False),
    (_CUDA, "allow_fp16_reduced_precision_reduction", False),
    (_CPU, "fp32_precision", "ieee"),
)
_AS_EXACT = ("none", "ieee", False)


class _Settings:
    """The settings of the process, exact while any thread is inside `exact_products`."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.before: list[tuple[Any, str, Any]] = []

    def enter(self) -> None:
        with self.lock:
            self.inside += 1
            if self.inside > 1:
                return
            for owner, name, value in _SETTINGS:
                found = getattr(owner, name)
                if found not in _AS_EXACT:
                    # What is inherited is left to be inherited again.
                    inherited = found == _BACKENDS.fp32_precision
                    self.before.append((owner, name, "none" if inherited else found))
                    setattr(owner, name, value)

    def leave(self) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                while self.before:
                    setattr(*self.before.pop())


_settings = _Settings()


@contextlib.contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """No autocast, no TF32 or bf16 for fp32 operands, no 16-bit partial sums inside.

    A graph that is compiled keeps the settings of its process: they cannot change within it.
    """
    if torch.compiler.is_compiling():
        with exact(device):
            yield
        return
    _settings.enter()
    try:
        with exact(device):
            yield
    finally:
        _settings.leave()
