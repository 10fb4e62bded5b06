"""Tests of the layers and of size: imports point down, heavy ones are lazy, files stay short."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STDLIB = sys.stdlib_module_names
MAX_FILE, MAX_FUNCTION, MAX_KERNEL = 400, 50, 90

# Layer (path prefix) -> what of this repository, and of other packages, its files may import.
# The first matching row counts. Names under TYPE_CHECKING are free.
LAYERS: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = [
    ("kernels/", ("ppo_fast.kernels",), ("torch", "triton")),
    (
        "ppo_fast/reference/",
        (
            "ppo_fast.reference",
            "ppo_fast._results",
            "ppo_fast._sequences",
            "ppo_fast.corrections",
            "ppo_fast.support",
            "ppo_fast.surrogates",
            "ppo_fast.teacher",
        ),
        ("torch",),
    ),
    (
        "ppo_fast/ops/",
        (
            "ppo_fast.ops",
            "ppo_fast._checks",
            "ppo_fast._backend",
            "ppo_fast._boundary",
            "ppo_fast._results",
            "ppo_fast._sequences",
            "ppo_fast._torch_private",
            "ppo_fast.corrections",
            "ppo_fast.reference",
            "ppo_fast.support",
            "ppo_fast.surrogates",
            "ppo_fast.teacher",
        ),
        ("torch",),
    ),
    # The referee's law: it shares no code with the ops.
    ("ppo_fast/referee/formulas/", ("ppo_fast.referee",), ("torch",)),
    ("ppo_fast/referee/cases.py", (), ("torch",)),
    ("ppo_fast/referee/judge.py", ("ppo_fast.referee",), ("torch",)),
    ("ppo_fast/compat.py", ("ppo_fast.ops", "ppo_fast.reference", "ppo_fast.support"), ("torch",)),
    (
        "ppo_fast/_boundary/",
        ("ppo_fast._boundary", "ppo_fast._results", "ppo_fast.corrections", "ppo_fast.teacher"),
        ("torch",),
    ),
    ("ppo_fast/corrections.py", (), ()),
    ("ppo_fast/support.py", (), ("torch",)),
    ("ppo_fast/teacher.py", (), ("torch",)),
    ("ppo_fast/surrogates.py", ("ppo_fast._sequences",), ("torch",)),
    ("ppo_fast/_sequences.py", ("ppo_fast._torch_private",), ("torch",)),
    ("ppo_fast/_torch_private.py", (), ("torch",)),
    ("ppo_fast/_results.py", (), ("torch",)),
    ("ppo_fast/_checks.py", (), ("torch",)),
    ("ppo_fast/_cflags.py", (), ()),
    ("ppo_fast/_ext.py", ("ppo_fast._cflags", "ppo_fast._boundary"), ("torch",)),
    ("ppo_fast/_dispatch.py", (), ("torch",)),
    (
        "ppo_fast/_backend.py",
        ("ppo_fast._ext", "ppo_fast._dispatch", "ppo_fast._torch_private"),
        ("torch",),
    ),
    (
        "ppo_fast/__init__.py",
        (
            "ppo_fast._backend",
            "ppo_fast._results",
            "ppo_fast.corrections",
            "ppo_fast.ops",
            "ppo_fast.support",
            "ppo_fast.surrogates",
            "ppo_fast.teacher",
        ),
        (),
    ),
    (
        "ppo_fast/testing/",
        (
            "ppo_fast.testing",
            "ppo_fast._results",
            "ppo_fast._sequences",
            "ppo_fast.reference",
            "ppo_fast.teacher",
        ),
        ("torch",),
    ),
]
PRIVATE = ("ppo_fast.kernels", "ppo_fast.reference", "ppo_fast.ops", "ppo_fast._")


def sources() -> list[Path]:
    """Every Python file of the repository once, not through the package's symlinks."""
    folders = ("ppo_fast", "kernels", "tests", "benchmarks")
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    linked = (ROOT / "ppo_fast/kernels", ROOT / "ppo_fast/csrc")
    return [
        ROOT / "setup.py",
        *(p for p in found if not any(link in p.parents for link in linked)),
    ]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names, `from a import b` as a.b; none of those for the type checker only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = (
                "ppo_fast.kernels." * node.level
            )  # only kernels/ imports relatively, one level
            assert node.level <= 1
            yield from (f"{package}{node.module}.{name.name}" for name in node.names)
        else:
            yield from imported(node)


def names_of(path: Path) -> set[str]:
    return set(imported(ast.parse(path.read_text()))) - {"__future__.annotations"}


def is_under(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == p or name.startswith(f"{p}.") for p in prefixes)


PUBLIC = {
    f"ppo_fast.{name}"
    for name in ("Loss", "Moments", "RolloutStats", "Stats", "Support", "Teacher")
} | {"ppo_fast"}


@pytest.mark.parametrize("path", sources(), ids=relative)
def test_imports_point_down(path: Path) -> None:
    row = next((row for row in LAYERS if relative(path).startswith(row[0])), None)
    if not relative(path).startswith("kernels/"):
        assert all(
            getattr(node, "level", 0) == 0 for node in ast.walk(ast.parse(path.read_text()))
        )
    if row is None:
        assert not {n for n in names_of(path) if n.split(".")[0] == "kernels"}
        return
    _, ours, theirs = row
    bad = {
        name
        for name in names_of(path)
        if name.split(".")[0] not in STDLIB
        and not is_under(name, theirs)
        and not is_under(name, ours)
        and not is_import_of_module(name, ours)
        and not (relative(path).startswith("ppo_fast/testing/") and name in PUBLIC)
    }
    assert not bad


def is_import_of_module(name: str, ours: tuple[str, ...]) -> bool:
    """`from ppo_fast import _checks` is the import of ppo_fast._checks."""
    return name in ours


@pytest.mark.parametrize("folder", ["ppo_fast/loop", "ppo_fast/integrations"])
def test_the_loop_uses_the_public_api(folder: str) -> None:
    """loop, integrations -> ops: no kernels, no reference, nothing private but `_backend.select`,
    which gives an automatic choice its name."""
    own = folder.replace("/", ".")
    bad = {
        f"{relative(path)}: {name}"
        for path in (ROOT / folder).rglob("*.py")
        for name in names_of(path)
        if name.startswith(PRIVATE)
        and not name.startswith(own)
        and name != "ppo_fast._backend.select"
    }
    assert not bad


# Room of the benchmarks -> the rooms that it may import besides itself.
ROOMS = {
    "ops": (),
    "peers": ("ops",),
    "harness": ("ops", "peers"),
    "report": ("ops", "peers", "harness"),
    "loop": ("ops", "harness", "report", "conftest"),
    "gpu": ("ops", "peers", "harness", "report"),
}


@pytest.mark.parametrize("room", ROOMS)
def test_the_benchmarks_rooms_point_down(room: str) -> None:
    allowed = tuple(f"benchmarks.{name}" for name in (room, *ROOMS[room]))
    paths = [path for path in sources() if relative(path).startswith(f"benchmarks/{room}/")]
    bad = {
        f"{relative(path)}: {name}"
        for path in paths
        for name in names_of(path)
        if name.startswith("benchmarks") and not is_under(name, allowed)
    }
    assert len(paths) > 1 and not bad


# Wing of the loop -> what of the loop it may import besides itself.
WINGS = {
    "data": ("config", "files", "values"),
    "ranks": ("config",),
    "log": ("config", "files", "values", "data"),
    "model": ("config", "files", "data", "ranks"),
    "sampling": ("config", "values", "data", "model"),
    "rewards": ("config", "values", "data", "model"),
    "checkpoint": ("config", "files", "model", "ranks"),
}


def every_import(path: Path) -> set[str]:
    """Dotted names, those for the type checker and those within functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


@pytest.mark.parametrize("wing", WINGS)
def test_the_loops_wings_point_down(wing: str) -> None:
    allowed = tuple(f"ppo_fast.loop.{name}" for name in (wing, *WINGS[wing]))
    paths = [path for path in sources() if relative(path).startswith(f"ppo_fast/loop/{wing}/")]
    bad = {
        f"{relative(path)}: {name}"
        for path in paths
        for name in every_import(path)
        if name.startswith("ppo_fast.loop") and not is_under(name, allowed)
    }
    assert len(paths) > 1 and not bad


@pytest.mark.parametrize("package", ["ppo_fast", "benchmarks"])
def test_a_package_imports_no_circle(package: str) -> None:
    """Imports for the type checker and those within functions count."""
    paths = [path for path in sources() if relative(path).startswith(f"{package}/")]
    modules = {
        relative(path).removesuffix(".py").removesuffix("/__init__").replace("/", "."): path
        for path in paths
    }

    def module_of(name: str) -> str:
        """The module that a dotted name is, or is in."""
        while name not in modules and "." in name:
            name = name.rpartition(".")[0]
        return name

    graph = {
        module: {module_of(n) for n in every_import(path) if is_under(n, (package,))} - {module}
        for module, path in modules.items()
    }
    assert set(graphlib.TopologicalSorter(graph).static_order()) >= modules.keys()


def test_no_backend_is_imported_by_another() -> None:
    """The lazy loader of the op boundary alone names `kernels`.

    tests/aot and tests/ptx compile them, and what an op reaches only with a million tokens is
    tested by itself.
    """
    naming = {
        relative(path)
        for path in sources()
        if not relative(path).startswith("kernels/")
        and any(is_under(name, ("ppo_fast.kernels", "kernels")) for name in names_of(path))
    }
    assert {path for path in naming if not path.startswith(("tests/aot/", "tests/ptx/"))} <= {
        "tests/backends/test_aot.py",
        "tests/backends/test_divergence_triton.py",
        "tests/backends/test_logprobs_kernel.py",
        "tests/backends/test_loss_counts.py",
        "tests/backends/test_sparse_head_kernel.py",
        "tests/backends/test_specialisations.py",
    }


def test_kernels_is_not_a_package_of_its_own() -> None:
    """transformers imports a package `kernels`; ours is reached as ppo_fast.kernels."""
    assert not (ROOT / "kernels/__init__.py").exists()
    for name in ("kernels", "csrc"):
        link = ROOT / "ppo_fast" / name
        assert link.is_symlink() and link.resolve() == ROOT / name


def test_importing_is_light() -> None:
    """`import ppo_fast` loads torch alone, and runs from any folder."""
    code = (
        "import torch, sys; before = set(sys.modules); import ppo_fast;"
        "new = {m.split('.')[0] for m in set(sys.modules) - before};"
        "print(sorted(new & {'triton', 'transformers', 'numpy', 'rich', 'tyro', 'hypothesis'}))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"


HIDE = """
import sys
class Hide:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        hidden = name.startswith({hidden!r})
        return None if hidden else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Hide(finder) for finder in sys.meta_path]
"""


@pytest.mark.parametrize(
    ("hidden", "backend", "lost"),
    [
        ("triton", "triton", True),
        ("ppo_fast._C", "cpu", True),
        ("transformers", "cpu", False),
        ("numpy", "cpu", False),
    ],
)
def test_what_is_missing_costs_its_own_backend_alone(
    hidden: str, backend: str, lost: bool
) -> None:
    """The backend computes unless it is the lost one, which says why; the others compute."""
    code = HIDE.format(hidden=hidden) + (
        "import torch, ppo_fast; x = torch.ones(2, 3); reason = ppo_fast.backends()[sys.argv[1]];"
        "left = 'reference' if reason else sys.argv[1];"
        "print(ppo_fast.gae(x, x, backend=left).returns.sum().item() > 0, reason)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, backend],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    computed, reason = done.stdout.strip().split(" ", 1)
    assert computed == "True"
    assert (reason != "None") == lost
    assert not lost or "not installed" in reason or "not built" in reason


def docstrings(tree: ast.AST) -> set[int]:
    """Line numbers of every docstring."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            text = node.body[0]
            lines |= set(range(text.lineno, (text.end_lineno or text.lineno) + 1))
    return lines


def code_lines(
    path: Path, start: int = 1, end: int | None = None, skip: frozenset[int] = frozenset()
) -> int:
    """Lines that are neither blank, comment nor docstring."""
    lines = path.read_text().splitlines()[start - 1 : end]
    return sum(
        1
        for number, line in enumerate(lines, start)
        if number not in skip and line.strip() and not line.strip().startswith(("#", "//"))
    )


@pytest.mark.parametrize("path", sources(), ids=relative)
def test_sizes(path: Path) -> None:
    tree = ast.parse(path.read_text())
    skip = frozenset(docstrings(tree))
    assert code_lines(path, skip=skip) <= MAX_FILE
    long = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            is_kernel = any("jit" in ast.unparse(d) for d in node.decorator_list)
            # The body without the signature.
            size = code_lines(path, node.body[0].lineno, node.end_lineno, skip)
            if size > (MAX_KERNEL if is_kernel else MAX_FUNCTION):
                long[node.name] = size
    assert not long


@pytest.mark.parametrize(
    "path",
    [p for e in ("*.h", "*.cpp", "*.cuh", "*.cu") for p in sorted((ROOT / "csrc").rglob(e))],
    ids=relative,
)
def test_sizes_of_cpp(path: Path) -> None:
    assert code_lines(path) <= MAX_FILE


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("test_*.py")), ids=relative)
def test_every_test_asserts_and_none_catches_everything(path: Path) -> None:
    tree = ast.parse(path.read_text())
    broad = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))
    ]
    assert not broad
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    helpers = {node.name for node in functions if asserts(node, set())}
    assert not [
        node.name
        for node in functions
        if node.name.startswith("test_") and not asserts(node, helpers)
    ]


def asserts(function: ast.FunctionDef, helpers: set[str]) -> bool:
    """It asserts, expects an exception, or calls a helper that does."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if "assert" in name or name.endswith("raises") or name in helpers:
                return True
    return False
