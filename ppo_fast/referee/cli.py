"""`ppo-fast verify TRAINER`: a trainer's functions beside the papers' formulas."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ppo_fast.referee import cases
from ppo_fast.referee.report import to_json, to_text
from ppo_fast.referee.trainers import TRAINERS
from ppo_fast.referee.verify import NotRunError, Report, load, read_options, verify

_EPILOG = """exit status:
  0  every case agrees with its formula, up to rounding
  1  something differs
  2  the trainer is not installed or cannot run, or an argument is wrong
"""


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    chosen = _parser().parse_args(args)
    try:
        report = _report(chosen)
    except (ValueError, NotRunError) as error:
        print(f"ppo-fast verify: {str(error).removeprefix('verify: ')}", file=sys.stderr)
        return 2
    print(to_json(report) if chosen.json else to_text(report))
    return report.status


def _report(chosen: argparse.Namespace) -> Report:
    options = read_options(chosen.config)
    only = [name for words in chosen.cases for name in words.split(",")]
    if chosen.like is None:
        if chosen.trainer not in TRAINERS:
            hint = "" if ":" not in chosen.trainer else "; a function of your own needs --like"
            known = ", ".join(TRAINERS)
            raise ValueError(f"trainer must be one of {known}, got {chosen.trainer!r}{hint}")
        return verify(chosen.trainer, options, seed=chosen.seed, only=only)
    trainer, _, part = chosen.like.partition(".")
    return verify(
        trainer,
        options,
        function=load(chosen.trainer),
        like=part,
        seed=chosen.seed,
        only=only,
    )


def _parser() -> argparse.ArgumentParser:
    known = "\n".join(f"  {name:<12}{words}" for name, words in TRAINERS.items())
    every = "\n".join(
        f"  {name:<26}{words}" for kind in cases.NAMES.values() for name, words in kind.items()
    )
    parser = argparse.ArgumentParser(
        "ppo-fast verify",
        description="Run a trainer's own losses, masks, KL, advantages and reductions on nasty"
        " batches on the CPU, beside the papers' formulas in fp64, and name what differs.",
        epilog=f"trainers:\n{known}\n\ncases:\n{every}\n\n{_EPILOG}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("trainer", metavar="TRAINER", help="a trainer below, or FILE.py:function with --like")
    add(
        "--config",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="the trainer's own options, or a JSON or YAML file of them",
    )
    add(
        "--like",
        metavar="TRAINER.PART",
        help="the function whose arguments yours has: plain.policy_loss, trl.policy_loss, ...",
    )
    add("--json", action="store_true", help="the report as JSON")
    add("--seed", type=int, default=0, help="of the batches")
    add("--cases", nargs="+", default=[], metavar="NAME", help="these cases alone")
    return parser
