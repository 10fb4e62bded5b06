"""Section "GPU goals, predicted" of benchmarks/README.md, from benchmarks/gpu/predictions.json.

Predictions are a file and no import: what makes them (`python -m benchmarks.gpu.predict --save`)
needs compilers, the page does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks.ops.case import Case
from benchmarks.report import tables
from benchmarks.report.results import Results, by_case

Predictions = list[dict[str, Any]]

_INTRO = """## GPU goals, predicted

**Predictions, not measurements.** `python -m benchmarks.gpu.count` compiles every kernel of a GPU
goal for sm_90 and counts its machine code: instructions an element, registers, loads, barriers,
launches. `python -m benchmarks.gpu.predict` turns counts, bytes and waves into a time on an H200,
by named assumptions (4.3 TB/s, 790 TFLOP/s, 1.83 GHz, ...), and says what limits it.
`tests/backends/test_budgets.py` holds every later build to the counts. The peak memory of the
linear losses and the error of their log-probabilities have no prediction."""


def section(predictions: Predictions, files: Iterable[Results]) -> list[str]:
    """Lines of the section; a measured time stands beside its prediction."""
    if not predictions:
        return []
    measured = _measured(files)
    heads = ["goal and kernels", "must", "aim", "predicted", "", "limited by", "launches"]
    heads += ["measured", "measured / predicted"]
    cells = [heads, *(line for row in predictions for line in _lines(row, measured))]
    return [
        _INTRO,
        "",
        *tables.markdown(cells),
        "",
        *_tally(predictions),
        "",
        *_counts(predictions),
    ]


def _measured(files: Iterable[Results]) -> dict[tuple[Case, str], float]:
    """Microseconds of the cases on a GPU, by case and provider."""
    return {
        (case, row["provider"]): row["median_ms"] * 1e3
        for results in files
        for case, block in by_case(results.rows).items()
        for row in block
        if case.device == "cuda" and "median_ms" in row
    }


def _lines(row: dict[str, Any], measured: dict[tuple[Case, str], float]) -> Iterator[list[str]]:
    case = Case.from_json(row["goal"])
    for found in row["predicted"]:
        time = found["microseconds"]
        met = "meets the aim" if time <= row["aim"] else "meets must"
        real = measured.get((case, found["provider"]))
        yield [
            f"`{case.op}` {tables.label(case)}: {_kernels(found)}{_mark(row, found)}",
            f"{row['must']:g} µs",
            f"{row['aim']:g} µs",
            f"{tables.number(time)} µs",
            met if time <= row["must"] else "SHORT",
            found["limit"],
            str(found["launches"]),
            "-" if real is None else f"{tables.number(real)} µs",
            "-" if real is None else f"{tables.number(real / time)}×",
        ]


def _mark(row: dict[str, Any], found: dict[str, Any]) -> str:
    return ", judged" if row["judged"] in found["provider"] else ""


def _kernels(found: dict[str, Any]) -> str:
    """Subject of a prediction: a backend's variant, and the compiler."""
    variant = found["provider"].removeprefix("ppo_fast-")
    return f"{variant} ({found['compiler']})"


def _tally(predictions: Predictions) -> Iterator[str]:
    """Number of goals met on paper: by the backends they are judged on, by the better ones."""
    for whose, times in (
        (
            "By the backend that is judged, the default or one named,",
            [_judged(row) for row in predictions],
        ),
        ("By the better of the two", [min(_times(row).values()) for row in predictions]),
    ):
        judged = list(zip(times, predictions, strict=True))
        must, aim = (sum(time <= row[key] for time, row in judged) for key in ("must", "aim"))
        yield f"{whose} {must} of {len(predictions)} goals are met on paper, {aim} of the aims."


def _times(row: dict[str, Any]) -> dict[str, float]:
    """Microseconds by backend: of two compilers' kernels the slower."""
    times: dict[str, float] = {}
    for found in row["predicted"]:
        name = "cuda" if "cuda" in found["provider"] else "triton"
        times[name] = max(times.get(name, 0.0), found["microseconds"])
    return times


def _judged(row: dict[str, Any]) -> float:
    return _times(row).get(row["judged"], math.inf)


def _counts(predictions: Predictions) -> Iterator[str]:
    """The counted numbers behind each prediction."""
    yield "Counted, and where the microseconds go:"
    yield ""
    for row in predictions:
        case = Case.from_json(row["goal"])
        for found in row["predicted"]:
            parts = ", ".join(f"{name} {value:g}" for name, value in found["parts"].items())
            yield (
                f"- `{case.op}` {tables.label(case)}, {_kernels(found)}: {found['counted']};"
                f" {parts}."
            )
