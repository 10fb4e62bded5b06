"""Checkpoints of a run: when one is written, which one is resumed from, and which are kept."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError

from ppo_fast.loop.checkpoint.folder import DAMAGED, read, sync, write
from ppo_fast.loop.checkpoint.state import Tree
from ppo_fast.loop.config import RENAMED, OptionError, TrainConfig
from ppo_fast.loop.ranks.ranks import Ranks

Say = Callable[[str], None]
# As JSON keeps them.
DEFAULTS: Tree = json.loads(json.dumps(dataclasses.asdict(TrainConfig()), default=str))


class Stateful(Protocol):
    """A run after some `updates`, whose state can be taken and put back.

    `identity` holds the JSON values in which two runs must agree to share a checkpoint.
    """

    updates: int

    def state_dict(self) -> Tree:
        """Everything that updates change, as tensors and JSON values."""

    def load_state_dict(self, saved: Tree) -> None:
        """Continue where `state_dict` was taken."""

    def identity(self) -> Tree:
        """The values that may not change on resume."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or a run cannot go on from the one it was given."""


class OtherRunError(CheckpointError, OptionError):
    """The folder's checkpoints are those of another run, or of this one with other options."""


class Checkpoints:
    """The checkpoints of a run, `out/checkpoints/update-000010` and so on.

    `sync` puts log and samples on the disk, before a checkpoint says how far they are.
    """

    def __init__(
        self, config: TrainConfig, ranks: Ranks, sync: Callable[[], None] = lambda: None
    ) -> None:
        self.config, self._ranks, self._sync = config, ranks, sync
        self.folder = config.out / "checkpoints"
        self._identity: Tree | None = None
        self._newest = -1  # update of the newest checkpoint known to be whole

    def numbers(self) -> list[int]:
        """The updates that have a checkpoint's folder, whole or not, ascending."""
        folders = [p for p in self.folder.glob("update-*") if p.is_dir() and not p.is_symlink()]
        names = [p.name.removeprefix("update-") for p in folders]
        return sorted(int(name) for name in names if name.isdecimal())

    def path(self, updates: int) -> Path:
        """The folder of the checkpoint after that many updates."""
        return self.folder / f"update-{updates:06d}"

    def clear(self) -> None:
        """Remove the checkpoints of a former run."""
        if self.numbers():
            shutil.rmtree(self.folder)

    def resume(self, run: Stateful, say: Say) -> None:
        """Put the run where the newest whole checkpoint left it; without any it starts anew.

        Raises `CheckpointError` where there are checkpoints but none is whole, and `OtherRunError`
        where the run differs from the saved one in more than `state.FREE`.
        """
        numbers = self.numbers()
        for number in reversed(numbers):
            try:
                tree = read(self.path(number))
            except DAMAGED as error:
                say(f"checkpoint {self.path(number)} skipped: {error}")
                continue
            self._require_same(run, tree)
            try:
                run.load_state_dict(tree["state"])
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
        where = f"resumed at update {run.updates}" if numbers else "no checkpoint: starts anew"
        say(f"{self.folder}: {where}")

    def after_step(self, run: Stateful, say: Say) -> None:
        """Save every `save_every` updates; a failure is reported, and the run goes on."""
        every = self.config.save_every
        if every and run.updates % every == 0:
            try:
                self.save(run)
            except CheckpointError as error:
                say(f"warning: {error}; the run goes on, and the former checkpoints stay")

    def finish(self, run: Stateful) -> None:
        """Save the run's end, where it saves at all."""
        if self.config.save_every:
            self.save(run)

    def save(self, run: Stateful) -> None:
        """Have the first rank write the state, and drop all but the newest `keep_checkpoints`.

        Every rank must ask, as shards are gathered. Raises `CheckpointError`, on all of them,
        where the disk does not take it; the former ones stay.
        """
        from_first = self._ranks.from_first
        if from_first(lambda: run.updates == self._newest):
            return
        tree = {"identity": self._own_identity(run), "state": run.state_dict()}
        failed = from_first(lambda: self._replace(run, tree))
        if failed is not None:
            raise failed

    def _replace(self, run: Stateful, tree: Tree) -> CheckpointError | None:
        number = run.updates
        partial, target = self.folder / "partial", self.path(number)
        try:
            self._sync()
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            write(partial, tree, self.config.updates)
            if target.exists():  # newer than what this run resumed from: found damaged
                shutil.rmtree(target)
            partial.rename(target)
            sync(self.folder)
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

    def _own_identity(self, run: Stateful) -> Tree:
        if self._identity is None:  # through JSON, as the saved one went
            self._identity = json.loads(json.dumps(run.identity(), default=str))
        return self._identity

    def _require_same(self, run: Stateful, tree: Tree) -> None:
        ours, theirs = self._own_identity(run), tree["identity"]
        # An option that the checkpoint lacks came later, and was as it is by default. What else it
        # lacks was not looked at then.
        theirs = {RENAMED.get(k, k): v for k, v in theirs.items()}
        theirs = {k: v for k, v in DEFAULTS.items() if k in ours} | theirs
        # The run's order, in which the options come first and the weights' digest last.
        different = [
            f"{key} is {ours.get(key)!r}, the checkpoint's is {theirs[key]!r}"
            for key in dict.fromkeys((*ours, *theirs))
            if key in theirs and ours.get(key) != theirs[key]
        ]
        if different:
            raise OtherRunError(f"resume: {'; '.join(different)}")
        if self.config.updates < tree["state"]["updates"]:
            raise OtherRunError(
                f"resume: updates must be at least the {tree['state']['updates']} that the"
                f" checkpoint has, got {self.config.updates}"
            )
