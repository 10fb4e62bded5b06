"""Progress of a run on the console: a bar, faults and alarms as they come."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from ppo_fast.loop.log.alarms import alarms
from ppo_fast.loop.log.history import History, Record

_FIELDS = {
    "reward": "{:+.3f}",
    "kl": "{:.2f}",
    "clip_frac": "{:.2f}",
    "tokens_per_second": "{:.0f}",
}
_NAMED = 8  # samples with the same fault, in one line
_LABELS = {"kl": "KL", "clip_frac": "clip", "tokens_per_second": "tokens/s"}


@contextmanager
def progress_bar(
    console: Console, done: int, updates: int
) -> Iterator[Callable[[Record, History], None]]:
    """Progress bar for `updates` updates, `done` of them finished.

    Yields the callback to run after each, with the update's record and the history up to it.
    """
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    every = max(1, updates // 10)
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("training", total=updates, completed=done)

        def show(record: Record, history: History) -> None:
            bar.update(task, advance=1, description=summary(record))
            for text in dropped(record):
                console.print(text, markup=False)
            for alarm in alarms(history):
                if alarm.update == record["update"]:
                    console.print(f"update {alarm.update}: {alarm.text}", markup=False)
            if not console.is_terminal and (record["update"] + 1) % every == 0:
                console.print(f"update {record['update'] + 1}: {summary(record)}", markup=False)

        yield show


def summary(record: Record) -> str:
    """Reward, KL, clip fraction and tokens per second of one update; those it has."""
    return ", ".join(
        f"{_LABELS.get(name, name)} {form.format(record[name])}"
        for name, form in _FIELDS.items()
        if math.isfinite(record.get(name, math.nan))
    )


def dropped(record: Record) -> list[str]:
    """A line for each distinct fault of an update, with the samples that have it."""
    samples: dict[str, list[str]] = {}
    for i, reason in record["dropped"].items():
        samples.setdefault(reason, []).append(str(i))
    return [
        f"update {record['update']}: sample{'s' if len(numbers) > 1 else ''} {_listed(numbers)}"
        f" dropped: {reason}"
        for reason, numbers in samples.items()
    ]


def _listed(numbers: list[str]) -> str:
    if len(numbers) <= _NAMED:
        return ", ".join(numbers)
    return f"{', '.join(numbers[:_NAMED])} and {len(numbers) - _NAMED} more"
