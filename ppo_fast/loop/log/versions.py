"""Versions, machine and backend of a run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

import ppo_fast

_PACKAGES = ("torch", "transformers", "triton", "numpy")
_CPUINFO = Path("/proc/cpuinfo")


def versions(backend: str) -> dict[str, str | int]:
    """Versions of ppo_fast and its dependencies, the machine, and the backend in use."""
    found: dict[str, str | int] = {"ppo_fast": ppo_fast.__version__}
    installed = {d.name.lower(): d.version for d in importlib.metadata.distributions() if d.name}
    found |= {name: installed[name] for name in _PACKAGES if name in installed}
    return found | {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "backend": backend,
    }


def _cpu() -> str:
    """The CPU's model as the system names it."""
    lines = _CPUINFO.read_text().splitlines() if _CPUINFO.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or "unknown"
