"""Fake Triton driver: launches are bound, specialised and recorded; nothing is compiled or run.

    with fake_driver.recording() as record:
        ppo_fast.gae(rewards, values, backend="triton")
    record.launches   # every launch, in order
    record.variants   # every kernel that Triton would have compiled

It serves Triton 3.6 and 3.9 on a machine without a GPU, in a process without TRITON_INTERPRET: an
interpreted kernel is not specialised. Tensors lie on the CPU, with whatever they held, so results
mean nothing. A `Runner` does what a GPU would do for a launch; such launches are not kept, because
each holds its tensors.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

from ppo_fast import _backend

TARGET = GPUTarget("cuda", 90, 32)
# Triton keeps a cache of kernels per device: each recording has a device, and with it a cache.
_DEVICES = itertools.count(1000)


class Variant(NamedTuple):
    """A kernel with all that Triton specialises it on: what one compilation makes."""

    kernel: str
    key: str
    constants: dict[str, Any]  # constexprs; also arguments equal to 1 or None, which become such
    types: dict[
        str, str
    ]  # of the others: "*bf16:16", "i64", ...; ":16" where known to be divisible
    num_warps: int
    num_stages: int
    options: dict[str, Any]  # all of them
    function: Any  # the JITFunction

    def source(self) -> Any:
        """The source to compile, as `triton.compile` takes it."""
        position = {p.name: (i,) for i, p in enumerate(self.function.params)}
        signature: dict[str, str] = {}
        attrs = {}
        for name, path in position.items():
            signature[name] = "constexpr"
            if name in self.types:
                signature[name], _, divisor = self.types[name].partition(":")
                if divisor:
                    attrs[path] = [["tt.divisibility", int(divisor)]]
        constants = {position[name]: value for name, value in self.constants.items()}
        return triton.compiler.ASTSource(self.function, signature, constants, attrs)


class Launch(NamedTuple):
    """A launch of a variant."""

    variant: Variant
    grid: tuple[int, int, int]
    arguments: dict[str, Any]

    @property
    def kernel(self) -> str:
        return self.variant.kernel


Runner = Callable[[Launch], None]


@dataclass
class Record:
    """Launches and variants of a recording."""

    launches: list[Launch] = field(default_factory=list)
    variants: list[Variant] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Variants per kernel."""
        found: dict[str, int] = {}
        for variant in self.variants:
            found[variant.kernel] = found.get(variant.kernel, 0) + 1
        return found


class _Driver(DriverBase):
    """The driver that Triton asks for target, device and stream."""

    def __init__(self) -> None:
        self.device = next(_DEVICES)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("the fake driver times nothing")


class _Kernel:
    """Stand-in for a loaded kernel, which Triton launches."""

    function = None
    packed_metadata = ()

    def __init__(self, variant: Variant, record: Record, runner: Runner | None) -> None:
        self.variant, self.record, self.runner = variant, record, runner
        self.names = [p.name for p in variant.function.params]

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, x: int, y: int, z: int, *rest: Any) -> None:
        # Before the arguments: stream, function, packed metadata, launch metadata, two hooks.
        arguments = dict(zip(self.names, rest[6:], strict=True))
        launch = Launch(self.variant, (x, y, z), arguments)
        if self.runner is None:
            self.record.launches.append(launch)
        else:
            self.runner(launch)


def _variant(
    function: Any, key: str, signature: Any, constants: Any, options: Any, attrs: Any
) -> Variant:
    names = [p.name for p in function.params]
    divisors = {
        names[path[0]]: value
        for path, found in attrs.items()
        for what, value in found
        if what == "tt.divisibility"
    }
    types = {
        name: f"{kind}:{divisors[name]}" if name in divisors else kind
        for name, kind in signature.items()
        if kind != "constexpr"
    }
    return Variant(
        function.fn.__name__,
        key,
        {names[path[0]]: value for path, value in constants.items()},
        types,
        options.num_warps,
        options.num_stages,
        dict(options.__dict__),
        function,
    )


def _compiler(record: Record, runner: Runner | None) -> Callable[..., Any]:
    def compile_(
        self: Any,
        key: str,
        signature: Any,
        device: int,
        constexprs: Any,
        options: Any,
        attrs: Any,
        warmup: bool,
    ) -> _Kernel:
        variant = _variant(self, key, signature, constexprs, options, attrs)
        record.variants.append(variant)
        kernel = _Kernel(variant, record, runner)
        self.device_caches[device][0][key] = kernel
        return kernel

    return compile_


@contextlib.contextmanager
def recording(runner: Runner | None = None) -> Iterator[Record]:
    """Record of all launches inside the block; `runner` does what a GPU would do for each."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("recording: TRITON_INTERPRET must be unset, got '1'")
    record, driver = Record(), triton.runtime.driver
    on_cpu = _backend._on_cpu
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context
        patch(mock.patch.object(driver, "_active", _Driver()))
        patch(mock.patch.object(JITFunction, "_do_compile", _compiler(record, runner)))
        patch(mock.patch.dict(_backend._REASONS, {"triton": None}))
        patch(
            mock.patch.object(_backend, "_on_cpu", lambda name: name == "triton" or on_cpu(name))
        )
        yield record
