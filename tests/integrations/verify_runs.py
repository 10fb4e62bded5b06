"""Copies of a trainer's function with a fault in them, and what the referee says of those."""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Callable
from typing import Any

from ppo_fast.referee.verify import Report, verify


def copied(function: Callable[..., Any], before: str, after: str) -> Callable[..., Any]:
    """The function again from its source, with a text that it holds once replaced."""
    plain = inspect.unwrap(function)
    text = textwrap.dedent(inspect.getsource(plain))
    assert text.count(before) == 1, (plain.__qualname__, before, text.count(before))
    lines = text.replace(before, after).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("def "))
    space: dict[str, Any] = dict(vars(sys.modules[plain.__module__]))
    exec(compile("\n".join(lines[start:]), f"copy_of_{plain.__name__}.py", "exec"), space)
    return space[plain.__name__]


def keys_of(report: Report, part: str) -> set[str]:
    """Keys of the findings of one part, all of whose cases ran."""
    (found,) = [one for one in report.parts if one.name == part]
    assert not found.raised
    return {finding.key for finding in found.findings}


def keys_with(
    trainer: str,
    part: str,
    function: Callable[..., Any],
    before: str,
    after: str,
    **options: Any,
) -> set[str]:
    """Keys of the findings of a copy with a fault."""
    fault = copied(function, before, after)
    return keys_of(verify(trainer, options, function=fault, like=part), part)
