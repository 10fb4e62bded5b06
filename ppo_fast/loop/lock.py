"""The lock on a run's folder: of two runs in one folder the second is refused."""

from __future__ import annotations

import os
import socket
import warnings
import weakref
from pathlib import Path
from typing import IO

try:
    import fcntl
except ModuleNotFoundError:  # not a POSIX system: there is no lock to take
    fcntl = None  # type: ignore[assignment]

from ppo_fast.loop.files import naming, require_file
from ppo_fast.loop.models import require_model_folder

NAME = ".lock"
# What a run writes beside its checkpoints: looked at before it begins, not when it is done.
FILES = ("config.json", "versions.json", "log.jsonl", "samples.jsonl", "reward.png")
MODELS = ("model", "adapter")
_mine: weakref.WeakValueDictionary[str, RunLock] = weakref.WeakValueDictionary()


class RunLockedError(RuntimeError):
    """Another run has the folder."""


class RunLock:
    """An exclusive `flock` on a file in a run's folder, which the system drops with the process.

    In the process that holds it, a new trainer takes the lock over, unless the run of the former
    one is going on.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running = False
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        """Take the lock; a warning where the system has none.

        Raises `RunLockedError` where another run has it.
        """
        if self._file is not None:
            return
        path = self.folder / NAME
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (NAME, *FILES):
            require_file(self.folder / name)
        for name in MODELS:
            require_model_folder(self.folder / name)
        key = os.path.realpath(path)
        former = _mine.get(key)
        if former is not None and former.running:
            raise RunLockedError(self._refusal("this process"))
        if former is not None:
            former.release()
        with naming(path):
            file = path.open("a+", encoding="utf-8")
        try:
            _lock(file)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200).strip()
            file.close()
            raise RunLockedError(self._refusal(holder or "another process")) from None
        except (OSError, NotImplementedError) as error:
            file.close()
            warnings.warn(
                f"no lock on {self.folder}, so a second run there goes unnoticed: {error}",
                stacklevel=2,
            )
            return
        self._file, _mine[key] = file, self
        with naming(path):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()

    def hold(self) -> None:
        """Keep the lock from later trainers of this process too, until it is released."""
        self.acquire()
        self.running = True

    def release(self) -> None:
        """Give the lock back; the file stays, as another process may be opening it."""
        self.running = False
        if self._file is not None:
            fcntl.flock(self._file, fcntl.LOCK_UN)  # also where a forked process has it open
            self._file.close()
            self._file = None

    def forked(self) -> None:
        """Close a forked process's copy, which would hold the lock when this process is gone."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _refusal(self, holder: str) -> str:
        return (
            f"{self.folder} is in use by another run ({holder}): wait for it to end, or give"
            " another --out"
        )


def _lock(file: IO[str]) -> None:
    if fcntl is None:
        raise NotImplementedError("the system has no flock")
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _forget() -> None:
    for lock in list(_mine.values()):
        lock.forked()
    _mine.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
