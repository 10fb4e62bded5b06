"""Number of files to open for one source file: its own imports or includes, transitively.

    python tests/scripts/files_to_open.py

Prints, for every Triton kernel file, C++ file and op, the files of this repository that a reader
opens to follow it, itself counted, and their lines. Exits with 1 if a file of `BOUNDS` needs more
files than its bound. An op's count ends at the boundary: what is imported on a call is not
followed.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# `PPO_KERNEL` names the header that foreach_isa.h includes.
INCLUDE = re.compile(r'^\s*#(?:include|define PPO_KERNEL) "([^"]+)"', re.MULTILINE)
# Room (path prefix) and file name -> the most files. Found by name: rooms may be divided further.
BOUNDS = {
    ("kernels", "gae.py"): 4,
    ("kernels", "logits_ppo_loss.py"): 7,
    ("csrc/cpu", "gae.cpp"): 13,  # x86.h or neon.h, not both
    ("csrc/cuda", "logits_ppo_loss.cu"): 16,
}
SHOWN = (
    ("kernels", "*.py"),
    ("csrc/cpu", "*.cpp"),
    ("csrc/cuda", "*.cu"),
    ("ppo_fast/ops", "*.py"),
)


def modules_of(path: Path) -> Iterator[str]:
    """Dotted names that a Python file imports at its top level; `from a import b` as a.b and a."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = "kernels." * node.level  # only kernels/ imports relatively, one level
            module = f"{package}{node.module or ''}".rstrip(".")
            yield module
            yield from (f"{module}.{name.name}" for name in node.names)


def python_imports(path: Path) -> set[Path]:
    """Files of this repository that a Python file imports; packages only by their modules."""
    candidates = (ROOT / f"{name.replace('.', '/')}.py" for name in modules_of(path))
    return {candidate for candidate in candidates if candidate.exists()}


def own_includes(path: Path) -> set[Path]:
    """Files of csrc/ that a C++ file includes, found beside it or from a folder above it."""
    found = set()
    for name in INCLUDE.findall(path.read_text()):
        for folder in path.parents:
            if folder == ROOT:
                break
            if (folder / name).exists():
                found.add((folder / name).resolve())
                break
    return found


def to_open(path: Path) -> set[Path]:
    """The file and all that it needs."""
    needs = python_imports if path.suffix == ".py" else own_includes
    opened: set[Path] = set()
    waiting = {path}
    while waiting:
        opened |= waiting
        waiting = set().union(*(needs(file) for file in waiting)) - opened
    return opened


def bounded(room: str, name: str) -> Path:
    """The one file of that name in a room; ValueError if there is not exactly one."""
    found = sorted((ROOT / room).rglob(name))
    if len(found) != 1:
        raise ValueError(f"{room} must hold one {name}, got {[str(path) for path in found]}")
    return found[0]


def main() -> int:
    """Print the table; 1 if a bound is exceeded."""
    bounds = {bounded(*key): most for key, most in BOUNDS.items()}
    exceeded = 0
    for room, pattern in SHOWN:
        for path in sorted((ROOT / room).rglob(pattern)):
            opened = to_open(path)
            lines = sum(len(file.read_text().splitlines()) for file in opened)
            most = bounds.get(path)
            row = f"{path.relative_to(ROOT).as_posix():40} {len(opened):3} files {lines:5} lines"
            if most is not None:
                over = len(opened) > most
                exceeded += over
                row += f"   at most {most}{': EXCEEDED' if over else ''}"
            print(row)
    return int(exceeded > 0)


if __name__ == "__main__":
    sys.exit(main())
