"""Content of a place that is patched: the names in and out, and a digest of every statement.

Two versions of a trainer are the same at a place if its content is: of a function, the parameters
with their defaults and the statements; of a `Block`, the names that it reads and sets and its
statements. Comments, docstrings, annotations, formatting, lines that only log or warn, and the
texts of errors do not count. Digests are equal in every version of Python from 3.10.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import torch

from ppo_fast.integrations._errors import UnknownSourceError

Definition = ast.FunctionDef | ast.AsyncFunctionDef
# Fields without a meaning at run time, and those that some versions of Python do not have.
_SKIPPED = {"annotation", "returns", "type_comment", "type_params", "kind", "ctx"}
# Nodes that stand in a list inside a statement and have statements or a line of their own.
_PARTS = (ast.stmt, ast.ExceptHandler, ast.match_case)
_LOGGERS = {"logger", "logging", "warnings"}


@dataclass(frozen=True)
class Statement:
    """A statement without those inside it; compared by its digest."""

    digest: str
    line: int
    text: str


@dataclass(frozen=True)
class Content:
    """Content of a place.

    Attributes:
        takes: the parameters, "name" or "name=default", or the names that a block reads.
        gives: the names that a block sets and the rest of its function uses.
        statements: the digest of each in the order of the text, those inside one after it.
    """

    takes: tuple[str, ...]
    gives: tuple[str, ...]
    statements: tuple[str, ...]

    def covers(self, other: Content) -> bool:
        """Equality, but for names that the other gives no more."""
        return self.fits(other) and self.statements == other.statements

    def fits(self, other: Content) -> bool:
        """Equality of the names taken; the other may give fewer."""
        return self.takes == other.takes and set(other.gives) <= set(self.gives)


def definition_of(function: Callable[..., Any]) -> Definition:
    """The syntax tree of a function, with the lines of its file.

    Raises:
        UnknownSourceError: the source cannot be read.
    """
    plain = inspect.unwrap(function)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(plain)))
        ast.increment_lineno(tree, plain.__code__.co_firstlineno - 1)
    except (OSError, TypeError, AttributeError, SyntaxError) as error:
        raise UnknownSourceError(f"its source cannot be read ({error})") from error
    definition = tree.body[0]
    if not isinstance(definition, Definition):
        raise UnknownSourceError(f"it is no function: `{_short(_text(definition))}`")
    return definition


def definitions_of(holder: Any, key: str) -> list[Definition]:
    """The syntax tree of a function; of `apply` of an autograd.Function, its two directions'."""
    if key != "apply" or not _is_autograd(holder):
        return [definition_of(getattr(holder, key))]
    names = ("forward", "setup_context", "backward")
    return [definition_of(vars(holder)[name]) for name in names if name in vars(holder)]


def content_of(
    holder: Any, key: str, helpers: Sequence[Definition] = ()
) -> tuple[Content, list[Statement]]:
    """Content of a whole function, and of the helpers that it calls after it."""
    parts = definitions_of(holder, key)
    takes = tuple(_parameters(parts[0].args))
    if key == "apply" and _is_autograd(holder):
        return described(takes[1:], (), [*parts, *helpers])  # without ctx
    decorators = [ast.copy_location(ast.Expr(d), d) for d in parts[0].decorator_list]
    return described(takes, (), [*decorators, *parts[0].body, *helpers])


def _is_autograd(holder: Any) -> bool:
    return inspect.isclass(holder) and issubclass(holder, torch.autograd.Function)


def described(
    takes: tuple[str, ...], gives: tuple[str, ...], body: Sequence[ast.stmt]
) -> tuple[Content, list[Statement]]:
    """Content of these statements, and the statements."""
    statements = list(_flat(body, ""))
    return Content(takes, gives, tuple(s.digest for s in statements)), statements


def difference(found: Content, statements: list[Statement], known: Sequence[Content]) -> str:
    """The first thing that `found` has, or has not, beside the known content next to it."""

    def likeness(one: Content) -> tuple[bool, float]:
        return one.fits(found), SequenceMatcher(None, one.statements, found.statements).ratio()

    nearest = max(known, key=likeness)
    if not nearest.fits(found):
        return _other_names(found, nearest)
    matcher = SequenceMatcher(None, nearest.statements, found.statements, autojunk=False)
    tag, _, _, start, _ = next(code for code in matcher.get_opcodes() if code[0] != "equal")
    if tag == "delete":
        before = f"before line {statements[start].line}" if statements[start:] else "at the end"
        return f"a known statement is missing {before}"
    one = statements[start]
    return f"statement at line {one.line} is not a known one: `{_short(one.text)}`"


def _other_names(found: Content, nearest: Content) -> str:
    more = [name for name in found.takes if name not in nearest.takes]
    less = [name for name in nearest.takes if name not in found.takes]
    if more and less:
        return f"it takes `{more[0]}`, not `{less[0]}`"
    if more or less:
        return f"it takes `{more[0]}`" if more else f"it does not take `{less[0]}`"
    if found.takes != nearest.takes:
        return f"it takes ({', '.join(found.takes)}) in this order"
    return f"it sets `{next(name for name in found.gives if name not in nearest.gives)}`"


def _parameters(arguments: ast.arguments) -> Iterator[str]:
    positional = [*arguments.posonlyargs, *arguments.args]
    without = len(positional) - len(arguments.defaults)
    for i, parameter in enumerate(positional):
        yield _parameter(parameter, arguments.defaults[i - without] if i >= without else None)
        if i + 1 == len(arguments.posonlyargs):
            yield "/"
    if arguments.vararg or arguments.kwonlyargs:
        yield f"*{arguments.vararg.arg if arguments.vararg else ''}"
    for parameter, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield _parameter(parameter, default)
    if arguments.kwarg:
        yield f"**{arguments.kwarg.arg}"


def _parameter(parameter: ast.arg, default: ast.expr | None) -> str:
    if default is None:
        return parameter.arg
    plain = isinstance(default, ast.Constant) and not isinstance(default.value, str)
    return f"{parameter.arg}={ast.unparse(default) if plain else _digest(_dump(default))}"


def _flat(nodes: Sequence[ast.AST], path: str) -> Iterator[Statement]:
    """The statements in the order of the text; each one's digest has its place in the nesting."""
    for node in nodes:
        if _says_nothing(node):
            continue
        if isinstance(node, ast.AnnAssign):
            assert node.value is not None
            plain = ast.Assign(targets=[node.target], value=node.value)
            node = ast.copy_location(plain, node)
        line = getattr(node, "lineno", 0) or node.pattern.lineno  # type: ignore[attr-defined]
        yield Statement(_digest(path + _dump(node)), line, _text(node))
        for field, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], _PARTS):
                yield from _flat(value, f"{path}{field}.")


def _says_nothing(node: ast.AST) -> bool:
    """A docstring, a declaration without a value, a line that logs or warns."""
    if isinstance(node, ast.AnnAssign):
        return node.value is None
    if not isinstance(node, ast.Expr):
        return False
    value = node.value
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
        of = value.func.value
        logs = isinstance(of, ast.Name) and of.id in _LOGGERS
        return logs and not any(isinstance(x, ast.NamedExpr) for x in ast.walk(value))
    return isinstance(value, ast.Constant)


def _dump(x: Any, texts: bool = True) -> str:
    """A syntax tree as text, without the statements inside it and the texts of errors."""
    if isinstance(x, ast.Assert):
        x = ast.Assert(test=x.test)
    if isinstance(x, ast.Raise):
        texts = False
    if isinstance(x, ast.AST):
        if not texts and (
            isinstance(x, ast.JoinedStr)
            or (isinstance(x, ast.Constant) and isinstance(x.value, str))
        ):
            return "text"
        fields = ",".join(
            f"{name}={_dump(value, texts)}"
            for name, value in ast.iter_fields(x)
            if name not in _SKIPPED and value is not None and value != [] and not _inside(value)
        )
        return f"{type(x).__name__}({fields})"
    if isinstance(x, list):
        return f"[{','.join(_dump(item, texts) for item in x)}]"
    return f"{type(x).__name__}:{x!r}"


def _inside(value: Any) -> bool:
    return isinstance(value, list) and isinstance(value[0], _PARTS)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _text(node: ast.AST) -> str:
    return ast.unparse(node).strip().partition("\n")[0]


def _short(line: str) -> str:
    return line if len(line) <= 80 else f"{line[:77]}..."
