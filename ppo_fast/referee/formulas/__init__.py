"""Formulas of the papers in fp64, and the readings of them that trainers are known for.

A formula is a frozen dataclass. Its fields are a reading: their defaults, or what a trainer's
configuration says of them, are the paper's. `exact(batch, eps)` evaluates it in fp64, gradients by
autograd; `changes()` lists other readings, each with a sentence that names it. The arithmetic is
PyTorch's and shares no code with the ops.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor


class Exact(NamedTuple):
    """One output of a formula, fp64.

    A rounding of its computation reaches at most `size` times the precision's spacing; `slack` is
    what may differ besides, at a kink whose gradient is not unique. `keep`: where it is defined.
    """

    value: Tensor
    size: Tensor
    slack: Tensor | float = 0.0
    keep: Tensor | None = None


class Change(NamedTuple):
    """Another reading of a formula: the fields that it sets, and a sentence that names it."""

    words: str
    fields: dict[str, Any]
    key: str


class Formula(Protocol):
    """A formula of one part of a trainer."""

    part: ClassVar[str]

    @property
    def paper(self) -> str:
        """Its source."""
        ...

    def exact(self, batch: Any, eps: float) -> dict[str, Exact]:
        """Outputs by name; `eps` is the spacing of the precision that is judged."""
        ...

    def changes(self) -> list[Change]:
        """Other readings that differ from this one."""
        ...


class Reading:
    """Base of the formulas: changed copies, and the changes that are not what is there already."""

    def changed(self, fields: dict[str, Any]) -> Self:
        """A copy with these fields."""
        return replace(self, **fields)  # type: ignore[type-var]

    def others(self, changes: list[Change]) -> list[Change]:
        """The changes that alter this reading."""
        return [
            change
            for change in changes
            if any(getattr(self, name) != value for name, value in change.fields.items())
        ]


# Readings of a mask that take a token too many or too few, over the right count.
SHIFTED = ("longer", "shorter")


def counted(mask: Tensor, reading: str) -> Tensor:
    """The slots that count by a reading of the mask."""
    if reading == "ignore":
        return torch.ones_like(mask)
    none = torch.zeros_like(mask[:, :1])
    if reading == "longer":
        return mask | torch.cat([none, mask[:, :-1]], 1)
    return mask & torch.cat([mask[:, 1:], none], 1) if reading == "shorter" else mask


def counting(mask: Tensor, reading: str) -> Tensor:
    """The slots of a denominator by a reading of the mask."""
    return mask if reading in SHIFTED else counted(mask, reading)


def kept(x: Tensor, keep: Tensor, mask: str) -> Tensor:
    """`x` with 0 in masked slots where the mask is a select, as it is elsewhere."""
    return torch.where(keep, x, 0.0) if mask in ("select", *SHIFTED) else x


MASKS = (
    Change(
        "mask: masked slots are multiplied by 0, not left out; a NaN or inf there reaches the sum",
        {"mask": "multiply"},
        "mask.multiply",
    ),
    Change(
        "mask: masked slots are left out of the sum alone; a NaN or inf there still reaches the"
        " gradient",
        {"mask": "late"},
        "mask.late",
    ),
    Change(
        "mask: ignored, masked slots count like tokens",
        {"mask": "ignore"},
        "mask.ignored",
    ),
    Change(
        "mask: the token after each sequence's last counts too",
        {"mask": "longer"},
        "mask.longer",
    ),
    Change("mask: each sequence's last token does not count", {"mask": "shorter"}, "mask.shorter"),
)
