"""Backends, devices and poisoned memory for every test."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import pytest
import torch

# Triton reads the first when it is imported, ppo_fast both when it lists its backends.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("PPO_FAST_CUDA_EMULATE", "1")

import hypothesis

import ppo_fast
from ppo_fast import _ext, testing

if os.environ.get("TRITON_INTERPRET") == "1" and ppo_fast.backends()["triton"] is None:
    import interpreter

    interpreter.patch_once_a_launch()

KERNELS = ("cpu", "triton", "cuda")
ON_GPU = ("triton", "cuda")  # without a GPU, interpreted and emulated; neither has float64

hypothesis.settings.register_profile(
    "repeatable", derandomize=True, deadline=None, database=None, print_blob=True
)
hypothesis.settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "own_memory: allocations stay as they are (a compiler looks at them)"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests that compute on a GPU where there is one; asked for alone, they need one."""
    asked = re.search(r"(?<!not )\bgpu\b", config.getoption("markexpr"))
    for item in items:
        if item.get_closest_marker("gpu") is None and _on_gpu(item):
            item.add_marker(pytest.mark.gpu)
        if asked and item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="there is no GPU"))


def _on_gpu(item: pytest.Item) -> bool:
    """True if a test's backend computes on CUDA tensors, as `device` below decides."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    names = {params.get(key) for key in ("backend", "kernel", "backend_name")}
    follows = "device" in getattr(item, "fixturenames", ()) and "reference" in names
    return bool(names.intersection(ON_GPU)) or follows


def shape_of(op: str) -> tuple[int, int]:
    """Small, and smaller for logits: Triton's interpreter takes 40 ms a row of them."""
    return (4, 2) if op == "token_logprobs" else (4, 9)


def usable(name: str) -> str:
    """The name, or a skip with the reason; test_backend.py fails where cpu should work."""
    reason = ppo_fast.backends()[name]
    if reason is not None:
        pytest.skip(f"backend {name!r}: {reason}")
    return name


@pytest.fixture(params=("reference", *KERNELS))
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend, the reference included."""
    return usable(request.param)


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> str:
    """Every backend that has kernels."""
    return usable(request.param)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """Device on which the backend of this test computes."""
    name = next(
        request.getfixturevalue(fixture)
        for fixture in ("backend", "kernel")
        if fixture in request.fixturenames
    )
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


@pytest.fixture(params=("scalar", "neon", "avx2", "avx512"))
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that the CPU's kernels were compiled for and this machine has."""
    usable("cpu")
    module = _ext.module()
    info, names = module.build_info(), module.build_info()["isa_compiled"]
    if request.param not in names[: names.index(info["isa_best"]) + 1]:
        pytest.skip(f"this CPU has no {request.param}")
    module.set_isa(request.param)
    yield request.param
    module.set_isa(info["isa"])


@pytest.fixture(autouse=True)
def poisoned(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fresh memory is NaN wherever a backend is tested, so that an unwritten output shows."""
    tested = {"backend", "kernel"} & set(request.fixturenames)
    if not tested or request.node.get_closest_marker("own_memory"):
        yield
        return
    with testing.poisoned_allocations():
        yield
