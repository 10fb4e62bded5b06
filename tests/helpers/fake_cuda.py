"""CUDA tensors without data where there is no GPU: an op's calls for the device, one by one.

A program of its own, since it gives PyTorch a device guard for CUDA: `calls_of(cases)` runs it.
Calls of aten and of the kernels' boundary are seen; a kernel's own launches are not, as its fake
runs. Backwards are called past autograd's engine, which wants a device.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils import cpp_extension
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# No work on a device: an allocation alone, another name for a tensor, an answer about it.
FREE = ("aten::empty", "aten::new_empty", "aten::detach", "aten::alias", "aten::lift", "prim::")
# The host waits for the device to tell it a value or a count.
ASKS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::masked_select")


class Record(TorchDispatchMode):
    """Launches, waits, and the most bytes that the calls inside its block held at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[str] = []
        self.waits: list[str] = []
        self.held = self.peak = 0
        self._tensors: dict[int, int] = {}  # storage -> its tensors that live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        known = {x.untyped_storage()._cdata for x in inputs}
        out = func(*args, **(kwargs or {}))
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        name, kinds = func.name(), {x.device.type for x in (*inputs, *outputs)}
        if "cuda" in kinds and not func.is_view and not name.startswith(FREE):
            self.launches.append(name)
            by_mask = any(x.dtype == torch.bool for x in inputs[1:])
            if (
                name.startswith(ASKS)
                or (name.startswith("aten::index.") and by_mask)
                or ("copy" in name and "cpu" in kinds)
            ):
                self.waits.append(name)
        for x in outputs:
            self._hold(x, known)
        return out

    def _hold(self, x: Tensor, known: set[int]) -> None:
        """Count a new storage, from its first tensor to the end of its last."""
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._tensors:
            if key in known:  # an argument's
                return
            self._tensors[key] = 0
            self.held += size
            self.peak = max(self.peak, self.held)
        self._tensors[key] += 1
        weakref.finalize(x, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._tensors[key] -= 1
        if self._tensors[key] == 0:
            del self._tensors[key]
            self.held -= size

    def report(self) -> dict[str, Any]:
        """The counts, as JSON has them."""
        return {"launches": self.launches, "waits": self.waits, "peak": self.peak}


def _tensor(shape: list[int], dtype: str, *, grad: bool, cut: bool) -> Tensor:
    """`cut`: all but the last of a tensor's second dimension."""
    if cut:
        shape = [shape[0], shape[1] + 1, *shape[2:]]
    x = torch.empty(shape, dtype=getattr(torch, dtype), device="cuda", requires_grad=grad)
    return x[:, :-1] if cut else x


def _incoming(out: Any, outputs: int) -> tuple[Any, list[Tensor | None]]:
    """The op's node of a graph of `outputs` results, and their gradients."""
    node: Any = None
    ones: list[Tensor | None] = [None] * outputs
    for x in out[:2]:
        if not (isinstance(x, Tensor) and x.requires_grad):
            continue
        node, at, grad = x.grad_fn, x.output_nr, x
        if not hasattr(type(node), "_forward_cls"):  # the results are views, of flat ones
            ((node, at),) = node.next_functions
            grad = x.flatten(0, out[-1].dim() - 1)  # of the entropies' dimensions; ids have more
        ones[at] = grad
    return node, ones


def _report(case: dict[str, Any]) -> dict[str, Any]:
    """A `Case`, as JSON has it."""
    import ppo_fast
    from ppo_fast.testing import arguments

    grads, cut, options = case["grads"], case["cut"], case["options"]
    tensors = {
        name: _tensor(shape, dtype, grad=name in grads, cut=name in cut)
        for name, (shape, dtype) in case["tensors"].items()
    }
    if "correction" in options:
        options["correction"] = ppo_fast.Correction(**options["correction"])
    if "kept" in options:
        n = tensors["tokens"].numel()
        with unset_fake_temporarily():  # it is made outside of the op, and looks at its ids
            support = ppo_fast.Support(torch.arange(n * options["kept"]).view(n, -1), sparse=True)
        options["support"] = support.to("cuda")
        del options["kept"]
    with Record() as forward:
        out = getattr(ppo_fast, case["op"])(**arguments(tensors | options), backend="triton")
    told = {"forward": forward.report()}
    if grads and case["backward"]:
        node, ones = _incoming(out, case["outputs"])
        with Record() as backward, torch.no_grad():
            type(node)._forward_cls.backward(node, *ones)
        told["backward"] = backward.report()
    return told


class Case(NamedTuple):
    """An op's call: tensors as (shape, dtype) by name, and the names of some."""

    op: str
    tensors: dict[str, tuple[tuple[int, ...], str]]
    grads: tuple[str, ...] = ()
    options: Mapping[str, Any] = MappingProxyType({})
    cut: tuple[str, ...] = ()  # not contiguous
    backward: bool = True  # looked at too; not where the loss is a sum of several nodes
    outputs: int = 2  # of its node that a gradient may reach


def calls_of(cases: dict[str, Case]) -> dict[str, Any]:
    """Reports of cases by name, from a process of their own."""
    here = Path(__file__)
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(here.parents[2])}
    given = json.dumps(
        {name: case._replace(options=dict(case.options))._asdict() for name, case in cases.items()}
    )
    command = [sys.executable, str(here)]
    done = subprocess.run(command, input=given, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    source = Path(__file__).with_name("fake_guard.cpp")
    cpp_extension.load("ppo_fast_fake_guard", [str(source)], is_python_module=False)
    cases = json.load(sys.stdin)
    with FakeTensorMode(allow_non_fake_inputs=True):
        print(json.dumps({name: _report(case) for name, case in cases.items()}))


if __name__ == "__main__":
    main()
