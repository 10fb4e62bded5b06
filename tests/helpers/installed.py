"""Other packages' own advantage code, and the distance from it that ppo_fast may have.

verl, OpenRLHF and TRL import Ray, DeepSpeed, datasets and more before a single formula can be
called. So their functions are taken by name out of the installed files and run as they stand
there, without the modules' imports and without decorators, which register or disable gradients.
"""

from __future__ import annotations

import ast
import importlib.util
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ppo_fast import testing

# γV', +r, −V, γλ, its product, the sum, +V of the return: the roundings of one step.
ROUNDINGS = 7


def source(pip: str, file: str) -> ast.Module:
    """The syntax tree of an installed file of `package==version`, or a skip that names it."""
    package = pip.partition("==")[0]
    spec = importlib.util.find_spec(package)
    root = Path(next(iter(spec.submodule_search_locations or [""]))) if spec else Path()
    if spec is None or not (root / file).is_file():
        pytest.skip(f"needs `pip install --no-deps {pip}`")
    return ast.parse((root / file).read_text(encoding="utf-8"))


def functions(tree: ast.AST, *names: str, **known: Any) -> types.SimpleNamespace:
    """The functions and methods of these names; `known` are the globals that they use."""
    found = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name in names]
    assert sorted(n.name for n in found) == sorted(names), [n.name for n in found]
    for node in found:
        node.decorator_list = []
    scope = {"torch": torch, **known}
    _run(list(found), scope)
    return types.SimpleNamespace(**{name: scope[name] for name in names})


def block(tree: ast.AST, first: str, last: str, **known: Any) -> dict[str, Any]:
    """Run the statements between the assignment of `first` and the last one of `last`.

    They are neighbours in the one block that assigns both; a branch that assigns `last` again ends
    them. Gives every name in scope after it.
    """

    def assigned(body: list[ast.stmt], name: str) -> list[int]:
        targets = [n.targets[0] if isinstance(n, ast.Assign) else None for n in body]
        return [i for i, n in enumerate(targets) if isinstance(n, ast.Name) and n.id == name]

    bodies = [n.body for n in ast.walk(tree) if isinstance(getattr(n, "body", None), list)]
    (body,) = [b for b in bodies if assigned(b, first) and assigned(b, last)]
    scope = {"torch": torch, **known}
    (end, *_) = (i for i in reversed(range(len(body))) if _assigns(body[i], last))
    _run(body[assigned(body, first)[0] : end + 1], scope)
    return scope


def _assigns(statement: ast.stmt, name: str) -> bool:
    targets = (n.targets[0] for n in ast.walk(statement) if isinstance(n, ast.Assign))
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)


def _run(body: list[ast.stmt], scope: dict[str, Any]) -> None:
    # Annotations name types of modules that are not imported: left unevaluated.
    code = compile(ast.Module(body, []), "<installed>", "exec", flags=annotations.compiler_flag)
    exec(code, scope)


def reach(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> float:
    """No |A_t| is above max|r + γV' − V| · Σ (γλ)^k over the steps."""
    steps = max(rewards.shape)
    total = steps if gamma * lam == 1 else min(steps, 1 / (1 - gamma * lam))
    return float(rewards.abs().max() + 2 * values.abs().max()) * total


def assert_near(ours: Tensor, theirs: Tensor, magnitude: float, steps: int) -> None:
    """Two recurrences over `steps` steps: ours in our result's precision, theirs as it came.

    The wider of the two roundings counts, once for each side.
    """
    compute = max(ours.dtype, theirs.dtype, key=lambda t: torch.finfo(t).eps)
    testing.assert_within_budget(
        ours, theirs, condition=magnitude, ops=2 * ROUNDINGS * steps, compute=compute
    )


def assert_near_whitened(
    ours: Tensor, theirs: Tensor, raw: Tensor, magnitude: float, steps: int, slack: float = 0.0
) -> None:
    """w = (A − mean)/σ of the kept advantages `raw` (fp64), which are within `magnitude`.

    An error E in every A moves the mean by E and σ by at most E, so w by (2 + |w|)E/σ; the sums
    add a rounding for each of their terms. `slack` is a relative error that theirs has by design.
    """
    compute = max(ours.dtype, theirs.dtype, key=lambda t: torch.finfo(t).eps)
    sharp = float((2 + theirs.abs().max()) / raw.std())
    ops = 2 * ROUNDINGS * steps + 2 * raw.numel()
    by_design = slack * sharp * magnitude / torch.finfo(compute).eps
    testing.assert_within_budget(
        ours, theirs, condition=sharp * magnitude + by_design / ops, ops=ops, compute=compute
    )
