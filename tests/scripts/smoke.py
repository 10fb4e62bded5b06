"""Smoke test of an installed ppo_fast: `python tests/scripts/smoke.py [backend ...]`.

Every op, forward and backward, on the given backends or on all that run here, within the error
budget of the fp64 reference. Needs nothing but torch and ppo_fast, and fails on the first
disagreement.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from importlib.metadata import version

import torch

# Triton's interpreter, where it can be had: it computes with numpy.
if not torch.cuda.is_available() and importlib.util.find_spec("numpy"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import ppo_fast
from ppo_fast.testing import DIVERGENCES, FACTORIES, HEADS, assert_agrees


def versions() -> str:
    """Versions and place of the installed packages."""
    found = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    for name in ("triton", "numpy"):
        has = importlib.util.find_spec(name)
        found.append(f"{name} {version(name)}" if has else f"no {name}")
    return ", ".join([f"ppo_fast {ppo_fast.__version__} in {ppo_fast.__path__[0]}", *found])


def main(chosen: list[str]) -> None:
    """Raise unless every op agrees on every backend."""
    print(versions())
    reasons = ppo_fast.backends()
    names = chosen or [name for name, reason in reasons.items() if reason is None]
    for name in names:
        if reasons.get(name, "there is no such backend") is not None:
            raise SystemExit(f"smoke: {name}: {reasons.get(name, 'there is no such backend')}")
        device = "cuda" if name in ("triton", "cuda") and torch.cuda.is_available() else "cpu"
        ops = FACTORIES | HEADS | ({} if name == "cuda" else DIVERGENCES)
        for factory in ops.values():
            assert_agrees(factory(device=device), name)
        print(f"smoke: {len(ops)} ops agree with the reference on {name}")


if __name__ == "__main__":
    main(sys.argv[1:])
