"""Curves as SVG: the mean over a group's runs, and a band from its lowest to its highest run."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ppo_fast.loop.log.history import mean
from ppo_fast.report.runs import Group

WIDTH, HEIGHT = 420.0, 250.0
LEFT, RIGHT, TOP, BOTTOM = 82.0, 22.0, 12.0, 46.0
# A longer run is drawn in this many points, each the mean over some updates.
POINTS = 500
# Smaller numbers are drawn as 0: ticks between them would be no floats.
_TINY = 1e-290
# Outliers are drawn at most so many heights away, out of sight in any case.
_FAR = 1e6
# A curve of single updates has a point at each of them, up to this number.
_MARKED = 60


class Plotted(NamedTuple):
    """A number of the log: its key, the chart's title, the y axis and a remark.

    `floor` is the least value that is drawn where outliers would flatten the rest. `when` says in
    which logs it has a chart: in all, and the page says where it is lacking; in those that have
    it; or in those that have another number than 0. `sparse` numbers are in some updates alone,
    and their curve goes on from one to the next.
    """

    key: str
    title: str
    unit: str
    remark: str = ""
    floor: float | None = None
    when: Literal["usual", "there", "used"] = "usual"
    sparse: bool = False


SECTIONS: dict[str, tuple[Plotted, ...]] = {
    "Reward and responses": (
        Plotted("reward", "Reward", "reward", "mean of the batch"),
        Plotted("reward_std", "Spread of the rewards", "reward", "std of the batch", when="there"),
        Plotted(
            "eval_reward", "Evaluation", "reward", "mean of its prompts", when="there", sparse=True
        ),
        Plotted(
            "eval_best", "Evaluation", "reward", "best of each prompt", when="there", sparse=True
        ),
        Plotted("response_length", "Response length", "tokens", "mean, with EOS", when="there"),
        Plotted("ended", "Ended by EOS", "share of the completions", when="there"),
    ),
    "Policy": (
        Plotted("kl", "KL to the reference", "nats a sequence"),
        Plotted("clip_frac", "Clip fraction", "share of the tokens"),
        Plotted("entropy", "Entropy", "nats a token"),
        Plotted("divergence", "Divergence from the teacher", "nats a token", when="there"),
        Plotted("support_size", "Ids drawn from", "ids a token", "mean", when="there"),
        Plotted("support_cut", "Probability cut", "share", "mean of the tokens", when="there"),
        Plotted("ess", "Effective sample size", "share of the tokens"),
        Plotted("grad_norm", "Gradient norm", "L2 norm", "before clipping"),
    ),
    "Critic": (
        Plotted("value_loss", "Value loss", "reward squared"),
        Plotted("explained_variance", "Explained variance", "share", "of the returns", floor=-1.0),
    ),
    "Schedules and speed": (
        Plotted("lr", "Learning rate", "lr", when="there"),
        Plotted("critic_lr", "Learning rate of the critic", "lr", when="there"),
        Plotted("kl_coef", "KL coefficient", "reward a nat", "in the reward", when="there"),
        Plotted("loss_kl_coef", "KL coefficient", "loss a nat", "in the loss", when="used"),
        Plotted("tokens_per_second", "Tokens per second", "tokens/s", "of the whole update"),
    ),
}
CURVES = tuple(plotted for section in SECTIONS.values() for plotted in section)


Spread = tuple[float, float, float]  # mean, lowest and highest


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

    plotted: Plotted
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
    return [chart(groups, plotted) for plotted in CURVES]


def chart(groups: list[Group], plotted: Plotted) -> Chart:
    """One number of the log over the updates of all groups."""
    every = sorted({update for g in groups for run in g.runs for update in run.records})
    size = math.ceil(len(every) / POINTS)
    bins = [every[i : i + size] for i in range(0, len(every), size)]
    updates = [part[0] for part in bins]
    spreads = [[spread(g, plotted.key, part) for part in bins] for g in groups]
    numbers = [v for values in spreads for s in values if s for v in s]
    if not numbers or (plotted.when == "used" and not any(numbers)):
        return Chart(plotted, updates, [], [], [], [])
    low, high = min(numbers), max(numbers)
    low = low if plotted.floor is None else max(low, min(plotted.floor, high))
    low, high = widened(low, high)
    y = Scale(low, high, HEIGHT - BOTTOM, TOP)
    x = Scale(updates[0], max(updates[-1], updates[0] + 1), LEFT, WIDTH - RIGHT)
    at, drawn = [x(u) for u in updates], sparse_curve if plotted.sparse else curve
    return Chart(
        plotted,
        updates,
        at,
        [Tick(x(t), text(t)) for t in ticks(x.low, x.high) if t == int(t)],
        [Tick(y(t), text(t)) for t in ticks(low, high)],
        [drawn(values, at, y) for values in spreads],
    )


def spread(group: Group, key: str, updates: list[int]) -> Spread | None:
    """Mean, lowest and highest of the group's runs at some updates; None where no run has any."""
    found = [run.records.get(u, {}).get(key) for run in group.runs for u in updates]
    values = [v for v in found if v is not None]
    return (mean(values), min(values), max(values)) if values else None


def sparse_curve(values: list[Spread | None], at: list[float], y: Scale) -> Curve:
    """A curve from each value to the next, over all that is not there, with its points marked."""
    there = [(x, value) for x, value in zip(at, values, strict=True) if value is not None]
    drawn = curve([value for _, value in there], [x for x, _ in there], y)
    marked = [(x, y(value[0])) for x, value in there] if len(there) <= _MARKED else drawn.points
    return Curve(drawn.line, drawn.band, marked, *_columns(values))


def curve(values: Sequence[Spread | None], at: list[float], y: Scale) -> Curve:
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
    return Curve(line, band, points, *_columns(values))


def _columns(values: Sequence[Spread | None]) -> list[list[float | None]]:
    return [[None if v is None else _rounded(v[k]) for v in values] for k in range(3)]


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
    """A tick's number: four digits, thousands as k, powers of ten from 1e9 on and below 1e-3."""
    if 10_000 <= abs(value) < 1e9:
        said = f"{value / 1000:.4g}k"
    elif 0 < abs(value) < 1e-3:
        digits, power = f"{value:.3e}".split("e")
        said = f"{float(digits):g}e{int(power)}"
    else:
        said = f"{value:.4g}"
    return said.replace("-", "\N{MINUS SIGN}")


def _rounded(value: float) -> float:
    """Five digits, but for the largest floats, which rounding would take to infinity."""
    found = float(f"{value:.5g}")
    return found if math.isfinite(found) else value


def _path(points: list[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g},{y:g}" for x, y in points)
