"""Statements of a trainer that stand in the middle of a method or a script, run as they are.

Where a trainer writes a loss into `train`, there is no function to call. The statements are
compiled from its own source, with its own file and lines, and run on the names that they read.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any


class Statements:
    """Consecutive statements as a function from the names that they read to all that they set."""

    def __init__(self, code: CodeType, scope: dict[str, Any], module: str, name: str, line: int):
        self.__code__, self.__module__, self.__qualname__ = code, module, name
        self.scope, self.line = scope, line

    def __call__(self, /, **names: Any) -> dict[str, Any]:
        space = {**self.scope, **names}
        exec(self.__code__, space)
        return space


def of_function(function: Callable[..., Any], first: str, last: str) -> Statements:
    """The statements of a function from the one to the other that begin so, unparsed.

    Raises:
        ImportError: they are not there exactly once: another version of the trainer.
    """
    plain = inspect.unwrap(function)
    tree = ast.parse(textwrap.dedent(inspect.getsource(plain)))
    ast.increment_lineno(tree, plain.__code__.co_firstlineno - 1)
    scope = vars(sys.modules[plain.__module__])
    path = plain.__code__.co_filename
    return _compiled(tree, path, scope, plain.__module__, plain.__qualname__, first, last)


def of_script(module: str, scope: dict[str, Any], first: str, last: str) -> Statements:
    """The statements of a module that is read and not imported."""
    package, _, name = module.rpartition(".")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"the package {package} is not installed")
    path = Path(next(iter(spec.submodule_search_locations))) / f"{name}.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return _compiled(tree, str(path), scope, module, "__main__", first, last)


def _compiled(
    tree: ast.AST,
    path: str,
    scope: dict[str, Any],
    module: str,
    name: str,
    first: str,
    last: str,
) -> Statements:
    found = [
        body[i : j + 1]
        for node in ast.walk(tree)
        for part in ("body", "orelse")
        if isinstance(body := getattr(node, part, None), list)
        for i, one in enumerate(body)
        if ast.unparse(one).startswith(first)
        for j, other in enumerate(body)
        if j >= i and ast.unparse(other).startswith(last)
    ]
    if len(found) != 1:
        raise ImportError(
            f"{module}.{name}: {len(found)} places from `{first}` to `{last}`, not one"
        )
    code = compile(ast.Module(found[0], []), path, "exec", dont_inherit=True)
    return Statements(code, scope, module, name, found[0][0].lineno)
