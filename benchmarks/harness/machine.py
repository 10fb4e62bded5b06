"""Facts of a machine: processor or GPU, driver, versions, commit; no host name."""

from __future__ import annotations

import datetime
import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
THREADS = min(2, os.cpu_count() or 1)  # of a CPU measurement

# Packages whose versions are recorded if installed: this library's own needs, then its peers.
_PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "transformers",
    "torchrl",
    "tianshou",
    "numba",
    "trl",
    "verl",
    "openrlhf",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
    "flash-attn",
)
# Files that a report writes: a difference there changes no measurement.
_GENERATED = (
    "README.md",
    "README.zh-CN.md",
    "benchmarks/README.md",
    "benchmarks/plots",
    "benchmarks/results",
)


def cpu_model() -> str:
    """The processor's own name, without trade marks."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if found:
            return re.sub(r"\((?:R|TM)\)| Processor$", "", found.group(1).strip())
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
    """The commit measured, marked if what it measures differs; None outside a repository."""
    head = _git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return None
    apart = [f":(top,exclude){path}" for path in _GENERATED]
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", *apart)
    return head + ("-dirty" if changed else "")


def _gpu() -> dict[str, Any]:
    """The GPU that torch would use, with its driver; nothing where there is none."""
    if not torch.cuda.is_available():
        return {}
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": _driver(),
        "cuda": torch.version.cuda or torch.version.hip,
    }


def _driver() -> str | None:
    """The NVIDIA driver's version; None where nvidia-smi is not there to say."""
    if shutil.which("nvidia-smi") is None:
        return None
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(ask, capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 else None


def describe() -> dict[str, Any]:
    """The facts of a run, which each of its rows refers to."""
    try:
        build = importlib.import_module("ppo_fast._C").build_info()
    except ImportError:
        build = {}
    versions = {"python": platform.python_version()}
    versions |= {name: version for name in _PACKAGES if (version := _version(name))}
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": cpu_model(),
        **_gpu(),
        "isa": build.get("isa", "none"),
        "torch_isa": torch.backends.cpu.get_cpu_capability().lower(),
        "threads": THREADS,
        "load": round(os.getloadavg()[0], 1),
        "compiler": build.get("compiler"),
        "versions": versions,
        "commit": commit(),
    }


def slug(facts: dict[str, Any]) -> str:
    """The machine in a file name: its GPU, or its processor and the instruction set used."""
    name = facts.get("gpu") or f"{facts['machine']} {facts['isa']}"
    return slugged(name)


def slugged(text: str) -> str:
    """Words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
