"""Generator of the codes for C++ and Triton: `python -m ppo_fast._boundary.emit [--check]`.

Writes `csrc/options.h` and `kernels/options.py` from the tables of `schema.py` and `_results.py`.
`--check` writes nothing and fails if either is out of date.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from ppo_fast._boundary.schema import ENUM_CODES
from ppo_fast._results import N_STATS, N_SUMS, STATS_FIELDS

_ROOT = Path(__file__).resolve().parents[2]
_COMMAND = "python -m ppo_fast._boundary.emit"
_WIDTH = 99

_CPP = """\
// Codes of the options, and slots of the statistics.
// Written by `{command}`.
#pragma once

namespace ppo {{

{enums}

enum Stat : int {{
{stats}
}};

}}  // namespace ppo
"""

_PYTHON = '''\
"""Codes of the options as Triton constants. Written by `{command}`."""

import triton.language as tl

{codes}

# The statistics: N_SUMS sums, then the smallest and the largest ratio.
N_STATS = tl.constexpr({n_stats})
N_SUMS = tl.constexpr({n_sums})
'''


def emitted() -> dict[str, str]:
    """Path in the repository -> text."""
    return {"csrc/options.h": _cpp(), "kernels/options.py": _python()}


def stale(root: Path) -> list[str]:
    """Paths whose text is not what would be written."""
    return [path for path, text in emitted().items() if (root / path).read_text() != text]


def _cpp() -> str:
    enums = "\n".join(_cpp_enum(name, options) for name, options in ENUM_CODES.items())
    names = [*STATS_FIELDS, "n_stats"]
    stats = "\n".join(f"  k{name.title().replace('_', '')}," for name in names)
    return _CPP.format(command=_COMMAND, enums=enums, stats=stats)


def _cpp_enum(name: str, options: tuple[str, ...]) -> str:
    values = [option.replace("-", "_") for option in options]
    line = f"enum class {name} : int {{ {', '.join(values)} }};"
    if len(line) <= _WIDTH:
        return line
    return "\n".join([f"enum class {name} : int {{", *(f"  {value}," for value in values), "};"])


def _python() -> str:
    blocks = []
    for name, options in ENUM_CODES.items():
        prefix = re.sub("(?<=[a-z])(?=[A-Z])", "_", name).upper()
        values = [option.upper().replace("-", "_") for option in options]
        lines = [f"{prefix}_{v} = tl.constexpr({code})" for code, v in enumerate(values)]
        blocks.append("\n".join(lines))
    codes = "\n\n".join(blocks)
    return _PYTHON.format(command=_COMMAND, codes=codes, n_stats=N_STATS, n_sums=N_SUMS)


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
