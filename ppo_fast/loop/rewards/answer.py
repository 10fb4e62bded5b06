"""Verifiable answers: whether a completion ends with the answer of its row."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from typing import Any

_MARKED = re.compile(r"####[ \t]*(.+)")  # GSM8K's mark (Cobbe et al. 2021)
_SAID = re.compile(r"answer(?:\s+is)?\s*[:=]?\s*(.+)", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*)?\.?\d+(?:[eE][-+]?\d+)?(?:/\d+)?%?")


def answer(prompts: list[Any], completions: list[str], answer: list[Any]) -> list[float]:
    r"""1 where the completion's answer is that of the column `answer`, 0 where it is not.

    The completion's answer is the last \boxed{...}; without one what stands behind the last
    "####", or else behind the last "answer", to the end of its line; else, against a number, the
    last number, and against a text the whole completion. Numbers are equal by value (1,000 and
    1e3; 1/2 and 0.5; 50% and 0.5), texts up to case, blanks and a full stop at the end. A number
    is looked for within what was found: "18 dollars" is 18.

    A row without an answer (None) gets NaN, which drops the sample.
    """
    return [
        float("nan") if wanted is None else float(_equal(text, str(wanted)))
        for text, wanted in zip(completions, answer, strict=True)
    ]


def _equal(text: str, wanted: str) -> bool:
    wanted = boxed(wanted) or _last(_MARKED, wanted) or wanted
    found = boxed(text) or _last(_MARKED, text) or _last(_SAID, text) or text
    value = _value(wanted)
    if value is None:
        return _normalised(found) == _normalised(wanted)
    numbers = _NUMBER.findall(found)
    return bool(numbers) and _value(numbers[-1]) == value


def boxed(text: str) -> str | None:
    r"""The content of the last whole \boxed{...}, None without one."""
    start = text.rfind("\\boxed{")
    while start >= 0:
        depth, begin = 0, start + len("\\boxed{")
        for end in range(begin - 1, len(text)):
            depth += (text[end] == "{") - (text[end] == "}")
            if depth == 0:
                return text[begin:end]
        start = text.rfind("\\boxed{", 0, start)
    return None


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    found = pattern.findall(text)
    return found[-1] if found else None


def _value(text: str) -> Decimal | None:
    """A number's value, of "1,000", "1/2", "50%" or "$3" too; None for what is none."""
    plain = text.strip().strip("$").rstrip(".").replace(",", "")
    percent = plain.endswith("%")
    top, slash, bottom = plain.rstrip("%").partition("/")
    try:
        value = Decimal(top) / (Decimal(bottom) if slash else 1)
    except (InvalidOperation, ZeroDivisionError):
        return None
    if not value.is_finite():
        return None
    return value / 100 if percent else value


def _normalised(text: str) -> str:
    return " ".join(text.split()).rstrip(".").casefold()
