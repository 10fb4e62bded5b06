"""Choice of a backend: `backend=`, then `use_backend`, then `PPO_FAST_BACKEND`, then the device.

A backend asked for by name is used or raises; only the automatic choice may fall to the
reference, and says why once.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from types import TracebackType

import torch
from torch import Tensor

from ppo_fast import _dispatch, _ext
from ppo_fast._torch_private import constant_in_graphs

NAMES = ("reference", "cpu", "triton", "cuda")
_AUTOMATIC = {"cpu": "cpu", "cuda": "triton"}


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot be used: the reason and what mends it."""


def _triton_reason() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; run `pip install triton`"
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            "there is no GPU; set TRITON_INTERPRET=1 before Python starts to run the kernels"
            " in Triton's interpreter"
        )
    return None


# Looked up once: neither the installation nor the devices change while a process runs.
_REASONS: dict[str, str | None] = {
    "reference": None,
    "cpu": _ext.load(),
    "triton": _triton_reason(),
    "cuda": _ext.load_cuda(),
}


class _Choice:
    """The process-wide choice (a plain object: a ContextVar breaks `fullgraph=True`, and so does
    a class's attribute before torch 2.13)."""

    name: str | None = os.environ.get("PPO_FAST_BACKEND") or None
    warned = False


_chosen = _Choice()


def backends() -> dict[str, str | None]:
    """Each backend's name -> None if usable here, else the reason it is not and its mend."""
    reasons = dict(_REASONS)
    if reasons["cuda"] is None and not _ext.EMULATED:
        reasons["cuda"] = _ext.wrong_gpu()
    return reasons


def _named(op: str, name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{op}: backend must be one of {', '.join(NAMES)}, got {name!r}")
    reason = _REASONS[name]
    if reason is not None:
        raise BackendUnavailableError(f"{op}: backend {name!r} is not usable: {reason}")
    return name


class use_backend:
    """Use one backend for every op inside the `with` block, in the whole process.

    Raises ValueError for an unknown name, BackendUnavailableError for one that is not usable.
    """

    def __init__(self, name: str) -> None:
        self.name = _named("use_backend", name)

    def __enter__(self) -> None:
        self.before = _chosen.name
        _chosen.name = self.name

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _chosen.name = self.before


def asked(backend: str | None) -> str | None:
    """The backend that a call was asked to use by name, here or around it."""
    return backend if backend is not None else _chosen.name


def select(
    op: str, backend: str | None, x: Tensor, *, sequences: int = 0, time_major: bool = False
) -> str:
    """The backend of this call, for a main tensor `x`; `sequences` of an op that walks them."""
    named, kind = asked(backend), x.device.type
    if named is not None:
        name = _named(op, named)
    elif kind == "cuda" and _cuda_is_default(
        _dispatch.Work(op, x.numel(), sequences, time_major), x
    ):
        name = "cuda"
    else:
        name = automatic(kind)
    if name == "cpu" and kind != "cpu":
        raise ValueError(f"{op}: backend 'cpu' needs CPU tensors, got {x.device}")
    if name in ("triton", "cuda"):
        if x.dtype == torch.float64:
            raise TypeError(f"{op}: backend {name!r} has no float64; use 'reference' or 'cpu'")
        if kind == "cpu" and not _on_cpu(name):
            raise ValueError(f"{op}: backend {name!r} needs CUDA tensors, got {x.device}")
    if name == "cuda" and kind == "cuda":
        _check_gpu(op, x)
    return name


def select_beside(op: str, backend: str | None, x: Tensor, argument: str | None) -> str:
    """The backend of a call with an argument that CUDA C++ does not take; None: without one."""
    name = select(op, backend, x)
    if name != "cuda" or argument is None:
        return name
    if asked(backend) is not None:
        names = ", ".join(n for n in NAMES if n != "cuda")
        raise ValueError(f"{op}: backend must be one of {names} with {argument}, got {name!r}")
    return automatic(x.device.type)


def select_among(op: str, names: tuple[str, ...], backend: str | None, x: Tensor) -> str:
    """The backend of an op that the GPU's do not have; left to choose, they take the reference."""
    if asked(backend) is None and x.device.type != "cpu":
        return "reference"
    name = select(op, backend, x)
    if name not in names:
        raise ValueError(f"{op}: backend must be one of {', '.join(names)}, got {name!r}")
    return name


def _on_cpu(name: str) -> bool:
    """True if a GPU's backend runs on CPU tensors here."""
    return _ext.EMULATED if name == "cuda" else os.environ.get("TRITON_INTERPRET") == "1"


def _check_gpu(op: str, x: Tensor) -> None:
    if _ext.EMULATED:
        raise ValueError(f"{op}: backend 'cuda' is emulated and needs CPU tensors, got {x.device}")
    reason = _ext.wrong_gpu(x.device.index)
    if reason is not None:
        raise BackendUnavailableError(f"{op}: backend 'cuda' is not usable: {reason}")


def automatic(kind: str) -> str:
    """The default backend of a device of this kind, where CUDA C++ is not."""
    name = _AUTOMATIC.get(kind)
    if name is None:
        return "reference"
    if _REASONS[name] is None:
        return name
    if not _chosen.warned:
        _chosen.warned = True
        warnings.warn(
            f"ppo_fast runs on its slow PyTorch reference. {name}: {_REASONS[name]}",
            RuntimeWarning,
            stacklevel=5,  # past the public function and its `derivatives`
        )
    return "reference"


def _cuda_is_default(work: _dispatch.Work, x: Tensor) -> bool:
    """True where CUDA C++ can be used, and Triton cannot or is not the choice for this work."""
    if _REASONS["cuda"] is not None or _ext.EMULATED or x.dtype == torch.float64:
        return False
    capability = _cuda_runs_on(x.device.index)
    if capability is None:
        return False
    return _REASONS["triton"] is not None or (
        _dispatch.provider(work, capability, x.dtype) == "cuda"
    )


@constant_in_graphs  # a compiled graph cannot look into the extension module
def _cuda_runs_on(index: int) -> tuple[int, int] | None:
    """The capability of a GPU that the built kernels run on, else None."""
    if _ext.wrong_gpu(index) is not None:
        return None
    return torch.cuda.get_device_capability(index)


@constant_in_graphs
def bf16_dot() -> bool:
    """True where the extension is built and this CPU has dot products of bf16 that it may use."""
    return _REASONS["cpu"] is None and bool(_ext.module().build_info()["bf16_dot"])
