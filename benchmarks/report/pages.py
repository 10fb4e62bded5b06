"""Text of benchmarks/README.md, made from results alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness.machine import slug
from benchmarks.ops.registry import GOALS
from benchmarks.report import glance, plots, predicted, tables, trainers
from benchmarks.report.judge import Verdict, verdicts
from benchmarks.report.results import Results, Row, by_case

Files = dict[Path, Results]
BUSY = 0.5  # load before a run from which on others' work shared the cores

_INTRO = """# Benchmarks

Written by `python -m benchmarks.report` from the newest file of each machine in
`benchmarks/results`. `--compare a.json b.json` prints the differences between two files.

**Method.** Every result is checked against the fp64 reference before it is timed. *red* is a
provider that disagrees, *error* one that raised, *skipped* one that is absent. The providers of a
case take turns in one run; figures are medians, with the 20th and 80th percentile. `× eager` is
the eager time over the provider's: below 1 the provider is slower. GB/s counts the bytes that the
op must move, whoever computes it. *of ceiling* is the time of the case's slowest ceiling (`read`,
`copy`, ...) over the provider's; it passes 100 % where a ceiling pays for fresh memory and the op
does not. Peak MB is memory beyond what was allocated before the call.

**Goals.** *Must reach* is the figure that the project requires of itself on a case, *aim* the
better one that it works towards; `SHORT` marks a figure that misses its bound.
"""
_TRAINERS = """## One update beside TRL

`make bench-trainers` makes an environment for each trainer and runs every comparison, in twelve
minutes. `python -m benchmarks.loop.bench_trainers --help` has the options; `--save-results` writes
into `benchmarks/results/trainers`. SmolLM2-135M, all layers trained with AdamW, two threads.
The sides take turns and are never at work at once. Each counts what it does: the tokens
of prompts and responses, those with a gradient, forwards, optimiser steps, weights that a step
moved. Where one count differs from the other side's there is no ratio.

PPO: 16 prompts, 2 epochs of 2 minibatches of 8. GRPO: 8 prompts of 4 completions, 1 epoch of 2
minibatches of 16 in micro-batches of 8. No completion ends before its last token. The reward is
the share of letters. The critic is a head on the policy's body, which TRL runs once more for it,
or has a body of its own. bf16 in TRL is accelerate's mixed precision, which leaves the sampling
and the scoring of its PPO in fp32. TRL's PPO takes the old log-probabilities from its sampling,
the loop computes them again. *Scoring* lies between sampling and the first training forward;
*first* is the first update, which is in no median.
"""


def goals_of(results: Results) -> list[Verdict]:
    """Every goal for the devices that the file has rows of, measured or not."""
    devices = {case.device for case in by_case(results.rows)}
    return verdicts(results.rows, [goal for goal in GOALS if goal.case.device in devices])


def tally(found: list[Verdict]) -> list[str]:
    """Counts of the goals that are met, and a line for each that is missed."""
    musts = [verdict for verdict in found if verdict.goal.must is not None]
    aims = [verdict.aim_met for verdict in found if verdict.aim_met is not None]
    short = [verdict for verdict in musts if verdict.must_met is False]
    absent = sum(verdict.value is None for verdict in musts)
    met = len(musts) - len(short) - absent
    text = f"Must reach: {met} of {len(musts)} met, {len(short)} short, {absent} not measured. "
    text += f"Aims: {sum(aims)} of the {len(aims)} measured met."
    if not short:
        return [text]
    return [text + " Short:", "", *map(_shortfall, short)]


def _shortfall(verdict: Verdict) -> str:
    goal = verdict.goal
    reached, must = tables.figure(goal, verdict.value), tables.bound(goal, goal.must)
    return f"- `{tables.goal_name(goal)}`: {reached}, must reach {must}"


def page(
    files: Files,
    beside: Files | None = None,
    predictions: predicted.Predictions | None = None,
) -> str:
    """benchmarks/README.md: files of the ops, files of whole trainers, and predictions."""
    lines = [_INTRO, *predicted.section(predictions or [], files.values()), "", _TRAINERS]
    for path, results in (beside or {}).items():
        lines += [f"### {tables.title(results.runs[0])}: one update", ""]
        lines += [f"[{path.name}](results/trainers/{path.name})", "", *_runs(results), ""]
        lines += trainers.section(results.rows)
    for path, results in files.items():
        lines += [
            f"## {tables.title(results.runs[0])}",
            "",
            f"[{path.name}](results/{path.name})",
            "",
        ]
        found = goals_of(results)
        lines += [*_runs(results), "", "### At a glance", "", *glance.section(results, found), ""]
        lines += ["### Goals", ""]
        lines += [*tally(found), "", *tables.markdown(tables.goal_cells(found)), ""]
        lines += ["### Where a peer is faster", "", *_losses(results.rows), ""]
        lines += _sections(results)
    return "\n".join(lines).rstrip() + "\n"


def _runs(results: Results) -> Iterator[str]:
    """A line of facts per run, and whether other work disturbed it."""
    for index, facts in enumerate(results.runs):
        count = sum(row["run"] == index for row in results.rows)
        busy = (
            " **Busy before: other work may have shared the cores.**"
            if facts["load"] > BUSY
            else ""
        )
        yield f"- {count} rows: {tables.describe_facts(facts)}.{busy}"


def _losses(rows: list[Row]) -> list[str]:
    """Each case in which a peer's median is below that of the fastest backend.

    A backend's in-place variant does not count: it overwrites what others keep.
    """
    found = []
    for case, block in by_case(rows).items():
        times = [
            row["median_ms"] for name, row in tables.ours(block).items() if "inplace" not in name
        ]
        mine = min(times, default=None)
        for name, row in tables.peers(block).items():
            if mine is not None and row["median_ms"] < mine:
                both = f"{tables.duration(row['median_ms'])} against {tables.duration(mine)}"
                found.append(f"- `{case.op}` {tables.label(case)}: {name}, {both}")
    return found or ["In no case of this file."]


def _sections(results: Results) -> Iterator[str]:
    """The ceilings' plot, then each op's plots and tables."""
    machine = slug(results.runs[0])
    rows = [row for row in results.rows if "share" not in row]
    sized, ceilings = plots.by_size(rows, machine), plots.of_ceilings(rows, machine)
    if ceilings is not None:
        yield from ("### Share of the ceiling", "", _image(ceilings), "")
    for name, block in tables.steps(results.rows).items():
        yield from (f"### One PPO update: {name}", "")
        yield from (*tables.markdown(tables.step_cells(block)), "", *_notes(block))
    ops = dict.fromkeys(row["op"] for row in rows)
    bare = [op for op in ops if op not in {plot.op for plot in sized}]
    if bare:
        yield from (f"Measured at one size, so not plotted against it: {', '.join(bare)}.", "")
    for op in ops:
        yield from (f"### {op}", "")
        for plot in sized:
            if plot.op == op:
                yield from (_image(plot), "")
        yield from _tables([row for row in rows if row["op"] == op])


def _image(plot: plots.Plot) -> str:
    return f"![{plot.title}](plots/{plot.name}.svg)"


def _tables(rows: list[Row]) -> Iterator[str]:
    for case, block in by_case(rows).items():
        yield from (f"**{tables.label(case)}**", "")
        cells = tables.timing_cells(case, block)
        if cells:
            yield from (*tables.markdown(cells), "")
        yield from _notes(block)


def _notes(rows: list[Row]) -> list[str]:
    found = [f"- {name}: {_quoted(note)}" for name, note in tables.notes(rows)]
    return [*found, ""] if found else []


def _quoted(text: str) -> str:
    """Words, others' among them, that are not Markdown."""
    return "`" + text.replace("`", "'") + "`"
