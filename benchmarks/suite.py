"""One measurement of a case: bind, gate, then time every provider in one interleaved run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks.gate import Gate
from benchmarks.providers import Provider, providers_of
from benchmarks.shapes import Case
from benchmarks.timing import Bound, interleave, peak_mb
from benchmarks.workloads import make_call
from ppo_fast.testing import Call

ROOT = Path(__file__).resolve().parent.parent
THREADS = min(2, os.cpu_count() or 1)


@dataclass
class Outcome:
    """What one provider did: timed ("ok"), or why there is no time.

    "skipped" is absent here, "red" disagrees with the reference, "error" raised.
    """

    status: str
    detail: str = ""
    samples: list[float] = field(default_factory=list)
    peak_mb: float | None = None


def measure(case: Case, names: Iterable[str], *, time: bool = True) -> dict[str, Outcome]:
    """Gate, and unless told otherwise time, the named providers of a case."""
    if case.missing_env:
        return _elsewhere(case, list(names), time)
    torch.set_num_threads(THREADS)
    call = make_call(case)
    gate = Gate(call)
    outcomes: dict[str, Outcome] = {}
    ready: dict[str, Bound] = {}
    for provider in providers_of(case):
        if provider.name not in names:
            continue
        reason = provider.missing()
        if reason is not None:
            outcomes[provider.name] = Outcome("skipped", reason)
            continue
        outcome, bound = _admit(provider, case, call, gate)
        outcomes[provider.name] = outcome
        if bound is not None:
            ready[provider.name] = bound
    del gate
    if time and ready:
        for name, bound in ready.items():
            outcomes[name].peak_mb = peak_mb(bound)
        for name, samples in interleave(ready).items():
            outcomes[name].samples = samples
    return outcomes


def _admit(provider: Provider, case: Case, call: Call, gate: Gate) -> tuple[Outcome, Bound | None]:
    """Run a provider once (compiling it, if it compiles) and hold its results to the gate."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a peer's own
            bound = provider.bind(case, call)
            if bound.prepare is not None:
                bound.prepare()
            result = bound.call()
        if not provider.ceiling:
            gate.check(bound.named(result), plain=provider.plain, roundings=provider.roundings)
    except AssertionError as error:
        return Outcome("red", str(error)), None
    except Exception as error:  # a peer may fail in any way; its row says so, the others go on
        return Outcome("error", f"{type(error).__name__}: {error}".splitlines()[0][:200]), None
    return Outcome("ok"), bound


def _elsewhere(case: Case, names: list[str], time: bool) -> dict[str, Outcome]:
    """The same measurement in a process that starts with the case's environment."""
    request = json.dumps({"case": case.to_json(), "names": names, "time": time})
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.suite", request],
        cwd=ROOT,
        env={**os.environ, **case.missing_env},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        return {name: Outcome("error", done.stderr[-2000:]) for name in names}
    answer = json.loads(done.stdout.splitlines()[-1])
    return {name: Outcome(**fields) for name, fields in answer.items()}


def main() -> None:
    """Answer the one request in argv with outcomes as JSON on the last line."""
    request = json.loads(sys.argv[1])
    outcomes = measure(Case.from_json(request["case"]), request["names"], time=request["time"])
    print(json.dumps({name: asdict(outcome) for name, outcome in outcomes.items()}))


if __name__ == "__main__":
    main()
