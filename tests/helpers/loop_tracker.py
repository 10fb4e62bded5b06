"""A tracker registered with accelerate that keeps what it is given, and fails where it is told."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, on_main_process


class Spy(GeneralTracker):
    """Its calls are in `calls`, and on the file that the environment's SPY names."""

    name = "spy"
    requires_logging_directory = False
    calls: ClassVar[list[tuple[Any, ...]]] = []
    failing: ClassVar[set[str]] = set()

    def __init__(self, project: str, *folder: str, **options: Any) -> None:
        super().__init__()
        self.project = project
        self._noted("made", project, *folder)

    @property
    def tracker(self) -> list[tuple[Any, ...]]:
        return self.calls

    @on_main_process
    def start(self) -> None:
        self._noted("start")

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._noted("config", values)

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
        self._noted("log", step, values)

    @on_main_process
    def finish(self) -> None:
        self._noted("finish")

    def _noted(self, *call: Any) -> None:
        self.calls.append(call)
        if "SPY" in os.environ:
            with open(os.environ["SPY"], "a", encoding="utf-8") as file:
                file.write(f"{call[0]} {call[1:2]}\n")
        if call[0] in self.failing or " ".join(map(str, call[:2])) in self.failing:
            raise ConnectionError(f"no network\nfor {call[0]}")


def register() -> None:
    """Have accelerate know it by its name."""
    LOGGER_TYPE_TO_CLASS[Spy.name] = Spy
