"""Generator of the codes for C++ and Triton: `python -m ppo_fast._boundary.emit [--check]`.

Writes `csrc/codes.h` and `kernels/codes.py` from the tables of `schema.py`, `options.py` and
`_results.py`.
`--check` writes nothing and fails if either is out of date.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from ppo_fast._boundary.options import PACKED
from ppo_fast._boundary.schema import CPU_ENUM_CODES, ENUM_CODES
from ppo_fast._results import N_STATS, N_SUMS, ROLLOUT_FIELDS, STATS_FIELDS

_ROOT = Path(__file__).resolve().parents[2]
_COMMAND = "python -m ppo_fast._boundary.emit"
_WIDTH = 99

_CPP = """\
// Codes of the options, places of the losses' numbers, and slots of the statistics.
// Written by `{command}`.
#pragma once

namespace ppo {{

{enums}

{packed}

enum Stat : int {{
{stats}
}};

}}  // namespace ppo
"""

_PYTHON = '''\
"""Codes of the options for Triton. Written by `{command}`."""

from typing import NamedTuple

import triton.language as tl

{codes}

# The statistics: N_SUMS sums, then the smallest and the largest ratio.
N_STATS = tl.constexpr({n_stats})
N_SUMS = tl.constexpr({n_sums})


{packed}
'''


def emitted() -> dict[str, str]:
    """Path in the repository -> text."""
    return {"csrc/codes.h": _cpp(), "kernels/codes.py": _python()}


def stale(root: Path) -> list[str]:
    """Paths whose text is not what would be written."""
    return [path for path, text in emitted().items() if (root / path).read_text() != text]


def _cpp() -> str:
    codes = {**ENUM_CODES, **CPU_ENUM_CODES}
    enums = "\n".join(_cpp_enum(name, options) for name, options in codes.items())
    orders = {name: fields for name, (fields, _) in PACKED.items()}
    orders["RolloutFields"] = ROLLOUT_FIELDS
    packed = "\n".join(_cpp_packed(name, fields) for name, fields in orders.items())
    names = [*STATS_FIELDS, "n_stats"]
    stats = "\n".join(f"  k{name.title().replace('_', '')}," for name in names)
    return _CPP.format(command=_COMMAND, enums=enums, packed=packed, stats=stats)


def _cpp_enum(name: str, options: tuple[str, ...]) -> str:
    return _enumerators(f"enum class {name} : int", [x.replace("-", "_") for x in options])


def _cpp_packed(name: str, fields: tuple[str, ...]) -> str:
    enumerators = _enumerators("enum : int", [*fields, "count"], indent="  ")
    return f"struct {name} {{\n{enumerators}\n}};"


def _enumerators(head: str, values: list[str], indent: str = "") -> str:
    line = f"{indent}{head} {{ {', '.join(values)} }};"
    if len(line) <= _WIDTH:
        return line
    lines = [f"{head} {{", *(f"  {value}," for value in values), "};"]
    return "\n".join(indent + x for x in lines)


def _python() -> str:
    blocks = []
    for name, options in ENUM_CODES.items():
        prefix = re.sub("(?<=[a-z])(?=[A-Z])", "_", name).upper()
        values = [option.upper().replace("-", "_") for option in options]
        lines = [f"{prefix}_{v} = tl.constexpr({code})" for code, v in enumerate(values)]
        blocks.append("\n".join(lines))
    codes = "\n\n".join(blocks)
    packed = "\n\n\n".join(_python_packed(name, *row) for name, row in PACKED.items())
    numbers = {"n_stats": N_STATS, "n_sums": N_SUMS}
    return _PYTHON.format(command=_COMMAND, codes=codes, packed=packed, **numbers)


def _python_packed(name: str, fields: tuple[str, ...], kind: str) -> str:
    loss, vector = re.findall("[A-Z][a-z]+", name)
    text = f"`{vector.lower()}` of a {loss.lower()} loss, in order."
    lines = [f"class {name}(NamedTuple):", f'    """{text}"""', ""]
    return "\n".join([*lines, *(f"    {field}: {kind}" for field in fields)])


def main(argv: list[str] | None = None, root: Path = _ROOT) -> int:
    """Write both files, or name those that are out of date."""
    parser = argparse.ArgumentParser(prog=_COMMAND, description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if out of date")
    if parser.parse_args(argv).check:
        old = stale(root)
        if old:
            print(f"out of date: {', '.join(old)}; run `{_COMMAND}`", file=sys.stderr)
        return int(bool(old))
    for path, text in emitted().items():
        (root / path).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
