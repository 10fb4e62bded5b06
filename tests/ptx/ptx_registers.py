"""Registers of a batch of blocks: a slot for each register and each constant, a value per lane."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[Any]
Lanes = NDArray[np.int64]
Registers = list[Any]  # slot -> values of all lanes; None until written
Reader = Callable[[Registers, "Lanes | None"], Values]
Writer = Callable[[Registers, "Lanes | None", Values], None]

TYPES: dict[str, Any] = {
    **{f"u{n}": f"u{n // 8}" for n in (8, 16, 32, 64)},
    **{f"b{n}": f"u{n // 8}" for n in (8, 16, 32, 64)},
    **{f"s{n}": f"i{n // 8}" for n in (8, 16, 32, 64)},
    "f16": "f2",
    "bf16": "u2",
    "bf16x2": "u4",
    "f16x2": "u4",
    "f32": "f4",
    "f64": "f8",
    "pred": "?",
}
TYPES = {name: np.dtype(kind) for name, kind in TYPES.items()}
# Width of each kind of register: %p1, %rs2, %r3, %rd4; %f and %fd of older compilers.
_KINDS = {"p": "?", "rs": "u2", "r": "u4", "rd": "u8", "f": "u4", "fd": "u8"}
SPECIAL = ("%tid.x", "%ctaid.x", "%nctaid.x", "%laneid")
_ONE = ("%ntid.y", "%ntid.z", "%nctaid.y", "%nctaid.z")
_ZERO = ("%tid.y", "%tid.z", "%ctaid.y", "%ctaid.z")
UNWRITTEN = 0xA5A5A5A5A5A5A5A5  # in lanes that a register was not written in


class Slots:
    """Numbering of a program's registers, constants and named values."""

    def __init__(self) -> None:
        self.number: dict[Any, int] = {}
        self.dtypes: list[np.dtype[Any]] = []
        self.constants: dict[int, Any] = {}  # slot -> value of every lane
        self._filled: dict[int, dict[int, Values]] = {}  # lanes -> the constants' values

    def _slot(self, key: Any, dtype: Any) -> int:
        if key not in self.number:
            self.number[key] = len(self.dtypes)
            self.dtypes.append(np.dtype(dtype))
        return self.number[key]

    def register(self, name: str) -> int:
        """Slot of `%r1`, or of a special register."""
        if name in SPECIAL:
            return self._slot(name, "u4")
        kind = re.fullmatch(r"%([a-z]+)\d+", name)
        if kind is None or kind[1] not in _KINDS:
            raise ValueError(f"not a register: {name!r}")
        return self._slot(name, _KINDS[kind[1]])

    def named(self, name: str, dtype: Any = "u8") -> int:
        """Slot of a value that the launch gives: a parameter, or the address of a symbol."""
        return self._slot(name, dtype)

    def operand(self, text: str, dtype: np.dtype[Any]) -> int:
        """Slot of a register, of a constant of this type, or of a symbol's address."""
        if text in _ZERO or text in _ONE:
            text = str(int(text in _ONE))
        if text.startswith("%"):
            return self.register(text)
        value = constant(text, dtype)
        if value is None:
            return self.named(text, f"u{dtype.itemsize}")
        unsigned = value.view(f"u{dtype.itemsize}") if dtype.kind != "b" else value
        slot = self._slot((unsigned.item(), unsigned.dtype.str), unsigned.dtype)
        self.constants[slot] = unsigned
        return slot

    def reader(self, text: str, dtype: np.dtype[Any]) -> Reader:
        """Values of an operand, as `dtype`; a wider register gives its low bits."""
        slot = self.operand(text, dtype)
        stored = self.dtypes[slot]
        if stored == dtype:
            return lambda r, g: r[slot] if g is None else r[slot][g]
        if stored.itemsize == dtype.itemsize:
            return lambda r, g: (r[slot] if g is None else r[slot][g]).view(dtype)
        if stored.itemsize < dtype.itemsize:
            raise ValueError(f"{text} has {stored.itemsize} bytes, not {dtype.itemsize}")
        low = np.dtype(f"u{dtype.itemsize}")
        return lambda r, g: (r[slot] if g is None else r[slot][g]).astype(low).view(dtype)

    def writer(self, text: str) -> Writer:
        """Assignment to a register; a narrower value is extended by its sign or with zeros."""
        if text == "_":
            return lambda r, g, value: None
        slot = self.register(text)
        stored = self.dtypes[slot]
        signed = np.dtype(f"i{stored.itemsize}")

        def fitted(value: Values) -> Values:
            if value.dtype == stored:
                return value
            if value.dtype.itemsize == stored.itemsize and stored.kind != "b":
                return value.view(stored)
            if value.dtype.itemsize < stored.itemsize and value.dtype.kind in "ui":
                wide = value.astype(signed if value.dtype.kind == "i" else stored)
                return wide.view(stored)
            raise ValueError(f"{text} cannot hold {value.dtype}")

        def write(r: Registers, g: Lanes | None, value: Values) -> None:
            if g is None:
                r[slot] = fitted(value)
                return
            if r[slot] is None:
                unwritten = UNWRITTEN & (1 << 8 * stored.itemsize) - 1
                r[slot] = np.full(len(r[0]), unwritten).astype(stored)
            r[slot][g] = fitted(value)

        return write

    def fresh(self, lanes: int) -> Registers:
        """Registers of so many lanes, of which the constants are filled in; slot 0 is %tid.x."""
        out: Registers = [None] * len(self.dtypes)
        if lanes not in self._filled:
            self._filled[lanes] = {k: np.full(lanes, v) for k, v in self.constants.items()}
        for slot, values in self._filled[lanes].items():
            out[slot] = values
        return out


def constant(text: str, dtype: np.dtype[Any]) -> Values | None:
    """A literal as `dtype`; None if the text is a symbol."""
    if dtype.kind == "b":
        return np.bool_(text in ("1", "true", "-1")) if text in ("0", "1", "-1", "true") else None
    if text[:2] in ("0f", "0F"):
        return np.uint32(int(text[2:], 16)).view("f4" if dtype.kind == "f" else "u4")
    if text[:2] in ("0d", "0D"):
        return np.uint64(int(text[2:], 16)).view("f8" if dtype.kind == "f" else "u8")
    try:
        value = int(text.removesuffix("U"), 0)
    except ValueError:
        return None
    if dtype.kind == "f":
        raise ValueError(f"an integer for {dtype}: {text!r}")
    bits = 8 * dtype.itemsize
    return np.array(value & ((1 << bits) - 1), f"u{dtype.itemsize}").view(dtype)[()]
