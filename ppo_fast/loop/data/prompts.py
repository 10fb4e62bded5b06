"""Prompts with their columns, and batches of them in a seeded order."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from ppo_fast.loop.values import require_text, shown

Messages = list[dict[str, Any]]
Columns = dict[str, list[Any]]


class Row(NamedTuple):
    """One prompt, a text or a chat's messages, and what else is known of it, by column."""

    prompt: str | Messages
    columns: Mapping[str, Any] = MappingProxyType({})


class Prompt(NamedTuple):
    """A row, and the text of it that the model reads."""

    text: str
    row: Row


def columns_of(rows: list[Row]) -> Columns:
    """The values of each column that any of the rows has, None where one has none."""
    names = dict.fromkeys(name for row in rows for name in row.columns)
    return {name: [row.columns.get(name) for row in rows] for name in names}


def as_rows(prompts: Iterable[Any], field: str = "prompt") -> list[Row]:
    """Rows of texts, of lists of messages, or of mappings with one as `field` and with columns.

    Raises ValueError with the position of one that is none of these.
    """
    # These would be read letter by letter, or by the names of a data frame's columns.
    if isinstance(prompts, (str, bytes, Mapping)) or hasattr(prompts, "columns"):
        raise ValueError(f"prompts must be a list of texts or rows, got {shown(prompts)}")
    rows = [as_row(f"prompts[{i}]", prompt, field) for i, prompt in enumerate(prompts)]
    if not rows:
        raise ValueError("prompts must not be empty, got 0 prompts")
    return rows


def as_row(name: str, value: Any, field: str) -> Row:
    """`value` as a row; otherwise a ValueError with `name`."""
    if isinstance(value, Row):
        return value
    if not isinstance(value, Mapping):
        return Row(_checked_prompt(name, value))
    if field not in value:
        have = ", ".join(map(str, value)) or "none"
        raise ValueError(f"{name} must have the field {field!r}, got a row with the fields {have}")
    for key in value:
        require_text(f"{name}: the name of a field", key)
    columns = {key: entry for key, entry in value.items() if key != field}
    return Row(_checked_prompt(f"{name}: {field}", value[field]), columns)


def _checked_prompt(name: str, value: Any) -> str | Messages:
    """A text, or messages with a role and a content each; otherwise a ValueError with `name`."""
    if not isinstance(value, (list, tuple)):
        return require_text(name, value)
    if not value:
        raise ValueError(f"{name} must have at least one message, got []")
    for i, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise ValueError(f"{name}[{i}] must be a message, got {shown(message)}")
        for key in ("role", "content"):
            require_text(f"{name}[{i}][{key!r}]", message.get(key))
    return [dict(message) for message in value]


class PromptStream:
    """Endless batches of prompts in an order drawn from `seed`, each prompt once per pass."""

    def __init__(self, prompts: list[Prompt], seed: int) -> None:
        self._prompts = prompts
        self._random = random.Random(seed)
        self._order: list[int] = []

    def next(self, n: int) -> list[Prompt]:
        """The next `n` prompts."""
        while len(self._order) < n:
            again = list(range(len(self._prompts)))
            self._random.shuffle(again)
            self._order += again
        taken, self._order = self._order[:n], self._order[n:]
        return [self._prompts[i] for i in taken]

    def digest(self) -> str:
        """The sha256 of all prompts' texts."""
        return _sha256([prompt.text for prompt in self._prompts])

    def columns_digest(self) -> str:
        """The sha256 of all columns."""
        return _sha256(columns_of([prompt.row for prompt in self._prompts]))

    def state_dict(self) -> dict[str, Any]:
        """Position in the stream: prompts left of this pass, and the generator of later ones."""
        return {"order": self._order, "random": self._random.getstate()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, of the same prompts."""
        version, internal, gauss = state["random"]
        self._order = state["order"]
        self._random.setstate((version, tuple(internal), gauss))


def _sha256(values: Any) -> str:
    """Over JSON; of a value that it has no form for, the kind counts alone."""
    text = json.dumps(values, default=lambda value: type(value).__qualname__)
    return hashlib.sha256(text.encode()).hexdigest()
