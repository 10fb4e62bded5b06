"""Checks of values from outside, and short texts of any value for messages."""

from __future__ import annotations

import traceback
from collections.abc import Callable

LARGEST_FP32 = (2 - 2**-23) * 2.0**127
_TRACEBACK = 4000  # characters kept of either end
_CHARACTERS_PER_TOKEN = 16  # of a first prefix; natural text has three to five
_SLACK = 64  # tokens that a cut within a word may add


def is_fp32(number: float) -> bool:
    """True if `number` is finite in fp32."""
    return abs(number) <= LARGEST_FP32


def shown(value: object, width: int = 60) -> str:
    """`repr(value)` on one line of at most `width` characters, whatever that call does."""
    try:
        text = repr(value[:width] if isinstance(value, str) else value)
    except Exception as error:  # it is the value's own code
        text = f"a {type(value).__name__} whose repr raises {type(error).__name__}"
    return one_line(text, width)


def one_line(text: str, width: int = 200) -> str:
    """`text` on one line of at most `width` characters, all of which any stream can write."""
    words = " ".join(text[: 8 * width].split())
    printable = "".join(c if c.isprintable() else repr(c)[1:-1] for c in words)
    return printable if len(printable) <= width else printable[: width - 3] + "..."


def described(error: BaseException) -> str:
    """Type and message of an exception on one line, whatever its `__str__` does."""
    try:
        text = str(error)
    except Exception as again:
        text = f"(its str raises {type(again).__name__})"
    return f"{type(error).__name__}: {one_line(text)}"


def traceback_of(error: BaseException) -> str:
    """The traceback of an exception, cut in its middle where it is very long."""
    text = "".join(traceback.format_exception(error)).rstrip()
    text = text.encode("utf-8", "backslashreplace").decode()
    if len(text) <= 2 * _TRACEBACK:
        return text
    return f"{text[:_TRACEBACK]}\n  ...\n{text[-_TRACEBACK:]}"


def require_text(name: str, value: object) -> str:
    """`value`, a text that a tokenizer takes; otherwise a ValueError with `name`."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text, got {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        near = value[max(0, error.start - 20) : error.start + 20]
        raise ValueError(
            f"{name} must be a text of whole characters, got a lone surrogate (half of a"
            f" character) at position {error.start}: {shown(near)}"
        ) from None
    return value


def tokens_within(
    encode: Callable[[str], list[int]], text: str, limit: int | None
) -> tuple[list[int], bool]:
    """The tokens of `text`, and whether these are all of them.

    A text with more than twice `limit` tokens in its beginning is not read to its end. No bound on
    its characters would say that: a tokenizer may make one token of any run of blanks or of an
    unknown word. So prefixes are tokenized, each four times the one before.
    """
    if limit is not None:
        end = _CHARACTERS_PER_TOKEN * (max(limit, 0) + _SLACK)
        while end < len(text):
            tokens = encode(text[:end])
            if len(tokens) > 2 * max(limit, 0) + _SLACK:
                return tokens, False
            end *= 4
    return encode(text), True
