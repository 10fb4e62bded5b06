"""Pytest plugin that runs the tests' Triton kernels as PTX.

    PYTHONPATH=.:tests/ptx python -m pytest -p ptx_plugin tests/ops/test_gae.py -k triton

Kernels are compiled for sm_90 and interpreted on CPU tensors. PTX_STRIDE=n keeps every n-th test,
PTX_SEED orders the blocks. Tests of other backends are best left out: `-k triton`.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "0"
os.environ.setdefault("PPO_FAST_CUDA_EMULATE", "0")

import ptx_launch
import pytest

_interpreted = ptx_launch.interpreted(int(os.environ.get("PTX_SEED", "0")))
GPU = pytest.StashKey[ptx_launch.Gpu]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[GPU] = _interpreted.__enter__()


def pytest_unconfigure(config: pytest.Config) -> None:
    _interpreted.__exit__(None, None, None)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = items[:: int(os.environ.get("PTX_STRIDE", "1"))]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    gpu = terminalreporter.config.stash[GPU]
    terminalreporter.write_line(f"PTX: {gpu.launches} launches of {len(gpu.decoded)} kernels")
