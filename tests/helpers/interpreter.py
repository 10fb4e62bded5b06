"""Faster interpreter of Triton for the tests: `triton.language` is patched once a launch.

The interpreter replaces the builtins of `triton.language` when a kernel is launched and again at
every call of a function inside it, where all of them are replaced already; the search for them
takes half of a launch's time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any, Protocol

import triton.language as tl
from triton.runtime import interpreter


class Scope(Protocol):
    """The replacements of one patch."""

    def restore(self) -> None: ...


class PatchOnce:
    """`interpreter._patch_lang` of which the calls inside a launch return at once."""

    def __init__(self, patch: Callable[[Any], Scope]) -> None:
        self.patch = patch
        self.done: set[ModuleType] = set()  # patched by the launch under way
        self.modules = cache(self._modules)

    def __call__(self, fn: Any) -> Scope:
        wanted = self.modules(fn)
        if wanted <= self.done:
            return interpreter._LangPatchScope()
        launch = not self.done
        self.done |= wanted
        scope = self.patch(fn)
        return Launch(scope, self.done) if launch else scope

    @staticmethod
    def _modules(fn: Any) -> frozenset[ModuleType]:
        """The modules of the language that a function sees, which are those that are patched."""
        names = fn.__globals__.values()
        return frozenset(module for module in (tl, tl.core) if any(v is module for v in names))


class Launch:
    """The scope of a launch, whose end lets the next one patch again."""

    def __init__(self, scope: Scope, done: set[ModuleType]) -> None:
        self.scope, self.done = scope, done

    def restore(self) -> None:
        self.done.clear()
        self.scope.restore()


def patch_once_a_launch() -> None:
    """Install PatchOnce, for a Triton whose launches restore what they patched."""
    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = PatchOnce(interpreter._patch_lang)
