"""Compiled Triton kernels to carry to a GPU machine: `python -m benchmarks.gpu.kernel_cache ...`.

    pack FILE [OP ...]   compile what the smoke test and the goals launch on sm_90, without a GPU;
                         of the ops named, the smoke test's alone
    unpack FILE          add that to Triton's own cache here, if its build is the one that made it

Triton finds a kernel by a hash of itself (its files, and so the Python it was built for), of the
source and of the options: another build would never look for these, so they are then left out.
Pack with the Python and Triton of the machine that will run.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

MANIFEST = "manifest.json"
# Triton writes the paths of a kernel's files into such files.
_GROUPS = "__grp__*.json"


class OtherTritonError(RuntimeError):
    """The kernels were made by another build of Triton than the one here."""


def identity() -> dict[str, str]:
    """Build of Triton, which must agree for a kernel to be found."""
    import triton
    from triton.runtime.cache import triton_key

    python = platform.python_version_tuple()
    return {
        "triton": triton.__version__,
        "python": ".".join(python[:2]),
        "key": hashlib.sha256(triton_key().encode()).hexdigest(),
    }


def compile_all(folder: Path, ops: Sequence[str]) -> int:
    """Compile the kernels of the calls into the folder; how many there are."""
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    os.environ["TRITON_STORE_BINARY_ONLY"] = "1"  # what a launch reads, and no more
    import triton

    from benchmarks.gpu import count, fake_driver
    from ppo_fast.testing import DIVERGENCES, FACTORIES, HEADS, run

    with fake_driver.recording() as record:
        for op, factory in (FACTORIES | HEADS | DIVERGENCES).items():
            if not ops or op in ops:
                run(factory(), "triton")
    variants = record.variants
    if not ops:
        _, goals, _ = count.calls(native=False, triton=True)
        variants += [launch.variant for launch in goals.launch.values()]
    for variant in variants:
        triton.compile(variant.source(), target=fake_driver.TARGET, options=variant.options)
    return len(variants)


def pack(path: Path, ops: Sequence[str] = ()) -> None:
    """Write the archive of these ops' kernels, or of all."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        count = compile_all(folder, ops)
        manifest = identity() | {"kernels": count, "folder": str(folder)}
        (folder / MANIFEST).write_text(json.dumps(manifest))
        with tarfile.open(path, "w:xz") as archive:
            archive.add(folder, ".")
    print(f"{path}: {count} kernels of {describe(manifest)}, {path.stat().st_size >> 10} kB")


def describe(made: dict[str, Any]) -> str:
    """The build in words."""
    return f"Triton {made['triton']} for Python {made['python']} ({made['key'][:8]})"


def unpack(path: Path, cache: Path) -> int:
    """Add the archive's kernels to a cache; how many. Raises OtherTritonError."""
    files = dict(_files(path))
    made = json.loads(files.pop(PurePosixPath(MANIFEST)))
    here = identity()
    if any(made[name] != here[name] for name in here):
        raise OtherTritonError(f"they are of {describe(made)}, here is {describe(here)}")
    for name, content in files.items():
        if name.match(_GROUPS):
            content = content.replace(made["folder"].encode(), str(cache).encode())
        (cache / name.parent).mkdir(parents=True, exist_ok=True)
        (cache / name).write_bytes(content)
    return int(made["kernels"])


def _files(path: Path) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Files of an archive, with their places in a cache: in a kernel's folder or beside these."""
    with tarfile.open(path) as archive:
        for member in archive:
            content = archive.extractfile(member)
            if content is None:
                continue  # a folder
            name = PurePosixPath(member.name)
            if name.is_absolute() or ".." in name.parts or len(name.parts) > 2:
                raise ValueError(f"kernel_cache: {path} is no archive of kernels: has {name}")
            yield name, content.read()


def main(what: str, file: str, *ops: str) -> int:
    """Pack or unpack; an archive of another build is not an error."""
    if what == "pack":
        pack(Path(file), ops)
        return 0
    if what != "unpack":
        raise SystemExit(f"kernel_cache: pack or unpack, got {what!r}")
    import triton

    try:
        count = unpack(Path(file), Path(triton.knobs.cache.dir))
    except OtherTritonError as error:
        print(f"kernel cache: not used, {error}")
    else:
        print(f"kernel cache: {count} kernels from {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
