"""Ctrl-C between updates, where the state is whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """Whether Ctrl-C was pressed."""

    def __init__(self) -> None:
        self.asked = False


@contextmanager
def patient_interrupt(say: Callable[[str], None]) -> Iterator[Stop]:
    """Within the block, the first Ctrl-C only sets `asked`; a second raises KeyboardInterrupt.

    Outside the main thread, where Python delivers no signals, nothing changes.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True
        say("stops after this update; Ctrl-C again stops at once")

    former = signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, former)
