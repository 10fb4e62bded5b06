"""Lock on a run's folder: of two runs in one folder one is refused."""

from __future__ import annotations

import os
import secrets
import socket
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import IO

try:
    import fcntl
except ModuleNotFoundError:  # not a POSIX system: there is no lock to take
    fcntl = None  # type: ignore[assignment]

from ppo_fast.loop.config import OptionError
from ppo_fast.loop.files import naming, require_file

NAME = ".lock"
_held: weakref.WeakSet[RunLock] = weakref.WeakSet()


class RunLockedError(OptionError):
    """Another run has the folder."""


class RunLock:
    """An exclusive `flock` on a file in a run's folder, which the system drops with the process.

    A trainer has it from the begin to the end of its run, and while steps by hand begin. The file
    names the last trainer that began, so that a run notices if another has emptied its log since.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / NAME
        self._owner = f"process {os.getpid()} on {socket.gethostname()}"
        self._claim = f"{self._owner}\n{secrets.token_hex(8)}\n"
        self._file: IO[str] | None = None

    def claim(self, check: Callable[[], None] = lambda: None) -> None:
        """Take the folder for a trainer; a warning where there are no locks.

        Raises `RunLockedError` where a run goes on in it, and what `check` does, which sees the
        folder under the lock: then it stays the last trainer's.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        require_file(self._path)
        if (reason := self._acquire()) is not None:
            warnings.warn(
                f"no lock on {self.folder}, so a second run there goes unnoticed: {reason}",
                stacklevel=2,
            )
        try:
            check()
        except BaseException:
            self.release()
            raise
        with naming(self._path):
            self._path.write_text(self._claim, encoding="utf-8")

    def hold(self) -> None:
        """Take the lock for a run, which must still be the folder's."""
        if self._file is None:
            self._acquire()
        last = self._path.read_text(encoding="utf-8")
        if last != self._claim:
            self.release()
            raise RunLockedError(self._refusal(last))

    def release(self) -> None:
        """Give the lock back; the file stays, as another process may be opening it."""
        if self._file is not None:
            fcntl.flock(self._file, fcntl.LOCK_UN)  # also where a forked process has it open
            self._file.close()
            self._file = None

    def _acquire(self) -> Exception | None:
        """Lock the file; the reason where the system cannot."""
        with naming(self._path):
            file = self._path.open("a+", encoding="utf-8")
        try:
            if fcntl is None:
                raise NotImplementedError("the system has no flock")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200)
            file.close()
            raise RunLockedError(self._refusal(holder)) from None
        except (OSError, NotImplementedError) as error:
            file.close()
            return error
        self._file = file
        _held.add(self)
        return None

    def _refusal(self, holder: str) -> str:
        owner = holder.partition("\n")[0] or "another process"
        return (
            f"{self.folder} is in use by another run ({owner}): wait for it to end, or give"
            " another --out"
        )


def _forget() -> None:
    """Close a forked process's copies, which would keep the locks when this process is gone."""
    for lock in list(_held):
        if lock._file is not None:
            lock._file.close()
            lock._file = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
