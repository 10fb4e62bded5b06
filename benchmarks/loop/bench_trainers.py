"""One update of ppo_fast's loop beside TRL's trainers, on equal work and in turn.

    make bench-trainers
    python -m benchmarks.loop.bench_trainers --only ppo-shared:16x16 --rounds 5

Every trainer runs in a process of its own, with the interpreter of its environment, and does an
update when it is its turn: the two are never at work at once, and a slow moment hits both. After
each round the counts of their work are compared, and a comparison whose trainers did not do the
same prints no ratio. Times are the clock's, the first update of each is left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness.machine import ROOT, THREADS, describe
from benchmarks.harness.measure import Outcome
from benchmarks.harness.worker import BrokenError, Child
from benchmarks.loop.equal_work import PHASES, Update, Work, differences, prepare
from benchmarks.ops.case import THP, Case
from benchmarks.report import tables, trainers
from benchmarks.report.pages import BUSY
from benchmarks.report.results import Row, save, short, timing_fields

RESULTS = ROOT / "benchmarks/results/trainers"
SILENCE = 900.0  # seconds after which a process that says nothing is given up
_MB = 2**20


class Side(NamedTuple):
    """A trainer in a comparison: its name in the rows, its kind, and its work."""

    name: str
    kind: str
    work: Work


class Comparison(NamedTuple):
    """Sides that take turns. `seconds` is about what their starts and three updates each take."""

    case: Case
    sides: list[Side]
    seconds: float

    @property
    def name(self) -> str:
        return f"{self.case.shape.name}:{self.case.shape}"


def _sides(kind: str, work: Work, *dtypes: str) -> list[Side]:
    """The trainer of that kind and ppo_fast's loop, in fp32 and in the other dtypes."""
    return [
        Side(kind + suffix, kind, dataclasses.replace(work, dtype=dtype))
        for kind in (kind, trainers.OURS)
        for suffix, dtype in (("", "float32"), *((f"-{trainers.BF16}", d) for d in dtypes))
    ]


_PPO = Work("ppo", 16, 64, critic="shared")
_SHORT = dataclasses.replace(_PPO, new_tokens=16)
_SEPARATE = dataclasses.replace(_SHORT, critic="separate")
_GRPO = Work("grpo", 8, 64, group=4, epochs=1, kl_coef=0.04)
COMPARISONS = (
    Comparison(trainers.PPO_64, _sides("trl-ppo", _PPO, "bfloat16"), 310.0),
    Comparison(trainers.GRPO_64, _sides("trl-grpo", _GRPO), 240.0),
    Comparison(trainers.PPO_16, _sides("trl-ppo", _SHORT), 90.0),
    Comparison(trainers.PPO_16_SEPARATE, _sides("trl-ppo", _SEPARATE), 110.0),
)


# Transparent huge pages as in `make train`, for every side.
_ENVIRONMENT = (*THP, ("OMP_NUM_THREADS", str(THREADS)), ("HF_HUB_OFFLINE", "1"))


class Turns:
    """The processes of a comparison's sides, which do updates one at a time."""

    def __init__(self, sides: list[Side], folder: Path, interpreters: dict[str, str]) -> None:
        self._alive: dict[str, Child] = {}
        self.versions: dict[str, str] = {}
        try:
            for side in sides:
                child = self._alive[side.name] = _start(side, folder, interpreters[side.kind])
                self.versions[side.name] = child.receive(SILENCE, side.name)["ready"]
        except BaseException:
            self.stop()
            raise

    def update(self, name: str) -> Update:
        """One update of a side; raises BrokenError."""
        self._alive[name].send({"update": True})
        return Update.from_json(self._alive[name].receive(SILENCE, name))

    def stop(self) -> None:
        for child in self._alive.values():
            child.stop()


def _start(side: Side, folder: Path, interpreter: str) -> Child:
    work = json.dumps(dataclasses.asdict(side.work))
    command = [interpreter, "-m", "benchmarks.loop.trainer_sides", side.kind, work, str(folder)]
    # What `accelerate launch --mixed_precision` sets.
    precision = "bf16" if side.work.dtype == "bfloat16" else "no"
    return Child(command, (*_ENVIRONMENT, ("ACCELERATE_MIXED_PRECISION", precision)))


def _of_model(case: Case, model: str) -> Case:
    """The case, named after the model where that is not the one that the goals are set for."""
    name = case.shape.name + ("" if model == "smollm2" else f" of {Path(model).name}")
    return dataclasses.replace(case, shape=dataclasses.replace(case.shape, name=name))


def measure(
    comparison: Comparison, folder: Path, interpreters: dict[str, str], rounds: int, seconds: float
) -> list[Row]:
    """Rows of a comparison after a first update each and up to `rounds` more in turn.

    No round begins of which more than half would pass `seconds`, but for the first. Raises
    BrokenError.
    """
    end = time.monotonic() + seconds
    sides, names = comparison.sides, [side.name for side in comparison.sides]
    taken: dict[str, list[Update]] = {name: [] for name in names}
    turns = Turns(sides, folder, interpreters)
    try:
        for turn in range(rounds + 1):
            begun = time.monotonic()
            # Each order as often as the other: what goes first finds other caches.
            for name in names if turn % 2 else reversed(names):
                update = turns.update(name)
                taken[name].append(update)
                print(f"{comparison.name} {name}: {update.seconds:.1f} s", file=sys.stderr)
            now = time.monotonic()
            if turn and now + (now - begun) / 2 > end:
                break
    finally:
        turns.stop()
    return [_row(comparison.case, side, taken, turns.versions[side.name]) for side in sides]


def _row(case: Case, side: Side, taken: dict[str, list[Update]], version: str) -> Row:
    name, ours = side.name, taken[trainers.OURS]
    first, *timed = taken[name]
    unequal = [
        f"update {i}: {found}"
        for i, (own, other) in enumerate(zip(ours, taken[name], strict=True))
        for found in differences(own.counts, other.counts)
    ]
    outcome = Outcome(
        "red" if unequal else "ok",
        "; ".join(unequal),
        [update.seconds for update in timed],
        max(update.peak_bytes for update in taken[name]) / _MB,
    )

    def milliseconds(values: list[float]) -> float:
        return round(statistics.median(values) * 1e3, 1)

    return case.to_json() | {
        "provider": name,
        "ceiling": False,
        "computes": "",
        "status": outcome.status,
        "detail": outcome.detail,
        **timing_fields(outcome),
        "version": version,
        "min_ms": short(min(update.seconds for update in timed) * 1e3),  # as the median is
        "first_ms": round(first.seconds * 1e3, 1),
        "cpu_ms": milliseconds([update.cpu_seconds for update in timed]),
        "phases_ms": {p: milliseconds([u.phases[p] for u in timed]) for p in PHASES},
        "rewards": [round(update.reward, 4) for update in taken[name]],
        "work": dataclasses.asdict(side.work),
        "counts": dataclasses.asdict(timed[-1].counts),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loop.bench_trainers",
        description=(__doc__ or "").splitlines()[0],
        allow_abbrev=False,
    )
    names, venv = [comparison.name for comparison in COMPARISONS], ROOT / ".venv/trainers"
    add = parser.add_argument
    add("--only", nargs="+", choices=names, default=names, help="comparisons, all by default")
    add("--rounds", type=_at_least_one, default=4, help="updates of each side, at most")
    add("--minutes", type=float, default=11.0, help="shared out between the comparisons")
    add("--model", default="smollm2", help="as `ppo-fast train` takes it")
    for kind in ("trl-ppo", "trl-grpo"):
        python = venv / kind / "bin/python"
        add(f"--{kind}", type=Path, default=python, help="interpreter with that trainer")
    add("--save-results", action="store_true", help="write a file of --results-dir")
    add("--results-dir", type=Path, default=RESULTS)
    return parser


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 1 where a trainer failed or did other work, 2 for an option."""
    parser = _parser()
    given = parser.parse_args(argv)
    chosen = [comparison for comparison in COMPARISONS if comparison.name in given.only]
    interpreters, needed = (
        {trainers.OURS: sys.executable},
        {s.kind for c in chosen for s in c.sides},
    )
    for kind in ("trl-ppo", "trl-grpo"):
        path = vars(given)[kind.replace("-", "_")].absolute()
        if kind in needed and not path.is_file():
            parser.error(f"--{kind} must be a Python interpreter, got {path}")
        interpreters[kind] = str(path)
    facts, rows, good = describe(), [], True
    end = time.monotonic() + 60 * given.minutes
    print(tables.describe_facts(facts), flush=True)
    if facts["load"] > BUSY:
        print(f"LOAD {facts['load']} before the run: other work shared the cores", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        sizes = {side.work.prompts for c in chosen for side in c.sides}
        prepare(Path(folder), given.model, sizes)
        for at, comparison in enumerate(chosen):
            share = comparison.seconds / sum(c.seconds for c in chosen[at:])
            comparison = comparison._replace(case=_of_model(comparison.case, given.model))
            seconds = share * (end - time.monotonic())
            try:
                made = measure(
                    comparison,
                    Path(folder),
                    interpreters,
                    given.rounds,
                    seconds,
                )
            except BrokenError as error:
                print(f"\n{comparison.name}: {error.provider} {error}", flush=True)
                good = False
                continue
            good = good and all(row["status"] == "ok" for row in made)
            print("\n".join(trainers.terminal(made)), flush=True)
            rows += made
            if given.save_results:
                save(given.results_dir, made, facts)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
