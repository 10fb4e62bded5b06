"""PTX text as data: parameters, constants in memory and instructions of one entry kernel.

It reads the PTX that Triton emits, not the whole language: a line that it does not understand is
an error. The language is NVIDIA's "Parallel Thread Execution ISA".
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

_GUARD = re.compile(r"@(!?)(%p\d+)\s+(.*)", re.DOTALL)
_LABEL = re.compile(r"(\$L\w+):\s*")
_PARAM = re.compile(r"\.param\s+\.(\w+)(?:\s+\.ptr[^,)]*?)?\s+(\w+_param_\d+)")
_CONSTANT = re.compile(r"\.global \.align \d+ \.b8 ([\w$]+)\[(\d+)\](?: = \{([^}]*)\})?")
_ADDRESS = re.compile(r"\[\s*([%\w.$]+)\s*(?:\+\s*(-?\w+)\s*)?\]")
_IGNORED = (".loc", ".reg", ".file", ".pragma", ".section")


class Instruction(NamedTuple):
    """`@guard op operands`, op split at its dots."""

    guard: str | None
    negated: bool
    op: tuple[str, ...]
    operands: tuple[str, ...]
    text: str

    @property
    def name(self) -> str:
        return self.op[0]


@dataclass
class Program:
    """An entry kernel."""

    name: str
    params: list[tuple[str, str]]  # (type, name)
    threads: int
    constants: dict[str, bytes]  # by the name of their memory
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # -> index of an instruction


def parse(text: str) -> Program:
    """The entry kernel of a PTX text."""
    start = text.index(".entry")
    head, _, rest = text[start:].partition("{")
    name = re.match(r"\.entry\s+(\w+)", head)
    threads = re.search(r"\.reqntid\s+(\d+)", head)
    if name is None or threads is None:
        raise ValueError(f"PTX must name an entry and .reqntid, got {head[:200]!r}")
    constants = {
        m[1]: bytes(map(int, m[3].split(","))) if m[3] else bytes(int(m[2]))
        for m in _CONSTANT.finditer(text[:start])
    }
    program = Program(name[1], _PARAM.findall(head), int(threads[1]), constants)
    body = rest[: rest.index("$L__func_end")]
    for line in body.splitlines():
        _add_line(program, line.partition("//")[0].strip())
    return program


def _add_line(program: Program, line: str) -> None:
    while label := _LABEL.match(line):
        program.labels[label[1]] = len(program.code)
        line = line[label.end() :]
    if line.startswith(_IGNORED):
        return
    for part in line.split(";"):
        statement = part.strip()
        if statement and statement not in ("{", "}"):
            program.code.append(instruction(statement))


def instruction(text: str) -> Instruction:
    """One statement."""
    guard = _GUARD.match(text)
    negated, predicate, rest = (
        (bool(guard[1]), guard[2], guard[3]) if guard else (False, None, text)
    )
    op, *operands = rest.split(None, 1)
    if not re.fullmatch(r"[a-z][\w.:]*", op):
        raise ValueError(f"not a PTX instruction: {text!r}")
    parts = tuple(operands_of(operands[0])) if operands else ()
    return Instruction(predicate, negated, tuple(op.split(".")), parts, text)


def operands_of(text: str) -> list[str]:
    """Operands, split at the commas outside of braces and brackets."""
    return [part.strip() for part in re.split(r",(?![^{\[]*[}\]])", text)]


def members(operand: str) -> list[str]:
    """The registers of a vector operand `{a, b}`; a plain one is its own."""
    return [part.strip() for part in operand.strip("{} ").split(",")]


def address(operand: str) -> tuple[str, int]:
    """Base and offset of `[base+offset]`."""
    found = _ADDRESS.fullmatch(operand)
    if found is None:
        raise ValueError(f"not a PTX address: {operand!r}")
    return found[1], int(found[2] or "0", 0)
