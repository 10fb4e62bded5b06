"""Tests of private names: those of torch and other packages stand in one file, and are there."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
HOLDER = "ppo_fast/_torch_private.py"
PACKAGES = ("torch", "triton", "transformers", "tokenizers", "peft", "accelerate", "safetensors")
# What HOLDER names; a further one belongs there, with what checks that torch has it.
HELD = {
    "torch._C._autograd",
    "torch._C._autograd._get_current_graph_task_keep_graph",
    "torch._dynamo.graph_break",
    "torch.autograd.forward_ad._current_level",
    "fn._dynamo_marked_constant",
}
# Trainers' own names are read where a trainer is patched or refereed, which checks its sources.
TRAINERS = ("ppo_fast/integrations/", "ppo_fast/referee/trainers/")
NAMED_TUPLES = {"_replace", "_asdict", "_fields", "_make"}


def trees() -> dict[str, ast.Module]:
    """Syntax trees of the installed sources by path."""
    found = [
        path
        for folder in ("ppo_fast", "kernels")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if ROOT / "ppo_fast/kernels" not in path.parents
    ]
    return {p.relative_to(ROOT).as_posix(): ast.parse(p.read_text()) for p in found}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names(tree: ast.Module) -> Iterator[str]:
    """Names that a file defines: functions, classes, variables, attributes of self and ctx."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Name(id=name, ctx=ast.Store()):
                yield name
            case ast.Attribute(value=ast.Name(id="self" | "ctx"), attr=name, ctx=ast.Store()):
                yield name


def aliases(tree: ast.Module) -> dict[str, str]:
    """Dotted names that a file's imports give its own names."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for given in node.names:
                whole = given.name if given.asname else given.name.split(".")[0]
                found[given.asname or whole] = whole
        elif isinstance(node, ast.ImportFrom):
            for given in node.names:
                found[given.asname or given.name] = f"{node.module}.{given.name}"
    return found


def read_names(tree: ast.Module) -> Iterator[str]:
    """Dotted names that a file reads or sets, the longest alone, also by getattr and setattr."""
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        match node:
            case ast.Attribute() if id(node) not in inner:
                yield dotted(node)
            case ast.Call(
                func=ast.Name(id="getattr" | "setattr" | "delattr"),
                args=[of, ast.Constant(value=name), *_],
            ):
                yield f"{dotted(of)}.{name}"


def dotted(node: ast.AST) -> str:
    """`a.b.c`; a call's or an index's attribute is that of `it`."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "it"


def private_names(path: str, tree: ast.Module, ours: set[str]) -> set[str]:
    """Private names of the packages, and private attributes that are not among `ours`."""
    known = aliases(tree)
    full = set(known.values())
    for name in read_names(tree):
        root, _, rest = name.partition(".")
        full.add(f"{known.get(root, root)}.{rest}")
    return {name for name in full if is_foreign(name, path, ours)}


def is_foreign(name: str, path: str, ours: set[str]) -> bool:
    parts = name.split(".")
    if parts[0] in PACKAGES:
        return any(map(is_private, parts))
    unknown = is_private(parts[-1]) and parts[-1] not in ours | NAMED_TUPLES
    return unknown and parts[0] != "ppo_fast" and not path.startswith(TRAINERS)


def test_private_names_stand_in_one_file() -> None:
    found = trees()
    ours = {name for tree in found.values() for name in own_names(tree)}
    names = {path: private_names(path, tree, ours) for path, tree in found.items()}
    assert {path: sorted(found) for path, found in names.items() if found} == {
        HOLDER: sorted(HELD)
    }


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (
            "import torch\ntorch._C._functions.DelayedError(b'', 1)",
            "torch._C._functions.DelayedError",
        ),
        (
            "from torch.nn import functional as F\nF._canonical_mask()",
            "torch.nn.functional._canonical_mask",
        ),
        ("import torch.distributed as dist\ndist._x", "torch.distributed._x"),
        ("from torch._higher_order_ops import scan", "torch._higher_order_ops.scan"),
        ("import torch.utils._pytree as p", "torch.utils._pytree"),
        ("import torch\ngetattr(torch, '_x', None)", "torch._x"),
        ("def f(bpe):\n    return bpe._tokenizer", "bpe._tokenizer"),
    ],
)
def test_a_new_one_is_noticed(code: str, name: str) -> None:
    assert private_names("ppo_fast/ops/a.py", ast.parse(code), {"_own"}) == {name}


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch.autograd.forward_ad", "_current_level"),
        ("torch._C._autograd", "_get_current_graph_task_keep_graph"),
    ],
)
def test_a_dropped_one_is_named_by_the_import(module: str, name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import torch; del {module}.{name}; import ppo_fast"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: ppo_fast needs {module}.{name}, which torch")


def test_the_compilers_names_are_there() -> None:
    """Importing ppo_fast does not look: it would load the compiler."""
    marked = torch.compiler.assume_constant_result(lambda: 1)
    assert marked._dynamo_marked_constant is True
    assert callable(torch._dynamo.graph_break)
