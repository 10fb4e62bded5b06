"""Runs read back from their folders; those that differ in their seed alone are one group."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]
# What may differ between the runs of a group: the seed, and what does not touch what is learnt.
_ASIDE = {
    "seed", "out", "tensorboard", "compare", "save_every", "keep_checkpoints", "resume",
    "save_transitions",
}  # fmt: skip


class RunError(ValueError):
    """A folder that holds no run, or one that cannot be read."""


@dataclass
class Run:
    """What a run left in its folder; `records` has at least one update, by number."""

    name: str
    records: dict[int, Record]
    samples: list[Record]
    config: Record
    versions: Record

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
    """The runs of `folders`, named by their folder, or by its path where names repeat."""
    repeated = len({f.resolve().name for f in folders}) < len(folders)
    return [load_run(f, str(f) if repeated else f.resolve().name) for f in folders]


def load_run(folder: Path, name: str) -> Run:
    """Read a run, finished or not. Only the log is needed; raises `RunError` without one."""
    log = folder / "log.jsonl"
    if not log.is_file():
        raise RunError(f"{folder} is no folder of a run: it has no log.jsonl")
    # An update that was made again after a resume counts as it was made last.
    found = {int(r["update"]): r for r in _lines(log)}
    records = {update: found[update] for update in sorted(found)}
    if not records:
        raise RunError(f"{log} has no finished update")
    samples = folder / "samples.jsonl"
    return Run(
        name, records, _lines(samples) if samples.exists() else [],
        _object(folder / "config.json"), _object(folder / "versions.json"),
    )  # fmt: skip


def grouped(runs: list[Run]) -> list[Group]:
    """Runs of equal options, but for those set aside, together, in the order of their first."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        options = {k: v for k, v in run.config.items() if k not in _ASIDE}
        found.setdefault(json.dumps(options, sort_keys=True), []).append(run)
    differ = differing([members[0].config for members in found.values()]) - _ASIDE
    groups = []
    for members in found.values():
        config = members[0].config
        label = ", ".join(f"{key} {config.get(key)}" for key in config if key in differ)
        groups.append(Group(label or members[0].name, members))
    return groups


def differing(configs: list[Record]) -> set[str]:
    """The keys whose values are not the same in all."""
    keys = {key for config in configs for key in config}
    return {key for key in keys if any(c.get(key) != configs[0].get(key) for c in configs)}


def _lines(path: Path) -> list[Record]:
    """A file of JSON lines. The last may be torn: the run was killed, or is still writing it."""
    rows, lines = [], path.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise RunError(f"{path}, line {number}: not JSON ({error})") from None
    return rows


def _object(path: Path) -> Record:
    if not path.exists():
        return {}
    try:
        found: Record = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise RunError(f"{path}: not JSON ({error})") from None
    return found
