"""Ctrl-C and SIGTERM between updates, where the state is whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """Whether the run was asked to stop, and whether it is ending."""

    def __init__(self) -> None:
        self.asked = False
        self.ending = False


@contextmanager
def patient_interrupt(say: Callable[[str], None], hold: bool = False) -> Iterator[Stop]:
    """Within the block, the first Ctrl-C or SIGTERM sets `asked`; a second one interrupts.

    Once `ending` is set, Ctrl-C interrupts at once, and SIGTERM waits for what is being written.
    `hold` keeps it waiting after an exception has left the block: torchrun sends it to every rank
    as soon as one has died, and the others still have to say why they stop. Outside the main
    thread, where Python delivers no signals, nothing changes.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.ending and number == signal.SIGTERM:
            return
        if stop.asked or stop.ending:
            raise KeyboardInterrupt
        stop.asked = True
        say("stops after this update; Ctrl-C again stops at once")

    former = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    except BaseException:
        if hold:
            former[signal.SIGTERM] = signal.SIG_IGN
        raise
    finally:
        for number, handler in former.items():
            if handler is not None:  # None: one that is not Python's, which it cannot put back
                signal.signal(number, handler)
