"""Settings of the process and of the thread that a call may change and a run depends on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_Setting = tuple[Callable[[], Any], Callable[[Any], object]]  # how it is read, and written


def _folder() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was deleted, and there is no way back to it
        return None


def _enter(folder: str | None) -> None:
    if folder is not None and os.path.isdir(folder):
        os.chdir(folder)


_SETTINGS: tuple[_Setting, ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, torch.set_default_device),
    (torch.get_num_threads, torch.set_num_threads),
    (_folder, _enter),
)


@contextmanager
def settings_kept() -> Iterator[None]:
    """Put back, at the end of the block, what it changed.

    Gradient and inference mode, autocast, torch's default dtype and device, its number of threads,
    and the current folder. Random states are the block's to draw from: a run has generators of
    its own.
    """
    gradients = torch.is_grad_enabled()
    before = [read() for read, _ in _SETTINGS]
    try:
        # At its end this guard restores what torch dispatches by: gradient and inference mode, and
        # autocast on every device.
        with torch.inference_mode(False):
            torch.set_grad_enabled(gradients)
            yield
    finally:
        for (read, write), value in zip(_SETTINGS, before, strict=True):
            if read() != value:
                write(value)
