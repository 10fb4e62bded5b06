"""Compilation of csrc/cuda/*/*.cu without a GPU, once for all test workers and the next run, and a
reader of what the compiler says of the kernels.
"""

from __future__ import annotations

import fcntl
import hashlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils import cpp_extension

from ppo_fast import _cflags

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
OBJECTS = ROOT / "build/cuda-tests"
SOURCES = [Path(path) for path in _cflags.cuda_sources(CSRC)]
EVERY = tuple(_cflags.ARCHITECTURES)
# Every warning is an error, the compiler's as the assembler's, and the assembler reports.
STRICT = ("-Werror=all-warnings", "-Xcompiler=-Wall,-Werror,-Wno-unknown-pragmas", "-Xptxas=-v")


class Kernel(NamedTuple):
    """One kernel for one architecture, as ptxas reports it."""

    name: str
    architecture: str
    stack: int
    spilled: int
    registers: int


def nvcc() -> Path | None:
    """nvcc, from the PATH or where CUDA is installed."""
    found = shutil.which("nvcc") or str(Path(cpp_extension.CUDA_HOME or "/") / "bin/nvcc")
    return Path(found) if Path(found).is_file() else None


def command(source: Path, target: Path, architectures: tuple[str, ...]) -> list[str]:
    """The whole build's flags, for these of the architectures that we have kernels for."""
    includes = [f"-isystem={path}" for path in cpp_extension.include_paths()]
    machine = [_cflags.gencode(name) for name in architectures]
    return [
        str(nvcc()),
        *_cflags.NVCC_FLAGS,
        *STRICT,
        *includes,
        *machine,
        "-c",
        str(source),
        "-o",
        str(target),
    ]


@cache
def version() -> str:
    """The compiler's and torch's."""
    said = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True)
    return said.stdout + torch.__version__


def digest(source: Path, architectures: tuple[str, ...]) -> str:
    """Of all that a compilation depends on: source, every header, command and versions."""
    # The same in every checkout.
    how = command(source.relative_to(ROOT), Path("out"), architectures)
    state = hashlib.sha256(" ".join([version(), *how]).encode())
    for path in (source, *sorted(p for e in ("*.h", "*.cuh") for p in CSRC.rglob(e))):
        state.update(path.read_bytes())
    return state.hexdigest()[:24]


class Compiled(NamedTuple):
    """An object file and what the compiler said."""

    object: Path
    log: str
    status: int


def _object(source: Path, architectures: tuple[str, ...]) -> Path:
    """The path of an object file; that for all architectures bears the source's name alone."""
    stem = source.stem if architectures == EVERY else ".".join((source.stem, *architectures))
    return OBJECTS / f"{stem}-{digest(source, architectures)}.o"


@cache
def compiled(source: Path, architectures: tuple[str, ...] = EVERY) -> Compiled:
    """The source compiled, by whichever test worker is first; the newest object alone is kept."""
    OBJECTS.mkdir(parents=True, exist_ok=True)
    target = _object(source, architectures)
    log, stem = target.with_suffix(".log"), target.stem.rpartition("-")[0]
    with open(OBJECTS / f"{stem}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not log.exists():
            for old in OBJECTS.glob(f"{stem}-*"):
                old.unlink()
            done = subprocess.run(
                command(source, target, architectures), capture_output=True, text=True, check=False
            )
            complete = log.with_suffix(".tmp")
            complete.write_text(f"{done.returncode}\n{done.stdout}{done.stderr}")
            complete.rename(log)
    status, _, said = log.read_text().partition("\n")
    return Compiled(target, said, int(status))


def compiled_for(source: Path, architecture: str) -> Compiled:
    """The source compiled for all architectures if it is already, else for that one alone."""
    whole = _object(source, EVERY).with_suffix(".log").exists()
    return compiled(source) if whole else compiled(source, (architecture,))


def kernels(log: str) -> Iterator[Kernel]:
    """The report of `-Xptxas -v` on each kernel."""
    for part in log.split("Compiling entry function '")[1:]:
        name, architecture = re.match(r"(\w+)' for '(\w+)'", part).groups()
        stack, stores, loads = map(
            int,
            re.search(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
            ).groups(),
        )
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        yield Kernel(name, architecture, stack, stores + loads, registers)
