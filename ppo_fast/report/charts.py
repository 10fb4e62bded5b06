"""Curves as SVG: the mean over a group's runs, and a band from its lowest to its highest run."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

from ppo_fast.loop.log.history import mean
from ppo_fast.report.runs import Group

WIDTH, HEIGHT = 420.0, 230.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 12.0, 10.0, 30.0
# A longer run is drawn in this many points, each the mean over some updates.
POINTS = 500
# Smaller numbers are drawn as 0: ticks between them would be no floats.
_TINY = 1e-290
# Outliers are drawn at most so many heights away, out of sight in any case.
_FAR = 1e6
# Log key, title, unit, and the least value that is drawn where outliers would flatten the rest.
CURVES = (
    ("reward", "Reward", "mean of the batch", None),
    ("kl", "KL to the reference", "nats a sequence", None),
    ("clip_frac", "Clip fraction", "share of the tokens", None),
    ("entropy", "Entropy", "nats a token", None),
    ("value_loss", "Value loss", "", None),
    ("explained_variance", "Explained variance", "of the returns, by the critic", -1.0),
    ("ess", "Effective sample size", "share of the tokens", None),
    ("grad_norm", "Gradient norm", "before clipping", None),
    ("tokens_per_second", "Tokens per second", "of the whole update", None),
)


class Tick(NamedTuple):
    """A grid line: where, and what it says."""

    at: float
    text: str


@dataclass
class Curve:
    """One group: SVG paths, lone points, and the numbers the pointer reads, None where none is."""

    line: str
    band: str
    points: list[tuple[float, float]]
    mean: list[float | None]
    low: list[float | None]
    high: list[float | None]


@dataclass
class Chart:
    """A chart ready to be drawn; without `curves` there was no number to draw."""

    key: str
    title: str
    unit: str
    updates: list[int]
    at: list[float]
    x: list[Tick]
    y: list[Tick]
    curves: list[Curve]

    def data(self) -> dict[str, Any]:
        """Data of the page's script: updates, their places, and every curve's numbers."""
        curves = [{"mean": c.mean, "low": c.low, "high": c.high} for c in self.curves]
        return {"updates": self.updates, "at": self.at, "curves": curves}


class Scale(NamedTuple):
    """A linear map of [low, high] to [start, end] in the SVG's units."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        # Of a quarter of each, since a difference of large numbers may overflow.
        share = (value / 4 - self.low / 4) / (self.high / 4 - self.low / 4)
        share = min(max(share, -_FAR), _FAR)
        return round(self.start + share * (self.end - self.start), 2)


def charts(groups: list[Group]) -> list[Chart]:
    """All charts, each with a curve per group."""
    return [chart(groups, *curve) for curve in CURVES]


def chart(groups: list[Group], key: str, title: str, unit: str, floor: float | None) -> Chart:
    """One number of the log over the updates of all groups."""
    every = sorted({update for g in groups for run in g.runs for update in run.records})
    size = math.ceil(len(every) / POINTS)
    bins = [every[i : i + size] for i in range(0, len(every), size)]
    updates = [part[0] for part in bins]
    spreads = [[spread(g, key, part) for part in bins] for g in groups]
    numbers = [v for values in spreads for s in values if s for v in s]
    if not numbers:
        return Chart(key, title, unit, updates, [], [], [], [])
    low, high = min(numbers), max(numbers)
    low = low if floor is None else max(low, min(floor, high))
    low, high = widened(low, high)
    y = Scale(low, high, HEIGHT - BOTTOM, TOP)
    x = Scale(updates[0], max(updates[-1], updates[0] + 1), LEFT, WIDTH - RIGHT)
    x_ticks = [t for t in ticks(x.low, x.high) if t == int(t)]
    return Chart(
        key,
        title,
        unit,
        updates,
        [x(u) for u in updates],
        [Tick(x(t), str(int(t))) for t in x_ticks],
        [Tick(y(t), text(t)) for t in ticks(low, high)],
        [curve(values, [x(u) for u in updates], y) for values in spreads],
    )


def spread(group: Group, key: str, updates: list[int]) -> tuple[float, float, float] | None:
    """Mean, lowest and highest of the group's runs at some updates; None where no run has any."""
    found = [run.records.get(u, {}).get(key) for run in group.runs for u in updates]
    values = [v for v in found if v is not None]
    return (mean(values), min(values), max(values)) if values else None


def curve(values: list[tuple[float, float, float] | None], at: list[float], y: Scale) -> Curve:
    """Paths through the values that are there; a gap interrupts them."""
    stretches: list[list[tuple[float, float, float, float]]] = [[]]
    for x, value in zip(at, values, strict=True):
        if value is not None:
            stretches[-1].append((x, y(value[0]), y(value[1]), y(value[2])))
        elif stretches[-1]:
            stretches.append([])
    kept = [part for part in stretches if part]
    line = "".join(_path([(x, mean) for x, mean, _, _ in part]) for part in kept)
    band = "".join(
        _path([(x, high) for x, _, _, high in part] + [(x, low) for x, _, low, _ in part[::-1]])
        + "Z"
        for part in kept
    )
    points = [(part[0][0], part[0][1]) for part in kept if len(part) == 1]
    columns = [[None if v is None else _rounded(v[k]) for v in values] for k in range(3)]
    return Curve(line, band, points, *columns)


def widened(low: float, high: float) -> tuple[float, float]:
    """A range with a little room around it, and of some width even around one number."""
    size = max(abs(low), abs(high))
    if size < _TINY:
        return -0.5, 0.5
    room = 0.04 * high - 0.04 * low
    if high / 2 - low / 2 <= 0.5e-9 * size:
        room = 0.5 * abs(low)
    return max(low - room, -sys.float_info.max), min(high + room, sys.float_info.max)


def ticks(low: float, high: float, n: int = 4) -> list[float]:
    """About `n` round numbers within a range."""
    raw = high / n - low / n
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def text(value: float) -> str:
    """A tick's number: four digits, thousands as k, powers of ten from 1e9 on."""
    if 10_000 <= abs(value) < 1e9:
        return f"{value / 1000:.4g}k"
    return f"{value:.4g}".replace("-", "\N{MINUS SIGN}")


def _rounded(value: float) -> float:
    """Five digits, but for the largest floats, which rounding would take to infinity."""
    found = float(f"{value:.5g}")
    return found if math.isfinite(found) else value


def _path(points: list[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g},{y:g}" for x, y in points)
