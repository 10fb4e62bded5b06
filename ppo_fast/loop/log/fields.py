"""Fields of a run's JSON lines, checked as they are read.

Each check returns the value, or raises a `FieldError` that names the field and what it holds.
"""

from __future__ import annotations

import json
import math
from numbers import Real
from typing import Any

Record = dict[str, Any]
# A float holds every whole number up to here.
_LARGEST_UPDATE = 2**53
# No run lasts longer (thirty thousand years), and sums of such numbers stay finite.
_MOST_SECONDS = 1e12
_DEPTH = 50


class FieldError(ValueError):
    """A line that is no JSON object, or a field that does not hold what it should."""


def parsed(line: bytes) -> Record:
    """The JSON object of a line, or of a whole file, in UTF-8."""
    try:
        found = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_once)
    except RecursionError:
        raise FieldError("not JSON that can be read: it is nested too deeply") from None
    except ValueError as error:
        raise FieldError(f"not JSON ({error})") from None
    if not isinstance(found, dict):
        raise FieldError(f"must be a JSON object, got {received(found)}")
    if _deeper(found, _DEPTH):
        raise FieldError(f"not JSON that can be read: it is nested more than {_DEPTH} deep")
    return found


def number(record: Record, name: str) -> float:
    """A number; NaN where the record lacks it, or has it as null or beyond any float."""
    value = record.get(name)
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, Real):
        raise FieldError(f"{name} must be a number or null, got {received(value)}")
    try:
        found = float(value)
    except OverflowError:
        return math.nan
    return found if math.isfinite(found) else math.nan


def count(record: Record, name: str) -> int:
    """A whole number that no float rounds, such as that of an update."""
    value = record.get(name)
    if type(value) is not int or not 0 <= value < _LARGEST_UPDATE:
        raise FieldError(f"{name} must be a whole number from 0 to 2**53, got {_in(record, name)}")
    return value


def text(record: Record, name: str) -> str:
    """A text that must be there."""
    value = record.get(name)
    if not isinstance(value, str):
        raise FieldError(f"{name} must be a text, got {_in(record, name)}")
    return value


def texts(record: Record, name: str) -> dict[Any, str]:
    """An object of texts; an empty one where the record lacks it."""
    found = _object(record, name)
    for key, value in found.items():
        if not isinstance(value, str):
            raise FieldError(f"{name}[{received(key)}] must be a text, got {received(value)}")
    return found


def seconds(record: Record, name: str) -> dict[str, float]:
    """Seconds by phase; an empty object where the record lacks it."""
    found = _object(record, name)
    for key, value in found.items():
        if type(value) not in (int, float) or not 0 <= value <= _MOST_SECONDS:
            raise FieldError(
                f"{name}[{received(key)}] must be a number from 0 to {_MOST_SECONDS:g},"
                f" got {received(value)}"
            )
    return {key: float(value) for key, value in found.items()}


def received(value: Any) -> str:
    """A value as an error shows it: control characters escaped, and not at any length."""
    shown = ascii(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _once(pairs: list[tuple[str, Any]]) -> Record:
    """An object, refused where a field is there twice: which one counts is nowhere said."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{received(twice)} is there more than once")
    return found


def _in(record: Record, name: str) -> str:
    return received(record[name]) if name in record else "nothing"


def _object(record: Record, name: str) -> dict[Any, Any]:
    value = record.get(name, {})
    if not isinstance(value, dict):
        raise FieldError(f"{name} must be an object, got {received(value)}")
    return value


def _deeper(value: Any, left: int) -> bool:
    if not isinstance(value, (dict, list)):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return left == 0 or any(_deeper(part, left - 1) for part in inner)
