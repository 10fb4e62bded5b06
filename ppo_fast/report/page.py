"""The page: everything about some runs in one HTML file that asks nothing of the network."""

from __future__ import annotations

import base64
import hashlib
import math
import os
import statistics
from pathlib import Path
from typing import Any

from ppo_fast.loop.log.alarms import alarms
from ppo_fast.loop.log.fields import Record
from ppo_fast.loop.log.history import History, fifths, mean
from ppo_fast.report import charts
from ppo_fast.report.runs import FILES, Group, Run, RunError, differing, grouped, load_runs

_HERE = Path(__file__).parent
PHASES = ("rollout", "reward", "scoring", "advantages", "update")


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
    return env.get_template("page.html").render(
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        digest=digest,
        runs=runs,
        groups=groups,
        charts=charts,
        drawn=charts.charts(groups),
        phases=PHASES,
        rows=[(g, run, summary(run)) for g in groups for run in g.runs],
        alarms=[(run, alarm) for run in runs for alarm in alarms(History(run.records.values()))],
        seconds=[phase_seconds(g) for g in groups],
        sampled=[(g, examples(g)) for g in groups if g.runs[0].samples],
        config=table([run.config for run in runs]),
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


def examples(group: Group) -> list[tuple[int, list[Record]]]:
    """The samples of the first and of the last update that has some, of the group's first run."""
    samples = group.runs[0].samples
    updates = sorted({s["update"] for s in samples})
    return [
        (u, [s for s in samples if s["update"] == u])
        for u in dict.fromkeys(updates[:1] + updates[-1:])
    ]


def table(dicts: list[Record]) -> list[tuple[str, list[Any], bool]]:
    """Key, value of each run (one where all agree) and whether they differ; those first."""
    differ = differing(dicts)
    keys = dict.fromkeys(key for d in dicts for key in d)
    rows = [
        (k, [d.get(k) for d in dicts] if k in differ else [dicts[0][k]], k in differ) for k in keys
    ]
    return sorted(rows, key=lambda row: not row[2])


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
