"""Plots of a results file as SVG: time and memory against size, and the share of the ceiling.

What is drawn follows from the rows alone; the same rows give the same bytes.
"""

from __future__ import annotations

import io
from typing import Any, NamedTuple

from benchmarks.harness.machine import slugged
from benchmarks.ops.case import CALL, CALL_GRAD, Case
from benchmarks.ops.support import kept
from benchmarks.ops.teacher import kind_of
from benchmarks.report.results import Row, by_case
from benchmarks.report.tables import ceiling_share, fused, timed


class Plot(NamedTuple):
    """One SVG: `lines` of (provider, ceiling?, cases, rows), `bars` of (case, provider, share)."""

    op: str
    name: str
    title: str
    lines: list[tuple[str, bool, list[Case], list[Row]]]
    bars: list[tuple[str, str, float]]


def by_size(rows: list[Row], machine: str) -> list[Plot]:
    """One per kind of case (op, direction, layout, dtype, ...) timed at two sizes or more.

    The cases of supports differ in their kept ids, those of teachers in the divergence, not in
    size.
    """
    kinds: dict[str, list[Case]] = {}
    blocks = {
        case: timed(block)
        for case, block in by_case(rows).items()
        if not (kept(case) or kind_of(case))
    }
    for case in (case for case, block in blocks.items() if block):
        size = f"{case.shape.name}:{case.shape}"
        kinds.setdefault(case.name.replace(size, case.shape.layout), []).append(case)
    plots = []
    for title, cases in kinds.items():
        cases.sort(key=lambda case: case.shape.numel)
        if len({case.shape.numel for case in cases}) < 2:
            continue
        lines = []
        for name in dict.fromkeys(name for case in cases for name in blocks[case]):
            there = [case for case in cases if name in blocks[case]]
            found = [blocks[case][name] for case in there]
            lines.append((name, found[0]["ceiling"], there, found))
        plots.append(Plot(cases[0].op, f"{machine}-{slugged(title)}", title, lines, []))
    return plots


def of_ceilings(rows: list[Row], machine: str) -> Plot | None:
    """The fastest fused backend and the fastest of the others, where a case has a ceiling."""
    bars = []
    for case, block in by_case(rows).items():
        best: dict[bool, tuple[float, str]] = {}
        for name, row in timed(block).items():
            share = ceiling_share(block, row)
            if share is None or row["ceiling"] or case.direction in (CALL, CALL_GRAD):
                continue
            mine = fused(name)
            best[mine] = max(best.get(mine, (0.0, "")), (share, name))
        bars += [
            (case.name, name, share) for _, (share, name) in sorted(best.items(), reverse=True)
        ]
    if not bars:
        return None
    return Plot("", f"{machine}-ceiling", "share of the ceiling, %", [], bars)


def planned(rows: list[Row], machine: str) -> list[Plot]:
    """All plots of a file; parts of a training step are not plotted."""
    rows = [row for row in rows if "share" not in row]
    ceilings = of_ceilings(rows, machine)
    return by_size(rows, machine) + ([ceilings] if ceilings else [])


def draw(plot: Plot) -> str:
    """The plot as SVG."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "ppo_fast", "svg.fonttype": "none"}):
        figure = _bars(plot) if plot.bars else _lines(plot)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _lines(plot: Plot) -> Any:
    """Two panels over one size axis: time, memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    time, memory = figure.subplots(1, 2)
    for name, ceiling, cases, rows in plot.lines:
        sizes = [case.shape.numel for case in cases]
        style: dict[str, Any] = {
            "linestyle": ":" if ceiling else "-",
            "linewidth": 2 if fused(name) else 1,
            "marker": "o",
            "markersize": 3,
            "label": name,
        }
        time.plot(sizes, [row["median_ms"] for row in rows], **style)
        known = [
            (x, row["peak_mb"])
            for x, row in zip(sizes, rows, strict=True)
            if row["peak_mb"] is not None
        ]
        memory.plot([x for x, _ in known], [mb for _, mb in known], **style)
    shapes = {case.shape.numel: str(case.shape) for _, _, cases, _ in plot.lines for case in cases}
    for axes, what in ((time, "median ms"), (memory, "peak MB")):
        axes.set(xscale="log", ylabel=what)
        axes.set_xticks(list(shapes), list(shapes.values()), rotation=30, ha="right")
        axes.minorticks_off()
    time.set_yscale("log")
    memory.set_yscale("symlog", linthresh=1)
    memory.set_ylim(bottom=0)
    figure.suptitle(plot.title)
    figure.legend(*time.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    return figure


def _bars(plot: Plot) -> Any:
    """Horizontal bars from the top down, this library's dark; a case is named at its first."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.8 + 0.22 * len(plot.bars)), layout="constrained")
    axes = figure.subplots()
    ticks: dict[str, int] = {}
    for at, (case, name, share) in enumerate(plot.bars):
        ticks.setdefault(case, -at)
        color = "tab:blue" if fused(name) else "lightgrey"
        axes.barh(-at, share * 100, color=color)
        axes.annotate(
            f"{name} {share:.1%}",
            (share * 100, -at),
            (3, 0),
            textcoords="offset points",
            va="center",
            fontsize="small",
        )
    axes.set_yticks(list(ticks.values()), list(ticks), fontsize="small")
    axes.axvline(100, color="black", linewidth=0.8, zorder=0)
    shares = [100 * share for _, _, share in plot.bars]
    axes.set(xscale="log", xlim=(min(shares) / 2, 30 * max(100, *shares)))
    axes.set_xlabel(plot.title)
    return figure
