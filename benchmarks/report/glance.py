"""Section "At a glance" of benchmarks/README.md: every case with a goal, in one table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from benchmarks.ops.case import CALL, CALL_GRAD
from benchmarks.report import tables
from benchmarks.report.judge import Verdict
from benchmarks.report.results import Results, Row, by_case


def section(results: Results, found: Iterable[Verdict]) -> list[str]:
    """Lines of the section, from a file's rows and the verdicts on its goals."""
    return [
        *tables.markdown(_figures(results.rows, found)),
        "",
        *_calls(results.rows),
        *_updates(results.rows),
    ]


def _figures(rows: list[Row], found: Iterable[Verdict]) -> tables.Cells:
    """A line per case and backend with a goal: its time, and times as fast as each peer."""
    heads = ["op and shape", "time", "eager", "`torch.compile`", "other peers", "of ceiling"]
    blocks, lines = by_case(rows), [heads]
    for case, provider in dict.fromkeys((v.goal.case, v.goal.provider) for v in found):
        block = blocks.get(case, [])
        row = tables.ours(block).get(provider)
        if row is None or case.direction in (CALL, CALL_GRAD):
            continue
        times = {
            k: f"{tables.number(peer['median_ms'] / row['median_ms'])}×"
            for k, peer in tables.peers(block).items()
        }
        known = [times.pop(name, "-") for name in ("eager", "compile")]
        others = ", ".join(f"{name} {ratio}" for name, ratio in times.items()) or "-"
        share = tables.ceiling_share(block, row)
        variant = provider.removeprefix("ppo_fast-")
        name = f"`{case.op}` {tables.label(case)} ({variant})"
        lines.append(
            [
                name,
                tables.duration(row["median_ms"]),
                *known,
                others,
                "-" if share is None else f"{share:.0%}",
            ]
        )
    return lines


def _calls(rows: list[Row]) -> Iterator[str]:
    """Lines on the cost of a call on tiny tensors, over the ops."""
    for direction, what in ((CALL, "without a gradient"), (CALL_GRAD, "with one recorded")):
        times = [
            row["median_ms"] * 1e3
            for case, block in by_case(rows).items()
            if case.direction == direction
            for row in tables.ours(block).values()
        ]
        if times:
            low, high = (tables.number(end(times)) for end in (min, max))
            yield f"A call on tiny tensors {what} takes {low} to {high} µs."


def _updates(rows: list[Row]) -> Iterator[str]:
    """Lines on the time of a whole training step on each backend."""
    for name, block in tables.steps(rows).items():
        whole = [row for row in block if row["direction"] == "step"]
        each = [f"{tables.duration(row['median_ms'])} with `{row['provider']}`" for row in whole]
        yield f"One PPO update of {name} takes {', '.join(each)}."
