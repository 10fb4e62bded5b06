"""Progress of a run on the console: a bar, samples, faults and alarms as they come."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from ppo_fast.loop.log.alarms import Alarm, alarms, by_name
from ppo_fast.loop.log.history import History, Record
from ppo_fast.loop.values import one_line

_FIELDS = {
    "reward": "{:+.3f}",
    "eval_reward": "{:+.3f}",
    "kl": "{:.2f}",
    "divergence": "{:.3f}",
    "clip_frac": "{:.2f}",
    "tokens_per_second": "{:.0f}",
}
_NAMED = 8  # numbers of samples or updates in one line
_LABELS = {
    "eval_reward": "evaluation",
    "kl": "KL",
    "clip_frac": "clip",
    "tokens_per_second": "tokens/s",
}
_TIMES = 10  # samples shown over a run
_SHOWN = 66  # characters of a text, with which its line fits 80 columns

Show = Callable[[Record, History, list[Record]], None]


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print lines as they are: nothing wrapped, marked up or coloured, control characters escaped.

    A path stays whole, whatever the width of the console or of the file that takes its place.
    """
    plain = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    # Rich would wrap at 80 columns in a pipe, and cannot be told to leave `Text` unbroken there.
    console.print(plain, style=style, markup=False, emoji=False, highlight=False, soft_wrap=True)


class _Bar(Progress):
    """A line of the bar with its times, which 80 columns hold, and one of the last numbers."""

    numbers = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        """The bar, and the numbers below it."""
        yield from super().get_renderables()
        yield Text(self.numbers, no_wrap=True, overflow="ellipsis")


@contextmanager
def progress_bar(console: Console, done: int, updates: int) -> Iterator[Show]:
    """Progress bar for `updates` updates, `done` of them finished; none where nobody watches.

    Yields the callback to run after each, with the update's record, the history up to it, and its
    samples as they are logged. Numbers and a sample are printed about ten times a run, and after
    the last update. An alarm is printed when it sets in and when it first returns; how often it
    returned in all is said at the end.
    """
    bar = _Bar(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    every, untold, found = -(-updates // _TIMES), list[str](), list[Alarm]()

    def tell() -> None:
        while untold:
            say(console, untold.pop(0))

    with bar:
        task = bar.add_task("training", total=updates, completed=done)

        def show(record: Record, history: History, samples: list[Record]) -> None:
            number = record["update"] + 1
            bar.numbers = summary(record)
            bar.update(task, advance=1)
            found[:] = alarms(history)
            for text in (*dropped(record), *set_in(found, record["update"])):
                say(console, text)
            untold[:] = [f"{number} of {updates} updates: {summary(record)}", *example(samples)]
            if number % every == 0:
                tell()

        yield show
    tell()
    for text in returned(found):
        say(console, text)


def example(samples: list[Record]) -> list[str]:
    """Prompt and completion of the first sample, a line each, the latter with its reward."""
    if not samples:
        return []
    first = samples[0]
    verdict = "dropped" if "fault" in first else f"{first['reward']:+.3f}"
    completion = one_line(first["completion"], _SHOWN)
    lines = {"prompt": _both_ends(first["prompt"]), verdict: completion}
    width = max(map(len, lines))
    return [f"  {name:>{width}}: {text or '(empty)'}" for name, text in lines.items()]


def _both_ends(text: str) -> str:
    """A prompt on one line; of a long one the beginning and the end, where the question is."""
    line = one_line(text, 10 * len(text) + _SHOWN)  # whole, however many characters are escaped
    if len(line) <= _SHOWN:
        return line
    return f"{line[: _SHOWN // 3]} ... {line[5 + _SHOWN // 3 - _SHOWN :]}"


def set_in(found: list[Alarm], update: int) -> list[str]:
    """A line for each alarm that sets in at `update` for the first or the second time."""
    return [
        f"update {update}: {'' if number == 0 else 'again, '}{alarm.text}"
        for onsets in by_name(found).values()
        for number, alarm in enumerate(onsets[:2])
        if alarm.update == update
    ]


def returned(found: list[Alarm]) -> list[str]:
    """A line for each alarm that returned more than once, which were not all told."""
    return [
        f"{name}: set in {len(onsets)} times, at updates"
        f" {_listed([str(alarm.update) for alarm in onsets])}"
        for name, onsets in by_name(found).items()
        if len(onsets) > 2
    ]


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
