"""Checkpoints that are whole or not there: the folder format, and when one is written or read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ppo_fast.loop.config import TrainConfig
from ppo_fast.loop.files import require_file
from ppo_fast.loop.state import Tree, capture, identity, restore

if TYPE_CHECKING:
    from ppo_fast.loop.trainer import Trainer

FORMAT = 1
# What reading a damaged checkpoint raises; nesting beyond Python's stack is a RecursionError.
DAMAGED = (OSError, ValueError, SafetensorError, RecursionError)
TENSORS, VALUES, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
Say = Callable[[str], None]


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or a run cannot go on from the one it was given."""


class Checkpoints:
    """The checkpoints of a run, `out/checkpoints/update-000010` and so on.

    A run that does not resume clears those of a finished run before it, and refuses to start over
    those of an unfinished one.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.folder = config.out / "checkpoints"
        self._identity: Tree | None = None
        self._newest = -1  # update of the newest checkpoint known to be whole
        if not config.resume and self.numbers():
            self._clear()

    def numbers(self) -> list[int]:
        """The updates that have a checkpoint's folder, whole or not, ascending."""
        folders = [p for p in self.folder.glob("update-*") if p.is_dir() and not p.is_symlink()]
        names = [p.name.removeprefix("update-") for p in folders]
        return sorted(int(name) for name in names if name.isdecimal())

    def path(self, updates: int) -> Path:
        """The folder of the checkpoint after that many updates."""
        return self.folder / f"update-{updates:06d}"

    def resume(self, trainer: Trainer, say: Say) -> None:
        """Put the trainer where the newest whole checkpoint left it; without any it starts anew.

        Raises `CheckpointError` where there are checkpoints but none is whole, or where the run
        differs from the saved one in more than `state.FREE`.
        """
        numbers = self.numbers()
        for number in reversed(numbers):
            try:
                tree = read(self.path(number))
            except DAMAGED as error:
                say(f"checkpoint {self.path(number)} skipped: {error}")
                continue
            self._require_same(trainer, tree)
            try:
                restore(trainer, tree["state"])
            except (LookupError, TypeError, AttributeError, RuntimeError) as error:
                raise CheckpointError(
                    f"resume: {self.path(number)} has a state that is not this run's:"
                    f" {type(error).__name__}: {error}"
                ) from error
            self._newest = number
            break
        if numbers and self._newest < 0:
            raise CheckpointError(
                f"resume: none of the {len(numbers)} checkpoints in {self.folder} is whole;"
                " remove them to start anew"
            )
        where = f"resumed at update {trainer.updates}" if numbers else "no checkpoint: starts anew"
        say(f"{self.folder}: {where}")
        for lacking in trainer.recorder.rewind(trainer.updates):
            say(f"warning: {lacking}")

    def after_step(self, trainer: Trainer, say: Say) -> None:
        """Save every `save_every` updates; a failure is told and the run goes on."""
        every = self.config.save_every
        if every and trainer.updates % every == 0:
            try:
                self.save(trainer)
            except CheckpointError as error:
                say(f"warning: {error}; the run goes on, and the former checkpoints stay")

    def finish(self, trainer: Trainer) -> None:
        """Save the run's end, where it saves at all."""
        if self.config.save_every:
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Have the first rank write the state, and drop all but the newest `keep_checkpoints`.

        Every rank must ask, as shards are gathered. Raises `CheckpointError`, on all of them,
        where the disk does not take it; the former ones stay.
        """
        from_first = trainer.ranks.from_first
        if from_first(lambda: trainer.updates == self._newest):
            return
        tree = {"identity": self._own_identity(trainer), "state": capture(trainer)}
        failed = from_first(lambda: self._replace(trainer, tree))
        if failed is not None:
            raise failed

    def _replace(self, trainer: Trainer, tree: Tree) -> CheckpointError | None:
        number = trainer.updates
        partial, target = self.folder / "partial", self.path(number)
        try:
            trainer.recorder.sync()
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            write(partial, tree, self.config.updates)
            if target.exists():  # newer than what this run resumed from: found damaged
                shutil.rmtree(target)
            partial.rename(target)
            _sync(self.folder)
            self._newest = number
            self._drop_old()
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)  # the failure at hand is the one to tell
            return CheckpointError(f"saving {target} failed: {error}")
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return None

    def _drop_old(self) -> None:
        """Keep the newest up to this one; later ones were found damaged."""
        numbers = self.numbers()
        kept = [n for n in numbers if n <= self._newest][-self.config.keep_checkpoints :]
        for number in set(numbers) - set(kept):
            shutil.rmtree(self.path(number))

    def _clear(self) -> None:
        newest = self.path(self.numbers()[-1])
        if not _finished(newest):
            raise CheckpointError(
                f"{newest} belongs to an unfinished run: --resume goes on with it;"
                f" remove {self.folder} to start anew, or give another --out"
            )
        shutil.rmtree(self.folder)

    def _own_identity(self, trainer: Trainer) -> Tree:
        if self._identity is None:  # through JSON, as the saved one went
            self._identity = json.loads(json.dumps(identity(trainer), default=str))
        return self._identity

    def _require_same(self, trainer: Trainer, tree: Tree) -> None:
        ours, theirs = self._own_identity(trainer), tree["identity"]
        for key in theirs.keys() | ours.keys():
            if ours.get(key) != theirs.get(key):
                raise CheckpointError(
                    f"resume: {key} is {ours.get(key)!r}, the checkpoint's is {theirs.get(key)!r}"
                )
        if self.config.updates < tree["state"]["updates"]:
            raise CheckpointError(
                f"resume: updates must be at least the {tree['state']['updates']} that the"
                f" checkpoint has, got {self.config.updates}"
            )


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
        _sync(path)


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


def _finished(folder: Path) -> bool:
    """Whether a checkpoint is its run's last one."""
    try:
        updates: int = _manifest(folder)["updates"]
    except DAMAGED:
        return False
    return int(folder.name.removeprefix("update-")) >= updates


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


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
