"""Arithmetic of PTX on arrays of lanes: a function of the operands for each instruction.

IEEE operations round as numpy does. Approximations (ex2, lg2, rcp, rsqrt, sqrt) are computed in
fp64 and rounded once, which is closer than a GPU's; `.ftz` flushes denormals as a GPU does.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from ptx_parse import Instruction
from ptx_registers import TYPES, Values

Function = Callable[..., Values]
_SMALLEST = np.float32(2.0**-126)
_COMPARE = {
    "eq": operator.eq,
    "ne": lambda a, b: (a < b) | (a > b),  # of floats ordered; integers have no other
    "lt": operator.lt,
    "lo": operator.lt,
    "le": operator.le,
    "ls": operator.le,
    "gt": operator.gt,
    "hi": operator.gt,
    "ge": operator.ge,
    "hs": operator.ge,
    "neu": operator.ne,
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: (a == a) & (b == b),
    "nan": lambda a, b: (a != a) | (b != b),
}
_COMBINE = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}
_ROUNDED = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def flushed(x: Values) -> Values:
    """fp32 with denormals as zeros of their sign."""
    return np.where(np.abs(x) < _SMALLEST, np.copysign(np.float32(0), x), x)


def _fma(a: Values, b: Values, c: Values) -> Values:
    """a * b + c, rounded once (in fp32 but for the ties that fp64 rounds first)."""
    wide = np.float64 if a.dtype == np.float32 else np.longdouble
    return (a.astype(wide) * b.astype(wide) + c.astype(wide)).astype(a.dtype)


def _divided(a: Values, b: Values) -> Values:
    """Quotient of integers towards zero; any value where the divisor is 0."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // safe
    if a.dtype.kind == "i":
        quotient += ((a % safe) != 0) & ((a < 0) != (safe < 0))
    return quotient


def _remainder(a: Values, b: Values) -> Values:
    return a - _divided(a, b) * b


def _high(a: Values, b: Values) -> Values:
    """Upper half of the product of 32-bit integers."""
    wide = np.dtype(f"{a.dtype.kind}8")
    return ((a.astype(wide) * b.astype(wide)) >> wide.type(32)).astype(a.dtype)


def _shifted_left(a: Values, n: Values) -> Values:
    bits = 8 * a.dtype.itemsize
    moved = a << np.minimum(n, bits - 1).astype(a.dtype)
    return np.where(n >= bits, a.dtype.type(0), moved)


def _shifted_right(a: Values, n: Values) -> Values:
    bits = 8 * a.dtype.itemsize
    moved = a >> np.minimum(n, bits - 1).astype(a.dtype)
    return moved if a.dtype.kind == "i" else np.where(n >= bits, a.dtype.type(0), moved)


def _field(a: Values, start: Values, length: Values) -> Values:
    """Bits [start, start + length) of 32, extended by their highest if the type is signed."""
    mask = (np.uint64(1) << length) - np.uint64(1)
    field = (a.view(np.uint32).astype(np.uint64) >> start) & mask
    if a.dtype.kind == "i":
        high = (field >> (length - np.uint64(1))) & np.uint64(1)
        field |= np.where(high == 1, ~mask, np.uint64(0))
    return field.astype(np.uint32).view(a.dtype)


def _ones(x: Values) -> Values:
    """Number of bits set, as u32."""
    octets = np.ascontiguousarray(x).view(np.uint8).reshape(len(x), -1)
    return np.unpackbits(octets, axis=1).sum(1).astype(np.uint32)


def _permuted(a: Values, b: Values, selector: Values) -> Values:
    """Bytes of (b, a), of which each nibble of the selector takes one, or its sign eight times."""
    octets = np.stack([a, b], axis=1).view(np.uint8)
    out = np.empty((len(a), 4), np.uint8)
    for k in range(4):
        nibble = (selector >> np.uint32(4 * k)) & np.uint32(15)
        octet = np.take_along_axis(octets, (nibble & 7).astype(np.int64)[:, None], axis=1)[:, 0]
        out[:, k] = np.where(nibble & 8, np.where(octet & 0x80, 0xFF, 0), octet)
    return out.view(np.uint32)[:, 0]


def _approximate(f: Function) -> Function:
    return lambda x: f(x.astype(np.float64)).astype(x.dtype)


_INTEGER: dict[str, Function] = {
    "add": operator.add,
    "sub": operator.sub,
    "div": _divided,
    "rem": _remainder,
    "min": np.minimum,
    "max": np.maximum,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "not": operator.invert,
    "neg": operator.neg,
    "abs": np.abs,
    "popc": _ones,
    "mad": lambda a, b, c: a * b + c,
    "prmt": _permuted,
    "mul": operator.mul,
}
_FLOAT: dict[str, Function] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "min": np.fmin,
    "max": np.fmax,
    "neg": operator.neg,
    "abs": np.abs,
    "fma": _fma,
    "copysign": lambda a, b: np.copysign(b, a),
    "ex2": _approximate(np.exp2),
    "lg2": _approximate(np.log2),
    "rcp": _approximate(np.reciprocal),
    "rsqrt": _approximate(lambda x: 1 / np.sqrt(x)),
    "sqrt": _approximate(np.sqrt),
}
_NAN_PASSES = {"min": np.minimum, "max": np.maximum}
# Instructions of which an operand has a type of its own: shifts take 32 bits of distance.
_SHIFTS: dict[str, Function] = {"shl": _shifted_left, "shr": _shifted_right}


def arithmetic(i: Instruction) -> tuple[Function, list[np.dtype[Any]]] | None:
    """The function of an arithmetic instruction and its operands' types; None for another."""
    name, kind = i.name, i.op[-1]
    dtype = TYPES.get(kind)
    if dtype is None:
        return None
    count = len(i.operands) - 1
    if name in _SHIFTS:
        return _SHIFTS[name], [dtype, TYPES["u32"]]
    if name == "bfe" and dtype.itemsize == 4:
        return _field, [dtype, TYPES["u64"], TYPES["u64"]]
    if name in ("mul", "mad") and "wide" in i.op:
        wide = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")
        if name == "mul":
            return lambda a, b: a.astype(wide) * b.astype(wide), [dtype, dtype]
        return lambda a, b, c: a.astype(wide) * b.astype(wide) + c, [dtype, dtype, wide]
    if name == "mul" and "hi" in i.op:
        return (_high, [dtype, dtype]) if dtype.itemsize == 4 else None
    table = _FLOAT if dtype.kind == "f" else _INTEGER
    f = table.get(name)
    if f is None:
        return None
    if dtype.kind == "f" and "NaN" in i.op:
        f = _NAN_PASSES[name]
    if "sat" in i.op:
        return None
    if "ftz" in i.op:
        inner = f
        f = lambda *args: flushed(inner(*map(flushed, args)))  # noqa: E731
    return f, [dtype] * count


def comparison(i: Instruction) -> tuple[Function, list[np.dtype[Any]]]:
    """setp, also of two types: `setp.lt.and.s32 p, a, b, c`."""
    dtype = TYPES[i.op[-1]]
    compare: Function = _COMPARE[i.op[1]]
    if i.op[1] == "ne" and dtype.kind != "f":
        compare = operator.ne
    if len(i.operands) == 3:
        return compare, [dtype, dtype]
    combine = _COMBINE[i.op[2]]
    return lambda a, b, c: combine(compare(a, b), c), [dtype, dtype, TYPES["pred"]]


def bf16_of(x: Values) -> Values:
    """fp32 as the bits of bfloat16, to nearest even; NaN is 0x7fff, as on a GPU."""
    bits = x.view(np.uint32)
    up = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = ((bits.astype(np.uint64) + up) >> np.uint64(16)).astype(np.uint16)
    return np.where(x != x, np.uint16(0x7FFF), rounded)


def fp32_of(bits: Values) -> Values:
    """bfloat16 bits as fp32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _integer_of(x: Values, to: np.dtype[Any]) -> Values:
    """Integers of whole floats, saturated; NaN is 0."""
    limits = np.iinfo(to)
    low, high = float(limits.min), float(limits.max)
    inside = np.where(x == x, np.clip(x.astype(np.float64), low, high), 0.0)
    out = np.where(inside >= high, 0.0, inside).astype(to)
    return np.where(inside >= high, to.type(limits.max), out)


def conversion(i: Instruction) -> tuple[Function, list[np.dtype[Any]]]:
    """cvt, of one value or of two that are packed."""
    to, source = i.op[-2], i.op[-1]
    if to in ("bf16x2", "f16x2"):
        half = bf16_of if to == "bf16x2" else lambda x: x.astype(np.float16).view(np.uint16)

        def packed(high: Values, low: Values) -> Values:
            return half(high).astype(np.uint32) << np.uint32(16) | half(low).astype(np.uint32)

        return packed, [TYPES["f32"]] * 2
    f = _converter(i, to, source)
    if "ftz" in i.op:
        return lambda x: flushed(f(x)), [TYPES[source]]
    return f, [TYPES[source]]


def _converter(i: Instruction, to: str, source: str) -> Function:
    target, given = TYPES[to], TYPES[source]
    if to == "bf16":
        return lambda x: bf16_of(x.astype(np.float32))
    if source == "bf16":
        return lambda x: fp32_of(x).astype(target)
    if given.kind == "f" and target.kind in "iu":
        whole = next(_ROUNDED[part] for part in i.op if part in _ROUNDED)
        return lambda x: _integer_of(whole(x), target)
    modes = {"rni", "rzi", "rmi", "rpi"} & set(i.op)
    if given.kind == target.kind == "f" and modes:
        return lambda x: _ROUNDED[modes.pop()](x).astype(target)
    return lambda x: x.astype(target)
