"""Known contents of a trainer's places, and the versions that the adapter's tests ran with.

`known/<adapter>.json` has both; `tests/scripts/known_sources.py` writes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ppo_fast.integrations._content import Content

FOLDER = Path(__file__).parent / "known"


@dataclass(frozen=True)
class Seen:
    """One content of a place and the versions that have it."""

    content: Content
    versions: tuple[str, ...]


@dataclass(frozen=True)
class Known:
    """The tested versions, from the lowest, and the known contents of each place."""

    tested: tuple[str, ...] = ()
    places: dict[str, tuple[Seen, ...]] = field(default_factory=dict)

    def contents(self, place: str) -> list[Content]:
        """The known contents of a place."""
        return [seen.content for seen in self.places.get(place, ())]

    def versions(self, place: str) -> str:
        """The versions of which the place is known, as a range."""
        return span({v for seen in self.places.get(place, ()) for v in seen.versions})


def load(adapter: str) -> Known:
    """Known contents for an adapter; none before its file is first written."""
    file = FOLDER / f"{adapter}.json"
    if not file.exists():
        return Known()
    data = json.loads(file.read_text("utf-8"))
    places = {place: tuple(map(_seen, each)) for place, each in data["places"].items()}
    return Known(tuple(data["tested"].split()), places)


def _seen(written: dict[str, str]) -> Seen:
    read = {name: tuple(text.split()) for name, text in written.items()}
    return Seen(Content(read["takes"], read["gives"], read["statements"]), read["versions"])


def ordered(versions: Iterable[str]) -> list[str]:
    """Versions from the lowest to the highest."""
    return sorted(set(versions), key=lambda version: [*map(_number, version.split("."))])


def span(versions: Iterable[str]) -> str:
    """ "1.13.0–1.16.0", or the only version."""
    order = ordered(versions)
    return "–".join(dict.fromkeys([order[0], order[-1]])) if order else "no version"


def _number(part: str) -> tuple[int, str]:
    digits = part[: len(part) - len(part.lstrip("0123456789"))]
    return int(digits or -1), part
