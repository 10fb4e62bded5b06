"""Folder of one checkpoint: tensors, values and a manifest that vouches for both."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ppo_fast.loop.files import require_file

Tree = dict[str, Any]
FORMAT = 1


# What reading a damaged checkpoint raises; nesting beyond Python's stack is a RecursionError.
DAMAGED = (OSError, ValueError, SafetensorError, RecursionError)


TENSORS, VALUES, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"


def write(folder: Path, tree: Tree, updates: int) -> None:
    """Write a tree of tensors and JSON values; the manifest, written last, vouches for the rest.

    `updates` is the number that the run asks for. Every byte is on the disk on return.
    """
    tensors: dict[str, Tensor] = {}
    values = json.dumps(_split(tree, "", tensors))
    save_file(_apart(tensors), folder / TENSORS)
    (folder / VALUES).write_text(values)
    files = {name: _digest(folder / name) for name in (TENSORS, VALUES)}
    manifest = {"format": FORMAT, "updates": updates, "sha256": files}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    for path in (*(folder / name for name in (TENSORS, VALUES, MANIFEST)), folder):
        sync(path)


def read(folder: Path) -> Tree:
    """A run's identity and state; OSError or ValueError where a byte of them is wrong."""
    sums = _manifest(folder)["sha256"]
    for name in (TENSORS, VALUES):  # never a name that is read from disk
        if _digest(folder / name) != sums.get(name):
            raise ValueError(f"{name} is not what {MANIFEST} says")
    tree: Tree = _join(json.loads((folder / VALUES).read_bytes()), load_file(folder / TENSORS))
    parts = (tree.get("identity"), tree.get("state")) if isinstance(tree, dict) else (None, None)
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"{VALUES} has no identity or no state of a run")
    if type(tree["state"].get("updates")) is not int:
        raise ValueError(f"{VALUES} has no number of updates")
    return tree


def _manifest(folder: Path) -> Tree:
    for name in (TENSORS, VALUES, MANIFEST):
        if (folder / name).is_symlink():
            raise ValueError(f"{name} is a link out of the checkpoint")
        require_file(folder / name)
    manifest = json.loads((folder / MANIFEST).read_bytes())
    form = manifest.get("format") if isinstance(manifest, dict) else None
    if form != FORMAT:
        raise ValueError(f"{MANIFEST} must have format {FORMAT}, got {form!r}")
    kinds = {"updates": int, "sha256": dict}
    if not all(isinstance(manifest.get(key), kind) for key, kind in kinds.items()):
        raise ValueError(f"{MANIFEST} has no updates or no sha256")
    return manifest


def _split(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """JSON values with `{"tensor": name}` in place of tensors, which go into `tensors`."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().contiguous()
        return {"tensor": path}
    if isinstance(value, dict):
        return {k: _split(v, f"{path}/{k}" if path else k, tensors) for k, v in value.items()}
    return value


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies where tensors share memory, which safetensors refuses."""
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        out[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return out


def _join(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"tensor"}:
            if value["tensor"] not in tensors:
                raise ValueError(f"{TENSORS} has no {value['tensor']!r}")
            return tensors[value["tensor"]]
        return {k: _join(v, tensors) for k, v in value.items()}
    return value


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Have a file, or a folder's names, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
