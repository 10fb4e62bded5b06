"""The command line: `ppo-fast train`, `report`, `info` and `bench`."""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import ppo_fast
from ppo_fast import integrations

if TYPE_CHECKING:
    from rich.console import Console

    from ppo_fast.loop import Outcome, TrainConfig, Trainer

_USAGE = """usage: ppo-fast COMMAND [OPTIONS]

  train   fine-tune a causal language model with PPO (ppo-fast train --help lists the options)
  report  one HTML page of one or more runs (ppo-fast report --help)
  info    versions, usable backends and trainers
  bench   measure the ops beside their peers (ppo-fast bench --help lists the options)

  --version  the version alone
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    command, *args = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command == "train":
        return _train(args)
    if command == "report":
        return _report(args)
    if command == "info":
        return _info(args)
    if command == "bench":
        return _bench(args)
    if command in ("-V", "--version"):
        print(f"ppo_fast {ppo_fast.__version__}")
        return 0
    print(_USAGE, end="")
    if command in ("-h", "--help"):
        return 0
    print(f"\nppo-fast: unknown command {command!r}", file=sys.stderr)
    return 2


def _train(args: list[str]) -> int:
    try:
        from rich.console import Console
        from transformers.utils.logging import disable_progress_bar

        from ppo_fast.loop import OptionError
        from ppo_fast.loop.cli import parse
    except ModuleNotFoundError as error:
        print(f"{error}; `ppo-fast train` needs: pip install 'ppo_fast[train]'", file=sys.stderr)
        return 1
    try:
        config = parse(args)
    except OptionError as error:
        print(_refusal(error), file=sys.stderr)
        return 2
    _write_any_text()
    console = Console(quiet=os.environ.get("RANK", "0") != "0")
    disable_progress_bar()  # the run draws its own
    try:
        return _run(config, console)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        said = _stopped(error, config)
        if said is None:
            raise
        print(said, file=sys.stderr)
        return 2 if isinstance(error, (OptionError, ModuleNotFoundError)) else 1


def _run(config: TrainConfig, console: Console) -> int:
    """Train, print the outcome, and compare the backends; returns the exit status."""
    from ppo_fast import loop

    with loop.processes(config) as ranks:
        trainer, outcome = loop.train(config, console, ranks)
        _print_outcome(console, outcome)
        if outcome.interrupted:
            return 130
        if ranks.size == 1:
            _compare(console, config, trainer)
    return 0


def _stopped(error: Exception, config: TrainConfig) -> str | None:
    """Message for an error that ends a run; None for an unforeseen one."""
    from safetensors import SafetensorError

    from ppo_fast import loop
    from ppo_fast.loop.data.packages import TaskError
    from ppo_fast.loop.values import traceback_of

    if isinstance(error, loop.RankFailedError):
        return str(error)
    kept = (loop.RewardLengthError, loop.NonFiniteGradientError, loop.OutOfMemoryStopError)
    if isinstance(error, kept):
        return f"stopped: {error}; what was made is in {config.out}"
    # What a reward or a task raised, and where: it may be the user's own code.
    cause = error.__cause__ if isinstance(error, (loop.NoRewardError, TaskError)) else None
    raised = "" if cause is None else traceback_of(cause) + "\n"
    if isinstance(error, (loop.OptionError, ModuleNotFoundError)):
        return raised + _refusal(error)
    if isinstance(error, (loop.CheckpointError, loop.RewardError, loop.TrackerError)):
        return f"{raised}stopped: {error}"
    if isinstance(error, (OSError, SafetensorError)):  # a disk that is full, mostly
        return f"stopped: {_reasons(error)}"
    return None


def _refusal(error: Exception) -> str:
    """One line on an option of which no run can be made."""
    text = " ".join(str(error).removeprefix("TrainConfig: ").split())
    return f"ppo-fast train: {text}"


def _write_any_text() -> None:
    """Escape what the console's encoding lacks: no text of a prompt or a fault ends a run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _reasons(error: BaseException | None) -> str:
    """Reason that ended a run, and the failures while it was ending, in that order."""
    found = [str(error)]
    while error is not None:
        if isinstance(error, OSError) or type(error).__module__.startswith("ppo_fast"):
            found.insert(0, str(error))
        while error.__cause__ is not None:  # the same failure, before it had a path
            error = error.__cause__
        error = error.__context__
    return "; then ".join(dict.fromkeys(found))


def _print_outcome(console: Console, outcome: Outcome) -> None:
    """Print reward, KL and paths, a line each."""
    from ppo_fast.loop.log.progress import say

    updates = len(outcome.rewards)
    ended = "interrupted after" if outcome.interrupted else "done:"
    say(
        console,
        f"{ended} {updates} updates, KL to the reference {outcome.kl:.2f} nats a sequence",
    )
    if updates:
        change = outcome.last - outcome.first
        say(
            console,
            f"mean reward: first fifth {outcome.first:+.3f}, last fifth {outcome.last:+.3f}"
            f" ({change:+.3f})",
        )
        say(console, f"curve: {outcome.plot}")
    if outcome.model is not None:
        say(console, f"model: {outcome.model}")


def _compare(console: Console, config: TrainConfig, trainer: Trainer) -> None:
    """Replay the last batch on both backends and print what they cost and how they differ."""
    if config.compare == 0 or trainer.last_batch is None:
        return
    from ppo_fast.loop.compare import compare
    from ppo_fast.loop.log.progress import say

    if trainer.backend == "reference":
        say(console, "ran on the reference backend, so there is nothing to compare it with")
        return
    with console.status("comparing with the reference backend"):
        result = compare(trainer, config.compare)
    console.print(result.table(f"one update, medians of {config.compare} on {trainer.device}"))
    say(
        console,
        f"largest difference: loss {result.loss_difference:.2e} (loss {result.loss:.4f}),"
        f" gradients {result.gradient_difference:.2e} (largest {result.gradient:.2e})",
    )


def _report(args: list[str]) -> int:
    parser = argparse.ArgumentParser("ppo-fast report", description="One HTML page of some runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folder of a run")
    parser.add_argument("--out", type=Path, metavar="FILE", help="report.html in the first RUN")
    chosen = parser.parse_args(args)
    try:
        from ppo_fast.report import RunError, write_report
    except ModuleNotFoundError as error:
        print(f"{error}; `ppo-fast report` needs: pip install 'ppo_fast[train]'", file=sys.stderr)
        return 1
    try:
        page = str(write_report(chosen.runs, chosen.out))
        # A name that is no UTF-8 is a name all the same.
        print(f"page: {page.encode('utf-8', 'backslashreplace').decode()}")
    except RunError as error:
        print(f"ppo-fast report: {error}", file=sys.stderr)
        return 1
    return 0


def _info(args: list[str]) -> int:
    argparse.ArgumentParser(
        "ppo-fast info", description="Versions, backends and trainers."
    ).parse_args(args)
    print(f"ppo_fast {ppo_fast.__version__}, Python {sys.version.split()[0]}")
    for package in ("torch", "triton", "transformers"):
        try:
            print(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{package} not installed")
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    print(f"CPU threads {torch.get_num_threads()}, GPU {cuda}")
    for name, reason in ppo_fast.backends().items():
        print(f"backend {name}: {reason or 'usable'}")
    for name, line in integrations.installed_versions().items():
        print(f"integrations.{name}: {line}")
    return 0


def _bench(args: list[str]) -> int:
    folder = Path(ppo_fast.__file__).resolve().parent.parent / "benchmarks"
    if not folder.is_dir():
        print(f"ppo-fast bench runs from a checkout; {folder} is missing", file=sys.stderr)
        return 1
    command = [sys.executable, "-m", "benchmarks", *args]
    return subprocess.run(command, check=False, cwd=folder.parent).returncode


if __name__ == "__main__":
    sys.exit(main())
