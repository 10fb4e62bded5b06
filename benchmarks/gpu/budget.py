"""Budgets: what counts.json holds is the most that a later build may take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Counts = dict[str, Any]

# Of a compiler that counts.json does not know, held to the one of its kind that it does: two
# versions of Triton differ by at most this in the loops' instructions.
OTHER_COMPILER = 0.15
_ACCESSES = ("loads", "stores", "shared_loads", "shared_stores")
_PER_ELEMENT = ("instructions", "mufu", "fp64", "barriers", "shuffles")
_AT_ALL = ("instructions", "barriers", "rounds")


def exceeded(budget: Counts, found: Counts) -> list[str]:
    """Lines on what is worse in `found`; a kernel or call without a budget is one too."""
    lines = []
    for compiler, kernels in found["kernels"].items():
        known, slack = _budget_of(budget["kernels"], compiler)
        for name, kernel in kernels.items():
            if name not in known:
                lines.append(f"{compiler} {name}: has no budget")
                continue
            lines += [f"{compiler} {name}: {x}" for x in _kernel(known[name], kernel, slack)]
    for call, steps in found["calls"].items():
        if call not in budget["calls"]:
            lines.append(f"{call}: has no budget")
            continue
        lines += [f"{call}: {x}" for x in _call(budget["calls"][call], steps)]
    return lines


def _budget_of(budget: Counts, compiler: str) -> tuple[Counts, float]:
    """The counts of that compiler, or of the newest of its kind and some slack."""
    if compiler in budget:
        return budget[compiler], 0.0
    kind = compiler.split()[0]
    alike = [name for name in budget if name.split()[0] == kind]
    newest = max(alike, key=lambda name: [int(x) for x in name.split()[1].split(".")], default="")
    return budget.get(newest, {}), OTHER_COMPILER


def _kernel(budget: Counts, found: Counts, slack: float) -> Iterator[str]:
    had, has = (x["resident"] * x["threads"] for x in (budget, found))
    if has < had * (1 - 2 * slack):
        yield f"{has} threads are resident, not {had}"
    if found["stack"] > budget["stack"]:
        yield f"{found['stack']} bytes of stack, not {budget['stack']}"
    for part in ("once", "last_block", "around"):
        yield from _stretch(part, budget.get(part, {}), found.get(part, {}), slack)
    for role, loop in budget.get("loops", {}).items():
        if role not in found.get("loops", {}):
            yield f"has no loop {role!r}"
            continue
        yield from _loop(role, loop, found["loops"][role], slack)
        if "rest" in loop and "rest" in found["loops"][role]:
            yield from _loop(f"rest of {role}", loop["rest"], found["loops"][role]["rest"], slack)


def _stretch(part: str, budget: Counts, found: Counts, slack: float) -> Iterator[str]:
    for what in _AT_ALL:
        had, has = budget.get(what, 0), found.get(what, 0)
        if has > had * (1 + slack):
            yield f"{has} {what} in {part}, not {had}"


def _loop(role: str, budget: Counts, found: Counts, slack: float) -> Iterator[str]:
    for what in _PER_ELEMENT:
        had, has = (x.get(what, 0) / x["elements"] for x in (budget, found))
        if has > had * (1 + slack):
            yield f"{has:.4g} {what} an element in {role}, not {had:.4g}"
    for what in _ACCESSES:
        had, has = (_mean_width(x.get(what, {})) for x in (budget, found))
        if has and has < had:
            yield f"{has:.3g} bytes an access of {what} in {role}, not {had:.3g}"


def _mean_width(widths: dict[str, int]) -> float:
    """Bytes of an access on average."""
    accesses = sum(widths.values())
    return sum(int(wide) * many for wide, many in widths.items()) / accesses if accesses else 0.0


def _call(budget: list[Counts], found: list[Counts]) -> Iterator[str]:
    for what, of in (
        ("launches", lambda step: step["times"]),
        ("bytes by PyTorch", lambda step: step["times"] * step["bytes"] if "torch" in step else 0),
        ("flops", _flops),
    ):
        had, has = (sum(map(of, steps)) for steps in (budget, found))
        if has > had:
            yield f"{has} {what}, not {had}"


def _flops(step: Counts) -> int:
    if "product" not in step:
        return 0
    m, n, k = step["product"]
    times: int = step["times"]
    return times * 2 * m * n * k
