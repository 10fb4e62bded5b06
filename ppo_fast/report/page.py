"""The page: everything about some runs in one HTML file that asks nothing of the network."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import os
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from ppo_fast.loop.config import TrainConfig
from ppo_fast.loop.log.alarms import alarms, by_name
from ppo_fast.loop.log.fields import Record
from ppo_fast.loop.log.history import History, fifths, mean
from ppo_fast.report import charts
from ppo_fast.report.runs import FILES, Group, Run, RunError, differing, grouped, load_runs

_HERE = Path(__file__).parent
PHASES = ("rollout", "reward", "scoring", "advantages", "update")
# Characters of a sample's text that the page has, and of all samples together.
_LONGEST, _ROOM = 4_000, 8_000_000
_MARKUP = 100  # characters around a sample

Row = tuple[str, list[Any], bool]  # of the options: key, values, whether they differ


class Card(NamedTuple):
    """A sample as the page shows it; `verdict` is its reward, or its fault if `fault` is set."""

    prompt: str
    completion: str
    verdict: str
    fault: bool


class Shots(NamedTuple):
    """A run's samples: updates, ascending, the cards of each, and what was left out in words."""

    run: Run
    updates: list[int]
    cards: list[list[Card]]
    note: str

    @property
    def ends(self) -> list[int]:
        """Places of the first and the last update; one where there is one."""
        return list(dict.fromkeys([0, len(self.updates) - 1]))

    def data(self) -> dict[str, Any]:
        """Data of the page's script."""
        return {"updates": self.updates, "cards": self.cards}


def write_report(folders: list[Path], out: Path | None = None) -> Path:
    """Write the page of the runs in `folders`; returns its path, `report.html` in the first.

    Raises `RunError` for a folder without a readable log, and where the page cannot be written.
    """
    html = page(load_runs(folders))
    out = out or folders[0] / "report.html"
    try:
        _spare(folders, out)
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(out, "w", encoding="utf-8", errors="replace", opener=_open) as file:
            os.set_blocking(file.fileno(), True)
            file.write(html)
    except OSError as error:
        raise RunError(f"the page cannot be written to {out}: {error.strerror or error}") from None
    return out


def _spare(folders: list[Path], out: Path) -> None:
    """Refuse to write over a run's own files."""
    for read in (folder / name for folder in folders for name in FILES):
        if out.exists() and read.exists() and out.samefile(read):
            raise RunError(f"the page cannot be written to {out}: it is {read}, which a run left")


def _open(path: str, flags: int) -> int:
    """Open without waiting: a pipe that nobody reads is an OSError."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


def page(runs: list[Run]) -> str:
    """The HTML of the runs' page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    env = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"number": number, "shown": shown, "duration": duration}
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    # The page's policy allows this script and no other, whatever a sample holds.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    groups = grouped(runs)
    drawn = charts.charts(groups)
    configs = [run.config for run in runs]
    return env.get_template("page.html").render(
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        digest=digest,
        runs=runs,
        groups=groups,
        charts=charts,
        sections=[
            (name, found)
            for name, plotted in charts.SECTIONS.items()
            if (found := [c for c in drawn if c.curves and c.plotted in plotted])
        ],
        lacking=[c.plotted.title for c in drawn if not c.curves and c.plotted.when == "usual"],
        rows=[(g, run, summary(run)) for g in groups for run in g.runs],
        alarms=[
            (run, onsets)
            for run in runs
            for onsets in by_name(alarms(History(run.records.values()))).values()
        ],
        seconds=[phase_seconds(g) for g in groups],
        sampled=[samples(run, _ROOM // len(runs)) for run in runs if run.samples],
        config=folded(table(configs)),
        versions=table([run.versions for run in runs]),
    )


def summary(run: Run) -> Record:
    """A run's row of the page's table; NaN where the log has no number."""
    records = list(run.records.values())
    rewards = [_number(r.get("reward")) for r in records]
    first, last = fifths(rewards)
    speeds = [v for r in records if math.isfinite(v := _number(r.get("tokens_per_second")))]
    middle = [statistics.median_low(speeds), statistics.median_high(speeds)] if speeds else []
    return {
        "updates": len(records),
        "first": first,
        "last": last,
        "gain": last - first,
        "kl": fifths([_number(r.get("kl")) for r in records])[1],
        "speed": mean(middle),
        "seconds": sum(s for r in records for s in r["seconds"].values()),
        "dropped": sum(len(r["dropped"]) for r in records),
    }


def phase_seconds(group: Group) -> dict[str, float]:
    """Mean seconds an update by phase, over all updates of the group's runs."""
    records = [r for run in group.runs for r in run.records.values()]
    found = {p for r in records for p in r["seconds"]}
    ordered = [*(p for p in PHASES if p in found), *sorted(found - {*PHASES})]
    return {p: sum(r["seconds"].get(p, 0.0) for r in records) / len(records) for p in ordered}


def samples(run: Run, room: int) -> Shots:
    """A run's samples, at most about `room` characters of them: else of evenly spaced updates."""
    found: dict[int, list[Card]] = {}
    cut = 0
    for sample in sorted(run.samples, key=lambda sample: int(sample["update"])):
        prompt, completion = shown(sample["prompt"]), shown(sample["completion"])
        cut += max(len(prompt), len(completion)) > _LONGEST
        fault = "fault" in sample
        verdict = shown(sample["fault"]) if fault else number(sample["reward"], "{:+.3f}")
        card = Card(_shortened(prompt), _shortened(completion), _shortened(verdict), fault)
        found.setdefault(sample["update"], []).append(card)
    size = sum(sum(map(len, card[:3])) + _MARKUP for cards in found.values() for card in cards)
    every, updates = math.ceil(size / room), list(found)
    kept = [*updates[:-1:every], updates[-1]]
    notes = []
    if len(kept) < len(updates):
        notes.append(f"{len(kept)} of the {len(updates)} updates with samples, evenly spaced")
    if cut:
        notes.append(f"the first {_LONGEST} characters of longer texts (samples: {cut})")
    note = f"The page has {', and '.join(notes)}; samples.jsonl has all." if notes else ""
    return Shots(run, kept, [found[u] for u in kept], note)


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"


def table(dicts: list[Record]) -> list[Row]:
    """Key, value of each run (one where all agree) and whether they differ; those first."""
    differ = differing(dicts)
    keys = dict.fromkeys(key for d in dicts for key in d)
    rows = [
        (k, [d.get(k) for d in dicts] if k in differ else [dicts[0][k]], k in differ) for k in keys
    ]
    return sorted(rows, key=lambda row: not row[2])


def folded(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """The rows of options that differ, or are not at their default, and the others."""
    defaults = {f.name: _written(f.default) for f in dataclasses.fields(TrainConfig)}
    plain = [r for r in rows if not r[2] and _written(r[1][0]) == defaults.get(r[0])]
    return [row for row in rows if row not in plain], plain


def _written(value: Any) -> str:
    return json.dumps(value, default=str, sort_keys=True)


def number(value: float, form: str = "{:.3f}") -> str:
    """A number as the page writes it, a dash for NaN; beyond 15 digits as a power of ten."""
    if math.isnan(value):
        return "–"
    if abs(value) >= 1e15:
        form = "{:+.3e}" if "+" in form else "{:.3e}"
    return form.format(value).replace("inf", "∞").replace("-", "\N{MINUS SIGN}")


def duration(seconds: float) -> str:
    """Three digits, in milliseconds below a second."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def shown(text: Any) -> str:
    """Text with every control character but line feed and tab in sight."""
    return "".join(c if c >= " " or c in "\n\t" else chr(0x2400 + ord(c)) for c in str(text))


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
