"""Input errors of the ops: checks of the caller's arguments, and their messages.

Every message reads `op: argument must be X, got Y`. Nothing here looks at a tensor's content,
so nothing synchronises with the device, unless `PPO_FAST_DEBUG=1`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

DEBUG = os.environ.get("PPO_FAST_DEBUG", "") == "1"

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_BYTES = (torch.bool, torch.uint8, torch.int8)
_INTEGERS = (torch.int64, torch.int32)
_FP32 = torch.finfo(torch.float32)


def tensor(op: str, name: str, x: Any) -> Tensor:
    """`x` itself, which must be a tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    return x


def floating(op: str, name: str, x: Any) -> Tensor:
    """`x` itself, which must be a tensor of a supported floating type."""
    if tensor(op, name, x).dtype not in _FLOATS:
        raise TypeError(
            f"{op}: {name} must be float32, bfloat16, float16 or float64, got {x.dtype}"
        )
    return x


def label(shape: Sequence[int], time_major: bool = False) -> str:
    """A main tensor's shape, as messages write it."""
    dims = {1: "(N,)", 2: "(T, B)" if time_major else "(B, T)"}.get(len(shape), "(...)")
    return f"{dims} = {tuple(shape)}"


def main(
    op: str, name: str, x: Any, cu_seqlens: Any = None, *, time_major: bool = False
) -> Tensor:
    """The tensor that sets shape, device and precision: `(B, T)`, or flat `(N,)`."""
    floating(op, name, x)
    if x.dim() not in (1, 2):
        raise ValueError(f"{op}: {name} must have shape (B, T) or (N,), got {tuple(x.shape)}")
    if cu_seqlens is not None:
        if x.dim() != 1:
            raise ValueError(
                f"{op}: {name} must have shape (N,) with cu_seqlens, got {tuple(x.shape)}"
            )
        if time_major:
            raise ValueError(f"{op}: time_major must be False with cu_seqlens, got True")
        offsets(op, cu_seqlens, x)
    return x


def alike(op: str, main: Tensor, *, time_major: bool = False, **others: Any) -> None:
    """Floating tensors (None passes) of the main one's shape, device and precision class."""
    shape, device = main.shape, main.device
    types = _FLOATS[3:] if main.dtype == torch.float64 else _FLOATS[:3]
    for name, x in others.items():
        # One cheap test per tensor; which part failed is only worked out when one did.
        if x is None or (
            isinstance(x, Tensor) and x.shape == shape and x.dtype in types and x.device == device
        ):
            continue
        if floating(op, name, x).shape != shape:
            raise ValueError(
                f"{op}: {name} must have shape {label(shape, time_major)}, got {tuple(x.shape)}"
            )
        _beside(op, name, x, main)


def sized(op: str, name: str, x: Any, main: Tensor, shape: tuple[int, ...], text: str) -> None:
    """One floating tensor of a given shape, with the main one's device and precision class."""
    if tuple(floating(op, name, x).shape) != shape:
        raise ValueError(f"{op}: {name} must have shape {text} = {shape}, got {tuple(x.shape)}")
    _beside(op, name, x, main)


def _beside(op: str, name: str, x: Tensor, main: Tensor) -> None:
    if x.device != main.device:
        raise ValueError(f"{op}: {name} must be on {main.device}, got {x.device}")
    if (x.dtype == torch.float64) != (main.dtype == torch.float64):
        raise TypeError(
            f"{op}: {name} must not mix float64 with other types,"
            f" got {x.dtype} beside {main.dtype}"
        )


def flags(op: str, name: str, x: Any, shape: Sequence[int], device: torch.device) -> Tensor | None:
    """A mask or flag tensor of any real dtype as bytes: non-zero is true. None passes."""
    if x is None:
        return None
    if tensor(op, name, x).shape != torch.Size(shape):
        raise ValueError(f"{op}: {name} must have shape {label(shape)}, got {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{op}: {name} must be on {device}, got {x.device}")
    if x.dtype in _BYTES:
        return x
    if x.dtype.is_complex:
        raise TypeError(f"{op}: {name} must be real, got {x.dtype}")
    return x != 0


def indices(op: str, name: str, x: Any, shape: Sequence[int], device: torch.device) -> Tensor:
    """An int32 or int64 tensor of a given shape and device."""
    if tensor(op, name, x).dtype not in _INTEGERS:
        raise TypeError(f"{op}: {name} must be int32 or int64, got {x.dtype}")
    if x.shape != torch.Size(shape):
        raise ValueError(f"{op}: {name} must have shape {label(shape)}, got {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{op}: {name} must be on {device}, got {x.device}")
    return x


def offsets(op: str, cu_seqlens: Any, main: Tensor) -> None:
    """`cu_seqlens`: int32 or int64 `(S + 1,)`; its content is looked at where it is on the host,
    and everywhere when debugging."""
    if tensor(op, "cu_seqlens", cu_seqlens).dtype not in _INTEGERS:
        raise TypeError(f"{op}: cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(
            f"{op}: cu_seqlens must have shape (S + 1,), got {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != main.device:
        raise ValueError(f"{op}: cu_seqlens must be on {main.device}, got {cu_seqlens.device}")
    on_host = type(cu_seqlens) is Tensor and cu_seqlens.is_cpu
    if DEBUG or (on_host and not torch.compiler.is_compiling()):
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != main.numel() or ends != sorted(ends):
            raise ValueError(
                f"{op}: cu_seqlens must rise from 0 to N = {main.numel()}, got {ends}"
            )


def choice(op: str, name: str, value: Any, options: tuple[str, ...]) -> int:
    """The code (index) of a named option."""
    if value not in options:
        raise ValueError(f"{op}: {name} must be one of {', '.join(options)}, got {value!r}")
    return options.index(value)


def number(
    op: str, name: str, value: Any, low: float = -math.inf, high: float = math.inf
) -> float:
    """A real number in [low, high]; NaN is never one."""
    if type(value) not in (float, int) and (
        isinstance(value, bool) or not isinstance(value, (int, float))
    ):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{op}: {name} must be in [{low:g}, {high:g}], got {value}")
    return float(value)


def positive(op: str, name: str, value: Any, main: Tensor) -> float:
    """A finite number above 0, in the precision that `main` is computed in."""
    if number(op, name, value, 0.0) == 0.0 or value == math.inf:
        raise ValueError(f"{op}: {name} must be positive and finite, got {value}")
    if main.dtype != torch.float64 and not _FP32.smallest_normal <= value <= _FP32.max:
        raise ValueError(f"{op}: {name} must be positive and finite in float32, got {value}")
    return float(value)


def coefficient(
    op: str, name: str, value: Any, device: torch.device, low: float = -math.inf
) -> tuple[float, Tensor | None]:
    """A number, or a 0-d tensor that stays on the device: (number or 0, tensor or None)."""
    if not isinstance(value, Tensor):
        return number(op, name, value, low), None
    if value.dim() != 0:
        raise ValueError(
            f"{op}: {name} must be a number or a 0-d tensor, got {tuple(value.shape)}"
        )
    if not value.dtype.is_floating_point:
        value = value.float()
    if value.device != device:
        if value.device.type != "cpu":
            raise ValueError(f"{op}: {name} must be on {device}, got {value.device}")
        # A CPU scalar costs no synchronisation and is read here.
        return number(op, name, float(value), low), None
    return 0.0, value.detach()


def tokens_in_range(
    op: str, tokens: Tensor, keep: Tensor, vocab: int, name: str = "tokens"
) -> None:
    """Debug only: raise IndexError at the first live token outside the vocabulary."""
    bad = keep & ((tokens < 0) | (tokens >= vocab))
    if bool(bad.any()):
        where = tuple(int(i) for i in bad.nonzero()[0])
        raise IndexError(
            f"{op}: {name} must be in [0, {vocab}), got {int(tokens[where])} at {where}"
        )
