"""A report of the referee as text and as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import textwrap
from typing import Any

from ppo_fast.referee.judge import Difference, Finding
from ppo_fast.referee.verify import Part, Report

SCHEMA = 1
_WIDTH = 96


def to_json(report: Report) -> str:
    """The report by the schema of docs/verify.md; numbers that are not finite are texts."""
    found = {
        "schema": SCHEMA,
        "trainer": report.trainer,
        "version": report.version,
        "options": report.options,
        "seed": report.seed,
        "status": report.status,
        "findings": [_finding(part, one) for part in report.parts for one in part.findings],
        "parts": [
            {
                "name": part.name,
                "part": part.part,
                "place": part.place,
                "formula": part.paper,
                "dtype": part.dtype,
                "agree": part.agree,
                "left_out": part.left_out,
                "raised": part.raised,
                "taken_as_given": list(part.taken),
            }
            for part in report.parts
        ],
        "not_run": {one.name: one.why for one in report.not_run},
    }
    return json.dumps(_finite(found), indent=2, ensure_ascii=False, allow_nan=False)


def _finding(part: Part, one: Finding) -> dict[str, Any]:
    return {"name": part.name, **dataclasses.asdict(one), "worst": one.worst._asdict()}


def _finite(x: Any) -> Any:
    if isinstance(x, dict):
        return {key: _finite(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_finite(value) for value in x]
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x


def to_text(report: Report) -> str:
    """The report for a reader: what differs first, then what agrees and what was not run."""
    given = ", ".join(f"{k}={v}" for k, v in report.options.items() if v is not None)
    lines = [f"{report.trainer} {report.version}".rstrip(), *_wrapped(given, "  "), ""]
    for part in report.parts:
        lines += _part(part)
    for missing in report.not_run:
        lines += _wrapped(f"not run: {missing.name}: {missing.why}", "- ")
    lines += [""] if report.not_run else []
    return "\n".join([*lines, *_wrapped(_sum(report), "")])


def _sum(report: Report) -> str:
    documented = sum(one.documented is not None for one in report.findings)
    cases = sum(len(p.agree) for p in report.parts)
    differ = len(report.findings)
    words = f"{differ} difference{'s' * (differ != 1)}" if differ else "no difference"
    if documented:
        words += f", {documented} of them documented by {report.trainer}"
    raised = sum(len(p.raised) for p in report.parts)
    words += f"; {len(report.parts)} functions, {cases} cases agree"
    return words + (f", {raised} raised an error" if raised else "")


def _part(part: Part) -> list[str]:
    mark = "≠" if part.findings else "!" if part.raised else "="
    total = (
        len(part.agree)
        + len(part.raised)
        + len({case for one in part.findings for case in one.cases})
    )
    head = f"{mark} {part.name}: {len(part.agree)} of {total} cases agree"
    lines = [head, *_wrapped(f"{part.place}, {part.dtype}, beside {part.paper}", "    ")]
    for one in part.findings:
        lines += ["", *_wrapped(one.reading, "  ≠ ", "    ")]
        lines += _wrapped(f"{_numbers(one.worst)}; in {', '.join(one.cases)}", "    ")
        if one.documented is not None:
            lines += _wrapped(f"documented: {one.documented}", "    ")
    more: list[str] = []
    for case, error in part.raised.items():
        more += _wrapped(f"! {case} raised {error}", "  ", "    ")
    for why in dict.fromkeys(part.left_out.values()):
        cases = ", ".join(case for case, words in part.left_out.items() if words == why)
        more += _wrapped(f"left out: {cases}: {why}", "    ")
    for words in part.taken:
        more += _wrapped(f"taken as given: {words}", "    ")
    return [*lines, *([""] if part.findings and more else []), *more, ""]


def _numbers(worst: Difference) -> str:
    where = f"{worst.output} of {worst.case}: {worst.given:.6g}, by the formula {worst.exact:.6g}"
    if not math.isfinite(worst.relative):
        return where
    largest = "" if worst.output == "loss" else " of the largest"
    times, share = f"{worst.relative:.3g} times", f"{100 * worst.relative:.2g} %"
    off = times if worst.relative > 1 else share
    return f"{where}; off by {worst.absolute:.2g}, {off}{largest}"


def _wrapped(text: str, first: str, rest: str | None = None) -> list[str]:
    rest = " " * len(first) if rest is None else rest
    return textwrap.wrap(
        text, _WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False
    )
