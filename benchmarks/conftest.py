"""The harness: each case is measured once, interleaved, and its rows replay their own samples."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import results, tables
from benchmarks.machine import describe
from benchmarks.providers import Provider
from benchmarks.shapes import Case
from benchmarks.suite import Outcome, measure
from benchmarks.timing import CLOCK

_MEASURED = pytest.StashKey[dict[Case, dict[str, Outcome]]]()
_FACTS = pytest.StashKey[dict[str, Any]]()
RESULTS = Path(__file__).parent / "results"

Record = Callable[[Case, Provider], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ppo_fast")
    group.addoption(
        "--save-results",
        action="store_true",
        help="write benchmarks/results/<machine>-<date>.json",
    )
    group.addoption(
        "--results-dir", type=Path, default=RESULTS, help="where --save-results writes"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[_MEASURED] = {}
    # The summary below says more than pytest-benchmark's table; --benchmark-verbose shows both.
    config.option.benchmark_quiet = True


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: Any) -> None:
    """A results file names the kind of machine, never the machine."""
    machine_info.pop("node", None)


def _selected(session: pytest.Session, case: Case) -> list[str]:
    """Providers of the case that this run's selection kept."""
    chosen = []
    for item in session.items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        if params.get("case") == case:
            chosen.append(params["provider"].name)
    return chosen


@pytest.fixture
def record(request: pytest.FixtureRequest, benchmark: Any) -> Record:
    """Measure a case on its first row; each row hands its samples to pytest-benchmark."""
    measured = request.config.stash[_MEASURED]

    def run(case: Case, provider: Provider) -> None:
        if case not in measured:
            names = _selected(request.session, case)
            logging.disable(logging.INFO)  # the compiler's traces would bury a failure's reason
            measured[case] = measure(case, names, time=benchmark.enabled)
            logging.disable(logging.NOTSET)
        outcome = measured[case][provider.name]
        benchmark.skipped = outcome.status != "ok"
        if outcome.status == "skipped":
            pytest.skip(outcome.detail)
        if outcome.status != "ok":
            pytest.fail(f"{provider.name} on {case.name}: {outcome.detail}", pytrace=False)
        benchmark.group = case.name
        benchmark.name = provider.name
        CLOCK.load(outcome.samples)
        benchmark.pedantic(lambda: None, rounds=max(1, len(outcome.samples)))

    return run


@pytest.fixture(scope="session", autouse=True)
def facts(request: pytest.FixtureRequest) -> None:
    """Taken before the first measurement, so that the load is that of others."""
    request.config.stash[_FACTS] = describe()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    measured = {
        case: outcomes
        for case, outcomes in config.stash[_MEASURED].items()
        if any(outcome.samples for outcome in outcomes.values())
    }
    if not measured:
        return
    facts = config.stash[_FACTS]
    rows = [
        row for case, outcomes in measured.items() for row in results.make_rows(case, outcomes)
    ]
    write = terminalreporter.write_line
    terminalreporter.section("benchmarks")
    write(tables.describe_facts(facts))
    if facts["load"] > 0.5:
        write(
            f"LOAD {facts['load']} before the run: other work shared the cores, do not quote this"
        )
    for line in tables.table(rows):
        write(line)
    terminalreporter.section("goals")
    for line in tables.verdict_table(results.verdicts(rows)):
        write(line)
    if config.getoption("save_results"):
        write(f"saved {results.save(config.getoption('results_dir'), rows, facts)}")
