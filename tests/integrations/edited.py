"""A trainer's function with a text of its source replaced, in the trainer's place."""

from __future__ import annotations

import inspect
import linecache
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest


def edit(monkeypatch: pytest.MonkeyPatch, holder: Any, name: str, old: str, new: str) -> None:
    """Replace `old` by `new` in the function `name` of a module or class, until the test ends."""
    original = inspect.unwrap(getattr(holder, name))
    source = textwrap.dedent(inspect.getsource(original))
    assert old in source
    module = sys.modules[original.__module__]
    assert module.__file__
    file = Path(module.__file__).parent / "edited.py"  # never written: linecache has it
    text = source.replace(old, new, 1)
    linecache.cache[str(file)] = (len(text), None, text.splitlines(True), str(file))
    scope: dict[str, Any] = {}
    exec(compile(text, str(file), "exec"), vars(module), scope)
    monkeypatch.setattr(holder, name, scope[name])
