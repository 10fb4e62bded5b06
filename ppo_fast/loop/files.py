"""Files of a run: replaced whole or not at all, with the path in every error."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Context that adds `path` to an error of the disk that names no file.

    The libraries that write models wrap the system's error in one of their own; that of the
    tokenizers is a bare Exception.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(f"{path}: {error}") from error
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(f"{path}: {error}") from error


def replace(path: Path, content: bytes) -> None:
    """Write a file that is there whole or as it was."""
    fresh = path.with_name(path.name + ".partial")
    try:
        with naming(path):
            with fresh.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def require_file(path: Path) -> None:
    """Raise OSError where something is in the file's place that is none, such as a FIFO.

    A FIFO or a device would have whoever opens it wait, or read without an end.
    """
    if path.exists() and not path.is_file():
        raise OSError(f"{path} must be a file, got {_kind(path)}: move it away")


def require_folder(path: Path, link: bool = False) -> None:
    """Raise OSError where something is in the folder's place that is none, or a `link` to one."""
    if os.path.lexists(path) and not (path.is_dir() and (link or not path.is_symlink())):
        raise OSError(f"{path} must be a folder, got {_kind(path)}: move it away")


def _kind(path: Path) -> str:
    mode = path.lstat().st_mode
    kinds = {
        stat.S_IFLNK: "a link",
        stat.S_IFREG: "a file",
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "a device")
