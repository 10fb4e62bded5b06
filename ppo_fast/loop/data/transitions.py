"""Stored transitions: rows of JSON or parquet, each checked before anything is learnt from it."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from ppo_fast.loop.config import OptionError
from ppo_fast.loop.data.tables import Numbered, TableError, json_rows, parquet_rows
from ppo_fast.loop.values import described, is_fp32, require_text, shown, tokens_within

FIELDS = (
    "prompt",
    "prompt_tokens",
    "tokens",
    "logprobs",
    "reward",
    "truncated",
    "support_ids",
    "support_offsets",
)
_ROUNDING = 1e-3  # a log-probability of bf16 logits may come out that much above 0
Encode = Callable[[str], list[int]]


class Drawn(NamedTuple):
    """Ids that the tokens of a response were drawn from: those of token t from the t-th offset on.

    `ids` are int32, `offsets`, one more than tokens, int64; a token without ids was drawn from
    all.
    """

    ids: array[int]
    offsets: array[int]


class Transition(NamedTuple):
    """One prompt and response, with rewards.

    `logprobs`, of the policy that sampled, and `rewards` have one number per response token.
    Without a `support` every token was drawn from the whole vocabulary.
    """

    prompt: str
    prompt_tokens: list[int]
    tokens: list[int]
    logprobs: list[float]
    rewards: list[float]
    truncated: bool
    support: Drawn | None = None


class Limits(NamedTuple):
    """Bounds of the model: tokens lie in [0, vocabulary), prompt and response in `context`."""

    vocabulary: int
    context: int | None = None


@dataclass
class Transitions:
    """The good rows of a file, and the fault of each of the others."""

    rows: list[Transition] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


class TransitionsError(OptionError):
    """A file of transitions from which nothing can be learnt."""


_READERS: dict[str, Callable[[Path], Numbered]] = {
    ".jsonl": json_rows,
    ".parquet": lambda path: parquet_rows(path, FIELDS),
}


def require_readable(path: Path) -> None:
    """Raise TransitionsError for no file, or one of another suffix than is read."""
    if path.suffix not in _READERS:
        raise TransitionsError(f"transitions must be a .jsonl or .parquet file, got {path}")
    if not path.is_file():
        what = "no regular file" if path.exists() else ""
        raise TransitionsError(
            f"transitions must be a file that exists, got {path}{what and f', {what}'}"
        )


def read_transitions(path: Path, encode: Encode, limits: Limits) -> Transitions:
    """Read `path`, a .jsonl or a .parquet; `encode` makes tokens of a prompt given as text.

    A bad row becomes a fault that names file, line (of parquet: the row, from 1), field and value.

    Raises:
        TransitionsError: another suffix, no file, no row at all, or no good one.
        ModuleNotFoundError: parquet without pyarrow.
    """
    require_readable(path)
    found = Transitions()
    try:
        for line, row in _READERS[path.suffix](path):
            try:
                if isinstance(row, ValueError):
                    raise row
                found.rows.append(_checked(row, encode, limits))
            except ValueError as error:
                found.faults.append(f"{path}:{line}: {error}")
    except TableError as error:
        raise TransitionsError(f"transitions {error}") from error
    if not found.rows:
        faults = len(found.faults)
        why = f"all {faults} rows are bad, the first: {found.faults[0]}" if faults else "no rows"
        raise TransitionsError(f"transitions {path}: {why}")
    return found


def _checked(row: Any, encode: Encode, limits: Limits) -> Transition:
    """The row as a transition, or a ValueError that names field and value."""
    if not isinstance(row, dict):
        raise ValueError(f"a row must be an object with fields, got {shown(row)}")
    tokens = _tokens("tokens", row.get("tokens"), limits)
    logprobs = _numbers("logprobs", row.get("logprobs"), len(tokens))
    for i, value in enumerate(logprobs):
        if value > _ROUNDING:
            raise ValueError(f"logprobs[{i}] must be at most 0, got {value}")
    truncated = row.get("truncated")
    if truncated is not None and not isinstance(truncated, bool):
        raise ValueError(f"truncated must be true or false, got {shown(truncated)}")
    rewards = _rewards(row.get("reward"), len(tokens))
    support = _support(row.get("support_ids"), row.get("support_offsets"), len(tokens), limits)
    # The prompt last: tokenizing one may take long.
    text, prompt_tokens = _prompt(row, encode, limits, len(tokens))
    return Transition(text, prompt_tokens, tokens, logprobs, rewards, bool(truncated), support)


def _prompt(row: Any, encode: Encode, limits: Limits, after: int) -> tuple[str, list[int]]:
    """The prompt as a text and as tokens, which with `after` more fit the model's context."""
    prompt = row.get("prompt")
    whole = True
    if row.get("prompt_tokens") is not None:
        tokens = _tokens("prompt_tokens", row["prompt_tokens"], limits)
    elif isinstance(prompt, str):
        left = None if limits.context is None else limits.context - after
        try:
            tokens, whole = tokens_within(encode, require_text("prompt", prompt), left)
        except Exception as error:  # whatever a tokenizer raises, it costs this row
            if isinstance(error, ValueError):
                raise
            raise ValueError(
                f"prompt cannot be tokenized ({described(error)}), got {shown(prompt)}"
            ) from error
        tokens = _tokens("the prompt's tokens", tokens, limits)
    else:
        raise ValueError(
            f"prompt must be a text where there are no prompt_tokens, got {shown(prompt)}"
        )
    total = len(tokens) + after
    if limits.context is not None and total > limits.context:
        raise ValueError(
            f"prompt and tokens must fit the model's context of {limits.context},"
            f" got {'' if whole else 'more than '}{total}"
        )
    # Beside prompt_tokens the text is only shown; half a character has no place in a file.
    text = prompt.encode("utf-8", "replace").decode() if isinstance(prompt, str) else ""
    return text, tokens


def _tokens(name: str, value: Any, limits: Limits) -> list[int]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} must be a list of at least one token, got {shown(value)}")
    return _ids(name, value, limits)


def _ids(name: str, value: list[Any], limits: Limits) -> list[int]:
    for i, token in enumerate(value):
        if type(token) is not int or not 0 <= token < limits.vocabulary:
            raise ValueError(
                f"{name}[{i}] must be a whole number in [0, {limits.vocabulary}),"
                f" got {shown(token)}"
            )
    return value


def _support(ids: Any, offsets: Any, n: int, limits: Limits) -> Drawn | None:
    """The ids that `n` tokens were drawn from, None where there are neither ids nor offsets."""
    if ids is None and offsets is None:
        return None
    if not isinstance(ids, list):
        wanted = "a list of ids where there are support_offsets"
        raise ValueError(f"support_ids must be {wanted}, got {shown(ids)}")
    if not isinstance(offsets, list):
        wanted = "a list of whole numbers where there are support_ids"
        raise ValueError(f"support_offsets must be {wanted}, got {shown(offsets)}")
    if len(offsets) != n + 1:
        raise ValueError(
            f"support_offsets must have one more than tokens, {n + 1}, got {len(offsets)}"
        )
    _ids("support_ids", ids, limits)
    for i, offset in enumerate(offsets):
        if type(offset) is not int:
            raise ValueError(f"support_offsets[{i}] must be a whole number, got {shown(offset)}")
        if i and offset < offsets[i - 1]:
            raise ValueError(
                f"support_offsets[{i}] must be at least the one before, {offsets[i - 1]}, got"
                f" {offset}"
            )
    if (offsets[0], offsets[-1]) != (0, len(ids)):
        raise ValueError(
            f"support_offsets must be from 0 to the number of support_ids, {len(ids)}, got"
            f" {offsets[0]} to {offsets[-1]}"
        )
    for t, (first, last) in enumerate(pairwise(offsets)):
        if len(set(ids[first:last])) < last - first:
            raise ValueError(
                f"support_ids must be different for a token, got some twice at token {t}"
            )
    return Drawn(array("i", ids), array("q", offsets))


def _rewards(value: Any, n: int) -> list[float]:
    """One reward per token; a single number belongs to the last."""
    if not isinstance(value, list):
        return [0.0] * (n - 1) + _numbers("reward", [value], 1)
    rewards = _numbers("reward", value, n)
    size = sum(map(abs, rewards))  # no sum of them, discounted or not, is larger
    if not is_fp32(size):
        raise ValueError(
            f"reward must have absolute values whose sum is a finite fp32 number, got {size:g}"
        )
    return rewards


def _numbers(name: str, value: Any, n: int) -> list[float]:
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list of {n} numbers, got {shown(value)}")
    if len(value) != n:
        raise ValueError(f"{name} must have as many numbers as tokens, {n}, got {len(value)}")
    for i, number in enumerate(value):
        if type(number) not in (int, float) or not is_fp32(number):
            raise ValueError(f"{name}[{i}] must be a finite fp32 number, got {shown(number)}")
    return [float(number) for number in value]
