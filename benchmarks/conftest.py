"""Options and fixtures: each case is measured once, interleaved; its rows replay their samples.

What a case gave is saved before the next one starts, so that a run may be stopped at any moment.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness.machine import describe
from benchmarks.harness.measure import Outcome
from benchmarks.harness.timing import CLOCK
from benchmarks.harness.worker import LIMIT, Workers
from benchmarks.ops.case import Case
from benchmarks.ops.registry import GOALS, cost
from benchmarks.peers import Provider
from benchmarks.report import results, tables
from benchmarks.report.judge import verdicts

_MEASURED = pytest.StashKey[dict[Case, dict[str, Outcome]]]()
_ROWS = pytest.StashKey[list[results.Row]]()
_FACTS = pytest.StashKey[dict[str, Any]]()
_WORKERS = pytest.StashKey[Workers]()
_BEGUN = pytest.StashKey[float]()
RESULTS = Path(__file__).parent / "results"

Record = Callable[[Case, Provider], None]
Keep = Callable[[list[results.Row]], None]


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
    group.addoption(
        "--case-seconds",
        type=float,
        default=LIMIT,
        help="after this long no further provider of a case begins, and a silent one is ended",
    )

    group.addoption(
        "--minutes",
        type=float,
        default=float("inf"),
        help="begin no further case after this long; what goals are set for comes first",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[_MEASURED], config.stash[_ROWS] = {}, []
    config.stash[_BEGUN] = time.monotonic()
    config.stash[_WORKERS] = Workers()
    # The summary below says more than pytest-benchmark's table; --benchmark-verbose shows both.
    config.option.benchmark_quiet = True


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[_WORKERS].close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs a GPU, and put first what a goal is set for; the cheapest comes first, so
    that a run that is cut short has seen most of it."""
    wanted = {goal.case for goal in GOALS}

    def place(item: pytest.Item) -> tuple[int, int]:
        case = _case_of(item)
        if case is None:
            return 2, 0
        return case not in wanted, cost(case).flops

    items.sort(key=place)
    for item in items:
        if (case := _case_of(item)) is not None and case.device == "cuda":
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="there is no GPU"))


def _case_of(item: pytest.Item) -> Case | None:
    return getattr(getattr(item, "callspec", None), "params", {}).get("case")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: Any) -> None:
    """A results file names the kind of machine, never the machine."""
    machine_info.pop("node", None)


def _selected(session: pytest.Session, case: Case) -> list[str]:
    """Providers of the case that this run's selection kept."""
    chosen = (item for item in session.items if _case_of(item) == case)
    return [item.callspec.params["provider"].name for item in chosen]


@pytest.fixture(autouse=True)
def in_time(request: pytest.FixtureRequest) -> None:
    """No case begins after `--minutes`; one that was measured still gives its rows."""
    config, minutes = request.config, request.config.getoption("minutes")
    if _case_of(request.node) in config.stash[_MEASURED]:
        return
    if time.monotonic() - config.stash[_BEGUN] > 60 * minutes:
        pytest.skip(f"not run: the {minutes:g} minutes are used up; --minutes gives more")


@pytest.fixture
def keep(request: pytest.FixtureRequest) -> Keep:
    """Add rows to the summary and, where asked for, to the results file."""
    config = request.config

    def run(rows: list[results.Row]) -> None:
        config.stash[_ROWS] += rows
        if config.getoption("save_results"):
            results.save(config.getoption("results_dir"), rows, config.stash[_FACTS])

    return run


@pytest.fixture
def record(request: pytest.FixtureRequest, benchmark: Any, keep: Keep) -> Record:
    """Measure a case on its first row; each row hands its samples to pytest-benchmark."""
    measured = request.config.stash[_MEASURED]
    workers, limit = request.config.stash[_WORKERS], request.config.getoption("case_seconds")

    def run(case: Case, provider: Provider) -> None:
        if case not in measured:
            names = _selected(request.session, case)
            logging.disable(logging.INFO)  # the compiler's traces would bury a failure's reason
            measured[case] = workers.measure(case, names, time=benchmark.enabled, limit=limit)
            logging.disable(logging.NOTSET)
            if benchmark.enabled:
                keep(results.make_rows(case, measured[case]))
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
    rows = config.stash[_ROWS]
    if not rows:
        return
    facts = config.stash[_FACTS]
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
    for line in tables.verdict_table(verdicts(rows)):
        write(line)
    if config.getoption("save_results"):
        write(f"saved in {config.getoption('results_dir')}")
