"""Trace of a call on a GPU that is not there: what it would launch, multiply and copy, in order.

Tensors are PyTorch's fake ones of the device "cuda", which have shapes and no memory, so the ops
take the paths of a GPU; the fake driver records what Triton would launch. PyTorch's autograd wants
a real device: here its `Function.apply` runs the forward and keeps what the backward needs.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from benchmarks.gpu import fake_driver
from benchmarks.ops import support
from benchmarks.ops.case import Case
from benchmarks.ops.registry import make_call
from benchmarks.peers.base import Provider
from ppo_fast import _backend
from ppo_fast._boundary import schema
from ppo_fast.testing import Call

# What PyTorch says of an H200 SXM: multiprocessors, and bytes of L2.
MULTIPROCESSORS = 132
L2_BYTES = 60 * 2**20
_PRODUCTS = {"mm": 0, "matmul": 0, "addmm": 1}  # where the operands begin
# Ops of no kernel: they make a tensor without filling it, or give one a new shape.
_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}


class Triton(NamedTuple):
    """A Triton kernel's launch."""

    launch: fake_driver.Launch


class Native(NamedTuple):
    """A call of an op of csrc/cuda, whose launches the host code chooses from its arguments."""

    op: str
    shapes: tuple[tuple[int, ...], ...]  # of its tensors
    itemsize: int  # of the largest
    moved: int  # bytes: every argument read and every result written
    written: int  # those of the results
    time_major: bool


class Product(NamedTuple):
    """A matrix product (m, k) · (k, n), and whether it is added to what is there."""

    m: int
    n: int
    k: int
    itemsize: int  # of the result
    adds: bool


class Pass(NamedTuple):
    """One of PyTorch's own kernels, and the bytes that it reads and writes."""

    op: str
    moved: int


Step = Triton | Native | Product | Pass


def _bytes(x: Tensor) -> int:
    """Distinct bytes of a tensor: those of an expanded dimension count once."""
    sizes = (n for n, stride in zip(x.shape, x.stride(), strict=True) if stride != 0)
    return math.prod(sizes) * x.element_size()


def _kernels(stem: str) -> Any:
    """A file of kernels/, imported as the op boundary does."""
    return importlib.import_module(f"ppo_fast.kernels.{stem}")


def _tensors(of: Any) -> list[Tensor]:
    return [x for x in tree_leaves(of) if isinstance(x, Tensor)]


def _step(name: str, args: Any, kwargs: Any, out: Any) -> Step:
    """The step of one of PyTorch's kernels."""
    if name in _PRODUCTS:
        a, b = args[_PRODUCTS[name] : _PRODUCTS[name] + 2]
        adds = name == "addmm" and kwargs.get("beta", 1) != 0
        return Product(a.shape[0], b.shape[1], a.shape[1], out.element_size(), adds)
    if "mm" in name or "linear" in name or "conv" in name:
        raise NotImplementedError(f"trace: the shape of {name!r} is not read")
    read = [x for x in _tensors((args, kwargs)) if x.is_cuda]
    if name.endswith("copy_") or name in ("fill_", "zero_"):
        read = read[1:]
    return Pass(name, sum(map(_bytes, [*read, *_tensors(kwargs.get("out", out))])))


class _Recorder(TorchDispatchMode):
    """Records steps; the ops of this library's GPU backends are run here, or only described."""

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self.steps = steps
        self.within = 0  # a fake op's own copies are none of the device's

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "ppo_fast":
            return self._ours(func, args, kwargs)
        self.within += 1
        try:
            out = func(*args, **kwargs)
        finally:
            self.within -= 1
        given, made = _tensors((args, kwargs)), [x for x in _tensors(out) if x.is_cuda]
        name = func._schema.name.split("::")[1]
        arguments = func._schema.arguments
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in arguments)
        memory = {x.untyped_storage()._cdata for x in given}
        is_view = not writes and all(x.untyped_storage()._cdata in memory for x in made)
        if name not in _FREE and not is_view and any(x.numel() for x in made):
            self.steps.append(_step(name, args, kwargs, out))
        return out

    def _ours(self, func: Any, args: Any, kwargs: Any) -> Any:
        op, backend = func._schema.name.split("::")[1], func._overloadname
        if backend == "triton":
            module = _kernels(schema.OPS[op][2])
            with self:
                return getattr(module, op)(*args, **kwargs)
        self.within += 1
        out = func(*args, **kwargs)
        self.within -= 1
        tensors, written = _tensors(args), _tensors(out)
        main = max(tensors, key=Tensor.numel)
        if op.endswith("_"):  # the gradient lies over the logits, or over half of them
            narrow = main.view(torch.bfloat16)[..., : main.shape[-1]]
            written.append(narrow if op.endswith("_bf16_") else main)
        time_major = any(x is True for x in args) and op == "gae"
        shapes = tuple(tuple(x.shape) for x in tensors)
        stored = sum(map(_bytes, written))
        moved = sum(map(_bytes, tensors)) + stored
        self.steps.append(Native(op, shapes, main.element_size(), moved, stored, time_major))
        return out


class _Context:
    """`ctx` of an autograd.Function, without autograd."""

    def __init__(self, function: Any, inputs: tuple[Any, ...]) -> None:
        self.function = function
        self.needs_input_grad = tuple(isinstance(x, Tensor) and _wanted(x) for x in inputs)

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *_: Any) -> None: ...

    def set_materialize_grads(self, _: bool) -> None: ...

    def mark_dirty(self, *_: Any) -> None: ...


def _wanted(x: Tensor) -> bool:
    return bool(getattr(x, "_wants_gradient", False))


def _want(x: Tensor, wanted: bool = True) -> Tensor:
    x._wants_gradient = wanted  # type: ignore[attr-defined]
    return x


class _Tape:
    """The one differentiable op of a call, and its backward."""

    def __init__(self) -> None:
        self.ctx: _Context | None = None
        self.outputs = 0
        self.recorder: Any = None

    def apply(self, function: Any, *inputs: Any) -> Any:
        ctx = _Context(function, inputs)
        with torch.no_grad():
            out = function.forward(ctx, *inputs)
        if any(ctx.needs_input_grad):
            self.ctx, self.outputs = ctx, len(out) if isinstance(out, tuple) else 1
        return out

    def grad(self, outputs: Any, inputs: Any, cotangents: Any) -> tuple[Any, ...]:
        assert self.ctx is not None, "nothing that was called is differentiable"
        absent = [None] * (self.outputs - len(cotangents))
        with torch.no_grad():
            return tuple(self.ctx.function.backward(self.ctx, *cotangents, *absent))


def _item(x: Tensor, index: Any) -> Tensor:
    """x[index]: PyTorch's own asks the device's driver."""
    at, dim = 0, index if isinstance(index, tuple) else (index,)
    given = sum(i is not None and i is not Ellipsis for i in dim)
    for i in dim:
        if i is Ellipsis:
            at += x.dim() - given
        elif i is None:
            x, at = x.unsqueeze(at), at + 1
            given += 1
        elif isinstance(i, slice):
            x, at = torch.ops.aten.slice(x, at, i.start, i.stop, i.step or 1), at + 1
        elif isinstance(i, Tensor):
            x, at = torch.ops.aten.index(x, [*[None] * at, i]), at + 1
        else:
            x, given = torch.ops.aten.select(x, at, i), given - 1
    return x


def _set_item(x: Tensor, index: Any, value: Any) -> None:
    to = _item(x, index)
    _ = to.copy_(value) if isinstance(value, Tensor) else to.fill_(value)


@contextlib.contextmanager
def _as_if_a_gpu(tape: _Tape, steps: list[Step]) -> Iterator[None]:
    """torch.cuda's answers of an H200, and gradients without autograd."""
    event = SimpleNamespace(record=lambda: None)
    stream = SimpleNamespace(cuda_stream=0, wait_event=lambda event: None)
    about = SimpleNamespace(multi_processor_count=MULTIPROCESSORS, L2_cache_size=L2_BYTES)
    answers = {
        "current_device": lambda: 0,
        "current_stream": lambda device=None: stream,
        "is_current_stream_capturing": lambda: False,
        "Event": lambda: event,
        "get_device_properties": lambda device=None: about,
        "get_device_capability": lambda device=None: (9, 0),
    }
    function = torch.autograd.Function

    def copy_(to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if not tape.recorder.within:
            steps.append(Pass("copy_", _bytes(source) + _bytes(to)))
        return to

    fakes = {
        "copy_": copy_,
        "requires_grad": property(_wanted, _want),
        "requires_grad_": _want,
        "__getitem__": _item,
        "__setitem__": _set_item,
        "__invert__": lambda self: torch.ops.aten.bitwise_not(self),
        "data_ptr": lambda self: 4096 + self.storage_offset() * self.element_size(),
    }
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context
        for name, answer in answers.items():
            patch(mock.patch.object(torch.cuda, name, answer))
        for name, value in fakes.items():
            patch(mock.patch.object(FakeTensor, name, value, create=True))
        apply = classmethod(lambda cls, *inputs: tape.apply(cls, *inputs))
        patch(mock.patch.object(function, "apply", apply))
        patch(mock.patch.object(torch.autograd, "grad", tape.grad))
        # As inside a backward that frees its graph, which a benchmark's is.
        keeps = "_get_current_graph_task_keep_graph"
        patch(mock.patch.object(torch._C._autograd, keeps, lambda: False))
        patch(mock.patch.object(torch.autograd.graph, "increment_version", lambda x: None))
        patch(mock.patch.dict(_kernels("common")._DEVICES, clear=True))
        patch(mock.patch.dict(_backend._REASONS, {"cuda": None}))
        patch(mock.patch.object(_backend, "_check_gpu", lambda op, x: None))
        patch(torch._C._AutoDispatchBelowAutograd())
        yield


def _on_gpu(case: Case) -> Call:
    """The case's call on fake tensors of the GPU; the inputs of every op are drawn on the host."""
    call = make_call(replace(case, device="cpu"))

    def there(x: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")

    return support.moved(tree_map_only(Tensor, there, call), there)


def traced(case: Case, provider: Provider) -> list[Step]:
    """The steps of the provider's call on the case, once warm; what prepares it is left out."""
    tape = _Tape()
    steps: list[Step] = []
    with (
        fake_driver.recording(lambda launch: steps.append(Triton(launch))),
        FakeTensorMode(allow_non_fake_inputs=True),
        _as_if_a_gpu(tape, steps),
    ):
        bound = provider.bind(case, _on_gpu(case))
        recorder = tape.recorder = _Recorder(steps)
        with recorder:
            for _ in range(2):  # what a first call makes and keeps is not of the call
                if bound.prepare is not None:
                    bound.prepare()
                steps.clear()
                bound.call()
    return list(steps)
