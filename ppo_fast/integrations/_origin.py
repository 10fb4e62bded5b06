"""Origin of a function: the trainer's own, or another library's patch."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

from ppo_fast.integrations._errors import ForeignPatchError


def file_of(value: Any) -> str:
    """The file that a function or class was written in."""
    value = getattr(value, "_torchdynamo_orig_callable", value)
    if inspect.isclass(owner := getattr(value, "__self__", None)):
        value = owner  # whose method it is: built in is an autograd.Function's, from torch 2.14
    elif inspect.ismethod(value):
        value = value.__func__
    code = getattr(value, "__code__", None)
    if code is not None:
        return str(code.co_filename)
    return str(getattr(sys.modules.get(getattr(value, "__module__", "")), "__file__", value))


def check_own(name: str, package: str, place: str, value: Any) -> None:
    """Raise ForeignPatchError unless the function is the trainer's, wrapped at most by torch."""
    root = Path(str(sys.modules[package].__file__)).parent
    torch_root = Path(str(sys.modules["torch"].__file__)).parent
    chain = [value]
    while (inner := getattr(chain[-1], "__wrapped__", None)) is not None:
        chain.append(inner)
    files = [Path(file_of(function)) for function in chain]
    foreign = [f for f in files if not f.is_relative_to(root) and not f.is_relative_to(torch_root)]
    if foreign or not files[-1].is_relative_to(root):
        raise ForeignPatchError(
            f"{name}: {place} is not {package}'s own any more, it comes from"
            f" {(foreign or files)[0]}; undo that patch first"
        )
