"""Runs read back from their folders; those that differ in their seed alone are one group."""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ppo_fast.loop.log import fields
from ppo_fast.loop.log.fields import FieldError, Record
from ppo_fast.loop.log.history import NUMBERS, with_baseline

# The files of a run that are read: its log, and what else it may have.
FILES = LOG, SAMPLES, CONFIG, VERSIONS = (
    "log.jsonl",
    "samples.jsonl",
    "config.json",
    "versions.json",
)
# Numbers that the report needs besides those of the alarms.
_DRAWN = (
    "reward_std",
    "eval_best",
    "ended",
    "value_loss",
    "support_size",
    "support_cut",
    "ess",
    "grad_norm",
    "lr",
    "critic_lr",
    "kl_coef",
    "loss_kl_coef",
    "tokens_per_second",
)
# What may differ between the runs of a group: the seed, and what does not touch what is learnt.
_ASIDE = {
    "seed",
    "out",
    "tensorboard",
    "track",
    "compare",
    "save_every",
    "keep_checkpoints",
    "resume",
    "overwrite",
    "save_transitions",
}


class RunError(ValueError):
    """A folder that holds no run, or one that cannot be read."""


@dataclass
class Run:
    """A run read from its folder; `records` has at least one update, by number.

    Their numbers are floats, None where they are not finite. `notes` say what was left out.
    """

    name: str
    records: dict[int, Record]
    samples: list[Record]
    config: Record
    versions: Record
    notes: list[str] = field(default_factory=list)

    @property
    def planned(self) -> int:
        """Updates that the run was to make."""
        return int(self.config.get("updates", len(self.records)))


@dataclass
class Group:
    """Runs of one configuration; `label` says what sets it apart from the other groups."""

    label: str
    runs: list[Run]


def load_runs(folders: list[Path]) -> list[Run]:
    """The runs of `folders`, named by their folder, or by its path where names repeat.

    A folder that is given again, under whatever path, is one run, and a note of it says so.
    """
    given: dict[str, list[Path]] = {}
    for folder in folders:
        given.setdefault(os.path.realpath(folder), []).append(folder)
    repeated = len({Path(real).name for real in given}) < len(given)
    runs = []
    for real, (folder, *again) in given.items():
        run = load_run(folder, str(folder) if repeated else Path(real).name)
        if again:
            run.notes.append(f"given {1 + len(again)} times, counted once")
        runs.append(run)
    return runs


def load_run(folder: Path, name: str) -> Run:
    """Read a run, finished or not. Only the log is needed; raises `RunError` without one."""
    log, notes = folder / LOG, list[str]()
    lines = _lines(log, notes)
    if lines is None:
        raise RunError(f"{folder} is no folder of a run: it has no {LOG}")
    found: dict[int, Record] = {}
    for line, raw in lines:
        with _named(f"{log}, line {line}"):
            record = _checked(raw)
        # An update that was made again after a resume counts as it was made last.
        found[record["update"]] = record
    if not found:
        raise RunError(f"{log} has no finished update")
    if len(lines) > len(found):
        notes.append(f"{LOG} has {len(lines) - len(found)} updates again: the last counts")
    records = {update: found[update] for update in sorted(found)}
    notes += _left_out(list(records.values()))
    samples = folder / SAMPLES
    config = _object(folder / CONFIG)
    if "updates" in config:
        with _named(str(folder / CONFIG)):
            fields.count(config, "updates")
    return Run(name, records, _samples(samples, notes), config, _object(folder / VERSIONS), notes)


def grouped(runs: list[Run]) -> list[Group]:
    """Runs of equal options, but for those set aside, together, in the order of their first."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        options = {k: v for k, v in run.config.items() if k not in _ASIDE}
        found.setdefault(_written(options), []).append(run)
    differ = differing([members[0].config for members in found.values()]) - _ASIDE
    groups = []
    for members in found.values():
        config = members[0].config
        label = ", ".join(f"{key} {config.get(key)}" for key in config if key in differ)
        groups.append(Group(label or members[0].name, members))
    return groups


def differing(configs: list[Record]) -> set[str]:
    """The keys whose values are not the same in all, compared as JSON writes them."""
    keys = {key for config in configs for key in config}
    return {key for key in keys if len({_written(c.get(key)) for c in configs}) > 1}


def _written(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


@contextmanager
def _named(place: str) -> Iterator[None]:
    """A `FieldError` within becomes a `RunError` that says where."""
    try:
        yield
    except FieldError as error:
        raise RunError(f"{place}: {error}") from None


def _checked(raw: Record) -> Record:
    """A record of the log with its types looked at; what is not finite is None."""
    raw = with_baseline(raw)
    update = fields.count(raw, "update")
    numbers = {name: fields.number(raw, name) for name in (*NUMBERS, *_DRAWN) if name in raw}
    return raw | {
        **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
        "update": update,
        "seconds": fields.seconds(raw, "seconds"),
        "dropped": fields.texts(raw, "dropped"),
    }


def _left_out(records: list[Record]) -> list[str]:
    """A note of the numbers that are in some updates, but not as finite ones."""
    lost = Counter(
        name for r in records for name in (*NUMBERS, *_DRAWN) if name in r and r[name] is None
    )
    if not lost:
        return []
    said = ", ".join(f"{name} in {n}" for name, n in lost.items())
    return [f"not finite in the log, and left out of curves and means: {said} of {len(records)}"]


def _samples(path: Path, notes: list[str]) -> list[Record]:
    """The samples, each with its verdict: a fault or a reward."""
    lines = _lines(path, notes) or []
    for line, sample in lines:
        with _named(f"{path}, line {line}"):
            fields.count(sample, "update")
            for name in ("prompt", "completion", *(["fault"] if "fault" in sample else [])):
                fields.text(sample, name)
            if "fault" not in sample:
                if "reward" not in sample:
                    raise FieldError("reward or fault must be there, got neither")
                sample["reward"] = fields.number(sample, "reward")
    return [sample for _, sample in lines]


def _lines(path: Path, notes: list[str]) -> list[tuple[int, Record]] | None:
    """The objects of a file of JSON lines with their numbers; None if there is no such file.

    The last line may be torn, and a note says so: the run was killed, or is still writing it.
    """
    content = _content(path)
    if content is None:
        return None
    rows, lines = [], content.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append((number, fields.parsed(line)))
        except FieldError as error:
            if number < len(lines):
                raise RunError(f"{path}, line {number}: {error}") from None
            notes.append(f"the last line of {path.name} is not whole, and left out")
    return rows


def _object(path: Path) -> Record:
    content = _content(path)
    if content is None:
        return {}
    with _named(str(path)):
        return fields.parsed(content)


def _content(path: Path) -> bytes | None:
    """Content of a file, None if there is none.

    Only regular files are opened: a pipe is waited for, and a device may have no end.
    """
    try:
        if stat.S_ISREG(path.stat().st_mode):
            return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # a path with a NUL is a ValueError
        raise RunError(f"{path} cannot be read: {error}") from None
    raise RunError(f"{path} must be a regular file")
