"""Command line of `ppo-fast train`, and option files of former runs."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import io
import json
import sys
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import tyro

from ppo_fast.loop.config import RENAMED, Given, OptionError, TrainConfig

_DESCRIPTION = """PPO on a causal language model. The default fine-tunes SmolLM2-135M-Instruct
to continue film reviews with positive sentiment; --task names other things to learn.
--config FILE reads options from a JSON file, such as a former run's config.json; all that it lists
are given, and options beside it go before it."""


class ConfigError(OptionError):
    """A configuration file that cannot be read as options."""


def parse(args: list[str]) -> TrainConfig:
    """The options of a command line. Ends the process as tyro does for those that are none.

    Options of `--config FILE` come first, so that those given by hand override them; both count as
    given. Raises `ConfigError` for a file that is not there, is not a JSON object, or has an
    unknown key, and OptionError for an option out of its range.
    """
    parser = argparse.ArgumentParser("ppo-fast train", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", action="append", type=Path, default=[], metavar="FILE")
    chosen, rest = parser.parse_known_args(args)
    every = [argument for path in chosen.config for argument in arguments(path)]
    every += _joined([_renamed(argument) for argument in rest])
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return tyro.cli(
                TrainConfig,
                args=every,
                default=TrainConfig(_given=_names(every)),
                prog="ppo-fast train",
                description=_DESCRIPTION,
                config=(tyro.conf.SuppressFixed,),  # what was given is no option
            )
    except SystemExit as end:
        # What tyro says in a box of an option out of its range, the error itself says in a line.
        if isinstance(end.__context__, OptionError):
            raise end.__context__ from None
        sys.stderr.write(said.getvalue())
        raise


def _joined(args: list[str]) -> list[str]:
    """The arguments with rewards or trackers given one by one as one, with commas between."""
    for name in ("reward", "track"):
        parser = argparse.ArgumentParser("ppo-fast train", add_help=False, allow_abbrev=False)
        parser.add_argument(f"--{name}", action="append", default=[], dest="given")
        chosen, rest = parser.parse_known_args(args)
        if len(chosen.given) > 1:
            args = [f"--{name}={','.join(chosen.given)}", *rest]
    return args


def _renamed(argument: str) -> str:
    """The argument, or an option's former name as today's."""
    name, equals, value = argument.partition("=")
    old = {f"--{was.replace('_', '-')}": now.replace("_", "-") for was, now in RENAMED.items()}
    return f"--{old[name]}{equals}{value}" if name in old else argument


def _names(args: list[str]) -> Given:
    """The names of the options in a command line, in either of the spellings tyro reads."""
    words = {arg[2:].partition("=")[0].replace("-", "_") for arg in args if arg[:2] == "--"}
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    return Given(known & (words | {word.removeprefix("no_") for word in words}))


def arguments(path: Path) -> list[str]:
    """The options in a JSON file, as they would be given by hand."""
    try:
        options: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(options, dict):
        raise ConfigError(f"{path}: must hold an object of options, got {options!r:.60}")
    known = [field.name for field in dataclasses.fields(TrainConfig)]
    found = []
    for given, value in options.items():
        key: str = RENAMED.get(str(given), str(given))
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ConfigError(f"{path}: unknown option {key!r}{hint}")
        name = key.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{name}" if value else f"--no-{name}")
        elif key in ("stop", "reject") and isinstance(value, list):
            found += [f"--{name}", *map(str, value)] if value else []
        elif isinstance(value, list | dict):
            raise ConfigError(f"{path}: {key} must be a single value, got {value!r:.60}")
        else:
            found.append(f"--{name}={value}")
    return found
