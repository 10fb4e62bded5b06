"""Comparison of a patched op's first call with the trainer's own: values and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppo_fast.integrations._errors import MismatchError

Arguments = dict[str, Any]


def mapped(change: Callable[[Tensor], Tensor], x: Any) -> Any:
    """`x` with every tensor in its tuples, lists and dicts changed, and every array copied."""
    if isinstance(x, Tensor):
        return change(x)
    if isinstance(x, np.ndarray):
        return x.copy()
    if type(x) in (tuple, list):
        return type(x)(mapped(change, item) for item in x)
    if type(x) is dict:
        return {key: mapped(change, item) for key, item in x.items()}
    return x


def tensors(x: Any, path: str = "result") -> Iterator[tuple[str, Tensor]]:
    """Every tensor, array and number in `x` with its path."""
    if isinstance(x, Tensor):
        yield path, x
    elif isinstance(x, np.ndarray) and x.dtype.kind in "fiub":
        yield path, torch.from_numpy(x)
    elif isinstance(x, bool | int | float):
        yield path, torch.tensor(float(x))  # most often a metric of fp32
    elif isinstance(x, dict):
        for key, item in x.items():
            yield from tensors(item, f"{path}[{key!r}]")
    elif isinstance(x, tuple | list):
        for index, item in enumerate(x):
            yield from tensors(item, f"{path}[{index}]")


def twin(x: Tensor) -> Tensor:
    """A leaf of its own that the trainer's code may change in place."""
    return x.detach().clone().requires_grad_(x.requires_grad)


def first_call(
    name: str,
    theirs: Callable[[Arguments], Any],
    ours: Callable[[Arguments], Any],
    arguments: Arguments,
    view: Callable[[Arguments, Any], Any],
) -> None:
    """Run both on copies of the arguments; raise MismatchError if they differ.

    Half of the digits of the coarsest dtype must agree: looser than any rounding, and tighter
    than the error of a wrong option, mask or shift, which this is to find.
    """
    runs = []
    for function in (theirs, ours):
        leaves = mapped(twin, arguments)
        # Clones of the leaves: a leaf that wants a gradient may not be changed in place.
        given = mapped(lambda x: x.clone() if x.requires_grad else x, leaves)
        result = dict(tensors(view(given, function(given))))
        runs.append((result, _gradients(leaves, result)))
    (a, da), (b, db) = runs
    if a.keys() != b.keys():
        raise MismatchError(f"{name}: the original gives {sorted(a)}, ppo_fast {sorted(b)}")
    digits = _coarsest([*tensors(arguments), *a.items()]) ** 0.5
    for path in a:
        _close(f"{name}: {path}", a[path], b[path], digits, floor=1.0)
    for path in da.keys() | db.keys():
        zero = torch.zeros_like({**da, **db}[path])
        one, other = da.get(path, zero), db.get(path, zero)
        _close(f"{name}: gradient of {path}", one, other, digits, floor=digits)


def _coarsest(found: list[tuple[str, Tensor]]) -> float:
    dtypes = {x.dtype for _, x in found if x.is_floating_point()} or {torch.float32}
    for device in {x.device.type for _, x in found}:
        if torch.is_autocast_enabled(device):
            dtypes.add(torch.get_autocast_dtype(device))
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def _gradients(leaves: Arguments, result: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of the sum of all results by every argument that it depends on."""
    wanted = {path: x for path, x in tensors(leaves, "inputs") if x.requires_grad}
    total = [x.double().sum() for x in result.values() if x.requires_grad]
    if not wanted or not total:
        return {}
    found = torch.autograd.grad(torch.stack(total).sum(), [*wanted.values()], allow_unused=True)
    return {path: g for path, g in zip(wanted, found, strict=True) if g is not None}


def _close(what: str, theirs: Tensor, ours: Tensor, digits: float, floor: float) -> None:
    if theirs.shape != ours.shape:
        raise MismatchError(
            f"{what}: the original has shape {tuple(theirs.shape)}, ppo_fast {tuple(ours.shape)}"
        )
    a, b = theirs.detach().double(), ours.detach().double()
    finite = a[a.isfinite()]
    scale = max(float(finite.abs().max()) if finite.numel() else 0.0, floor)
    near = torch.isclose(b, a, rtol=0.0, atol=digits * scale, equal_nan=True)
    if not bool(near.all()):
        at = tuple(int(i) for i in (~near).nonzero()[0])
        raise MismatchError(
            f"{what}: the original gives {float(a[at])!r} at {at}, ppo_fast {float(b[at])!r}"
            f" ({int((~near).sum())} of {near.numel()} differ by more than {digits * scale:.1e})"
        )


def first_rows(*names: str) -> Callable[[Arguments], Arguments]:
    """Compare one row of these arguments alone."""
    return lambda arguments: _cut(arguments, names, (slice(1),))


def first_tokens(*names: str, count: int = 64) -> Callable[[Arguments], Arguments]:
    """Compare the first tokens of these arguments alone, logits or hidden states named first.

    A copy of all the logits would cost the memory that the op saves.
    """

    def cut(arguments: Arguments) -> Arguments:
        leading = arguments[names[0]].dim() - 1
        return _cut(arguments, names, (*[slice(1)] * (leading - 1), slice(count)))

    return cut


def first_of_head(
    hidden: str, weight: str, tokens: str, bias: str = "", count: int = 4096
) -> Callable[[Arguments], Arguments]:
    """Compare the first tokens on the first words of the vocabulary, their targets among them."""
    rows = first_tokens(hidden, tokens)

    def cut(arguments: Arguments) -> Arguments:
        found = _cut(rows(arguments), (weight, bias), (slice(count),))
        return {**found, tokens: found[tokens] % len(found[weight])}

    return cut


def _cut(arguments: Arguments, names: tuple[str, ...], at: tuple[slice, ...]) -> Arguments:
    return {k: x[at] if k in names and x is not None else x for k, x in arguments.items()}
