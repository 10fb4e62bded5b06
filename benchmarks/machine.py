"""What a number was measured on: processor, instruction set, versions, commit; no host name."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks.suite import ROOT, THREADS

_PACKAGES = ("torch", "triton", "torchrl", "tianshou", "numba", "numpy")


def cpu_model() -> str:
    """The processor's own name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if found:
            return found.group(1).strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*args: str) -> str | None:
    done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str | None:
    """The commit measured, marked if the tree differs from it; None outside a repository."""
    head = _git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return None
    return head + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")


def describe() -> dict[str, Any]:
    """The fields that every row carries."""
    try:
        build = importlib.import_module("ppo_fast._C").build_info()
    except ImportError:
        build = {}
    versions = {"python": platform.python_version()}
    versions |= {name: version for name in _PACKAGES if (version := _version(name))}
    return {
        "machine": cpu_model(),
        "isa": build.get("isa", "none"),
        "torch_isa": torch.backends.cpu.get_cpu_capability().lower(),
        "threads": THREADS,
        "load": round(os.getloadavg()[0], 1),
        "compiler": build.get("compiler"),
        "versions": versions,
        "commit": commit(),
    }


def slug(model: str, isa: str) -> str:
    """The machine in a file name."""
    return re.sub(r"[^a-z0-9]+", "-", f"{model} {isa}".lower()).strip("-")
