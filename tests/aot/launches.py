"""Watch over interpreted launches: each must be one that the tables list and test_aot.py compiles.

`watch()` makes the Triton interpreter compare constants, pointer types and Nones while its block
runs, so that a launcher cannot gain a specialisation that its table `aot_<stem>.AOT` lacks.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from aot import product, table

DTYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@functools.cache
def registered(module: str, name: str) -> tuple[tuple[str, ...], frozenset[Any]]:
    """The parameters that specialise a kernel, and the combinations registered for it."""
    entries = [e for e in table(module.rpartition(".")[2]) if e.kernel.__name__ == name]
    if not entries:
        raise AssertionError(f"{module}.{name} is launched and in no table")
    cases = product(entries[0])
    parameters = inspect.signature(entries[0].kernel.fn).parameters
    keys = tuple(
        k
        for k, p in parameters.items()
        if "constexpr" in str(p.annotation)
        or any(c[k] is None or str(c[k]).startswith("*") for c in cases)
    )
    keys += ("num_warps",) * any("num_warps" in c for c in cases)
    strip = lambda x: x.split(":")[0] if isinstance(x, str) else x  # noqa: E731
    return keys, frozenset(tuple(strip(c[k]) for k in keys) for c in cases)


def check(fn: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Raise AssertionError unless the launch is registered."""
    signature = inspect.signature(fn)
    launch = {k: v for k, v in kwargs.items() if k in signature.parameters}
    values = kwargs | signature.bind(*args, **launch).arguments
    keys, cases = registered(fn.__module__, fn.__name__)
    found = tuple(
        DTYPES[values[k].dtype] if isinstance(values[k], torch.Tensor) else values[k] for k in keys
    )
    if found not in cases:
        raise AssertionError(
            f"{fn.__name__} is launched with {dict(zip(keys, found, strict=True))},"
            f" which its table does not list"
        )


@contextlib.contextmanager
def watch() -> Iterator[set[str]]:
    """Check every interpreted launch inside the block; gives the names of the kernels launched."""
    from triton.runtime.interpreter import GridExecutor

    call = GridExecutor.__call__
    launched: set[str] = set()

    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        check(self.fn, args, kwargs)
        launched.add(self.fn.__name__)
        call(self, *args, **kwargs)

    GridExecutor.__call__ = checked
    try:
        yield launched
    finally:
        GridExecutor.__call__ = call
