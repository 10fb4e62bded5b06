"""Extraction of statements from the middle of a function into a function of their own.

TRL writes its recursions and losses into `train` and `_compute_loss`, so there is no name to
replace. `extract` compiles such a function again from its own source, with a call in the place of
the statements, and returns the statements as a function. Both use the trainer module's globals.

Before, with `Block("last = 0", "returns = ")` under the name "gae":

    def train(self, rewards, values):
        last = 0
        for t in reversed(range(len(rewards))):
            last = rewards[t] - values[t] + last
        returns = last + values
        self.update(returns)

After:

    def train(self, rewards, values):
        (returns,) = _ppo_fast_gae(rewards=rewards, values=values)
        self.update(returns)

    def gae(rewards, values):  # `original`, which the first call is compared with
        ...the four statements...
        return {"returns": returns}
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ppo_fast.integrations._content import Definition, definition_of
from ppo_fast.integrations._errors import UnknownSourceError

_CALLEE = "_ppo_fast_{}"


@dataclass(frozen=True)
class Block:
    """Consecutive statements, from the one to the other that begin with these texts (unparsed).

    `metrics` are further statements, given in the same way; they run at the end of the block,
    under `no_grad`. Nothing that they read may change between the block and their own place.
    """

    first: str
    last: str
    metrics: tuple[str, str] | None = None


@dataclass(frozen=True)
class Extracted:
    """A block as a function from the names it reads to those that the rest of the code uses."""

    original: Callable[..., dict[str, Any]]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    body: list[ast.stmt]


def extract(
    function: Callable[..., Any], blocks: dict[str, Block]
) -> tuple[dict[str, Extracted], Callable[[dict[str, Callable[..., Any]]], Callable[..., Any]]]:
    """The blocks as functions, and a builder of `function` with replacements for them.

    Raises:
        UnknownSourceError: a statement is not there exactly once, or the source cannot be read.
    """
    module = sys.modules[function.__module__]
    plain = inspect.unwrap(function)
    definition = definition_of(function)
    if plain.__code__.co_freevars:
        raise UnknownSourceError(f"it is a closure over {plain.__code__.co_freevars}")
    lifted = {name: _lift(definition, block) for name, block in blocks.items()}
    extracted = {}
    for name, (call, body) in lifted.items():
        others = [s for other, (_, b) in lifted.items() if other != name for s in b]
        # Of functions inside one another, the last is the one whose block it is.
        around = [
            f for f in ast.walk(definition) if isinstance(f, Definition) and call in ast.walk(f)
        ]
        parameters = {a.arg for f in around for a in ast.walk(f.args) if isinstance(a, ast.arg)}
        set_before = parameters | _bound([*definition.body, *others])
        inputs = tuple(sorted(_reads(body, set())[0] & set_before))
        rest = [*around[-1].body, *others]
        used = _names(rest, ast.Load) | _names(rest, ast.Del)
        outputs = tuple(sorted(_names(body, ast.Store) & used))
        call.targets = [ast.parse(f"{', '.join(outputs)}, = 0").body[0].targets[0]]  # type: ignore
        call.value = ast.parse(f"{_CALLEE.format(name)}({_keywords(inputs)})").body[0].value  # type: ignore
        ast.fix_missing_locations(call)
        original = _function(plain, module, name, inputs, outputs, body)
        extracted[name] = Extracted(original, inputs, outputs, body)

    def build(callees: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
        given = {_CALLEE.format(name): _spread(f, extracted[name]) for name, f in callees.items()}
        made = _define(plain, module, f"def make({', '.join(given)}): ...", [definition])
        return made(**given)

    return extracted, build


def _lift(definition: Definition, block: Block) -> tuple[ast.Assign, list[ast.stmt]]:
    """Remove the block's statements; the assignment in their place is completed by `extract`."""
    body, start, stop = _find(definition, block.first, block.last)
    call = ast.Assign(targets=[], value=ast.Constant(0), lineno=body[start].lineno, col_offset=0)
    lifted = body[start:stop]
    body[start:stop] = [call]
    if block.metrics is not None:
        body, start, stop = _find(definition, *block.metrics)
        scope = ast.parse("with torch.no_grad(): pass").body[0]
        assert isinstance(scope, ast.With)
        scope.body = body[start:stop]
        body[start:stop] = [ast.copy_location(ast.Pass(), scope.body[0])]
        lifted = [*lifted, scope]
    return call, lifted


def _find(definition: Definition, first: str, last: str) -> tuple[list[ast.stmt], int, int]:
    """The only list of statements with `first` and, later, `last`; and their indices."""
    lists = [
        body
        for node in ast.walk(definition)
        for field in ("body", "orelse")
        if isinstance(body := getattr(node, field, None), list)
    ]
    found = [
        (body, i, j + 1)
        for body in lists
        for i, one in enumerate(body)
        if ast.unparse(one).startswith(first)
        for j, other in enumerate(body)
        if j >= i and ast.unparse(other).startswith(last)
    ]
    if len(found) != 1:
        raise UnknownSourceError(f"{len(found)} blocks from `{first}` to `{last}`, not one")
    return found[0]


def _bound(body: Sequence[ast.AST]) -> set[str]:
    """Names that statements assign, import or define."""
    found = _names(body, ast.Store)
    for node in (node for statement in body for node in ast.walk(statement)):
        if isinstance(node, ast.alias):
            found.add(node.asname or node.name.partition(".")[0])
        elif isinstance(node, Definition | ast.ClassDef):
            found.add(node.name)
    return found


def _names(body: Sequence[ast.AST], context: type[ast.expr_context]) -> set[str]:
    return {
        node.id
        for statement in body
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and isinstance(node.ctx, context)
    }


def _reads(body: list[ast.stmt], bound: set[str]) -> tuple[set[str], set[str] | None]:
    """Free variables of `body`, and the names surely assigned after it (None if it raises)."""
    reads: set[str] = set()
    bound = set(bound)
    for node in body:
        inner = [getattr(node, f) for f in ("body", "orelse") if getattr(node, f, None)]
        heads = [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.stmt)]
        read = _names(heads if inner else [node], ast.Load)
        if isinstance(node, ast.AugAssign):
            read |= _names([node.target], ast.Store)
        stored = _names(heads if inner else [node], ast.Store)
        after = [_reads(part, bound | stored) for part in inner]
        reads = reads.union(read - bound, *(inside for inside, _ in after))
        ways = [way for _, way in after if way is not None]
        if isinstance(node, ast.Raise):
            return reads, None
        if not inner:
            bound |= stored
        elif isinstance(node, ast.With):
            bound = ways[0]
        elif isinstance(node, ast.If) and len(inner) == 2:
            bound = set.intersection(*ways)
    return reads, bound


def _keywords(names: tuple[str, ...]) -> str:
    return ", ".join(f"{name}={name}" for name in names)


def _function(
    plain: Callable[..., Any],
    module: Any,
    name: str,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    body: list[ast.stmt],
) -> Callable[..., dict[str, Any]]:
    code = ast.parse(f"def {name}({', '.join(inputs)}): return None").body[0]
    assert isinstance(code, ast.FunctionDef)
    found = f"return {{k: v for k, v in locals().items() if k in {outputs!r}}}"
    code.body = [*body, *ast.parse(f"def _():\n {found}").body[0].body]  # type: ignore[attr-defined]
    return _define(plain, module, "def make(): ...", [code])()


def _define(plain: Any, module: Any, factory: str, body: list[ast.stmt]) -> Callable[..., Any]:
    """A function with the trainer module's globals, so that later patches hold in it too."""
    tree = ast.parse(factory)
    maker = tree.body[0]
    assert isinstance(maker, ast.FunctionDef)
    assert isinstance(body[0], ast.FunctionDef)
    maker.body = [*body, *ast.parse(f"def _():\n return {body[0].name}").body[0].body]  # type: ignore[attr-defined]
    for node in ast.walk(ast.fix_missing_locations(tree)):
        if isinstance(node, ast.stmt | ast.expr):  # lines of two sources: their ends do not fit
            node.end_lineno, node.end_col_offset = node.lineno, node.col_offset
    scope: dict[str, Any] = {}
    code = compile(tree, plain.__code__.co_filename, "exec", dont_inherit=True)
    exec(code, vars(module), scope)
    return scope["make"]


def _spread(function: Callable[..., dict[str, Any]], extracted: Extracted) -> Callable[..., Any]:
    """The replacement with its dict spread to a tuple; absent names, only deleted, are None."""

    def call(**given: Any) -> tuple[Any, ...]:
        result = function(**given)
        return tuple(result.get(name) for name in extracted.outputs)

    return call
