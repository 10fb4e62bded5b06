"""One update beside a trainer: the goals, and the tables of their rows.

A row is one side of a comparison. Beside the fields that every timed row has, it has the fastest
update (`min_ms`), the first one (`first_ms`), processor time (`cpu_ms`), the phases (`phases_ms`),
the mean reward of every update, the trainer's version and what was counted. A side whose work is
not that of the others is "red", and nothing is divided by its time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from benchmarks.ops.case import Case, Shape
from benchmarks.ops.op import Goal
from benchmarks.report import tables
from benchmarks.report.judge import Verdict, verdicts
from benchmarks.report.results import Row, by_case

OURS, BF16 = "ppo_fast", "bf16"
OP, UPDATE = "trainer", "update"
PHASES = ("rollout", "scoring", "update")
_GB = 2**10  # in the MB of a row


def case(name: str, sequences: int, new_tokens: int) -> Case:
    """The case of a comparison: `name` says the algorithm and whose body the critic has.

    Sides in fp32 are compared, and those whose names end in -bf16.
    """
    return Case(OP, UPDATE, Shape(name, (sequences, new_tokens)))


PPO_16 = case("ppo-shared", 16, 16)
PPO_64 = case("ppo-shared", 16, 64)
PPO_16_SEPARATE = case("ppo-separate", 16, 16)
GRPO_64 = case("grpo", 32, 64)


def _at_most(of: Case, against: str, must: float, aim: float | None, own: str = OURS) -> Goal:
    return Goal(of, own, against, must, aim, faster=False)


GOALS = (
    _at_most(PPO_16, "trl-ppo", 0.75, 0.6),
    _at_most(PPO_64, "trl-ppo", 0.65, 0.5),
    _at_most(PPO_64, "trl-ppo", 0.4, 0.3, f"{OURS}-{BF16}"),
    _at_most(PPO_64, f"trl-ppo-{BF16}", 0.85, None, f"{OURS}-{BF16}"),
    _at_most(GRPO_64, "trl-grpo", 0.75, 0.5),
)


class Words(NamedTuple):
    """Words of one language for the table of a README."""

    heads: list[str]
    kinds: dict[str, str]
    sizes: str
    comma: str
    seconds: str
    machine: str


ENGLISH = Words(
    heads=["one update of SmolLM2-135M, all layers", "TRL", "ppo_fast", "gain", "peak memory"],
    kinds={
        "ppo-shared": "PPO, critic on the policy's body",
        "ppo-separate": "PPO, critic with a body of its own",
        "grpo": "GRPO",
    },
    sizes="{}: {} sequences of {} new tokens",
    comma=", ",
    seconds="{} s",
    machine="Whole updates in turn with TRL, few of each, of equal work, which is counted; {title}"
    " ([{file}](benchmarks/results/trainers/{file})):",
)
CHINESE = Words(
    heads=["SmolLM2-135M 的一次更新，训练所有层", "TRL", "ppo_fast", "倍数", "峰值内存"],
    kinds={
        "ppo-shared": "PPO，价值头接在策略模型上",
        "ppo-separate": "PPO，价值模型独立",
        "grpo": "GRPO",
    },
    sizes="{}：{} 条序列，各 {} 个新词元",
    comma="，",
    seconds="{} 秒",
    machine="与 TRL 轮流执行的完整更新（次数不多），双方工作量相同且经过计数；{title}"
    "（[{file}](benchmarks/results/trainers/{file})）：",
)


def found(rows: list[Row]) -> list[Verdict]:
    """Verdicts on the goals of the comparisons in which all did the same work."""
    good = [row for block in by_case(rows).values() if _equal(block) for row in block]
    return verdicts(good, [goal for goal in GOALS if goal.case in by_case(good)])


def _equal(block: Iterable[Row]) -> bool:
    return all(row["status"] == "ok" for row in block)


def _ours(provider: str) -> bool:
    return provider.startswith(OURS)


def _precision(provider: str) -> str:
    return BF16 if provider.endswith(f"-{BF16}") else "fp32"


def _name(of: Case, words: Words = ENGLISH) -> str:
    kind = words.kinds.get(of.shape.name, of.shape.name)
    return words.sizes.format(kind, *of.shape.dims)


def _seconds(milliseconds: float) -> str:
    return tables.number(milliseconds / 1e3)


def cells(block: list[Row]) -> tables.Cells:
    """A line per side: seconds an update, where they go, memory, reward, and ours over theirs."""
    timed, equal = tables.timed(block), _equal(block)
    own = [row for name, row in timed.items() if _ours(name)]
    heads = ["", "s, median", "least", "first", "processor s"]
    heads += [*PHASES, "peak GiB", "reward, first", "last", "updates"]
    lines = [[*heads, *(f"{row['provider']} over it" for row in own)]]
    for name, row in timed.items():
        times = (row[key] for key in ("median_ms", "min_ms", "first_ms", "cpu_ms"))
        ratios = (tables.number(other["median_ms"] / row["median_ms"]) + "×" for other in own)
        lines.append(
            [
                f"{name} {row['version']}",
                *map(_seconds, times),
                *(_seconds(row["phases_ms"][phase]) for phase in PHASES),
                tables.number(row["peak_mb"] / _GB),
                *(f"{row['rewards'][at]:.3f}" for at in (0, -1)),
                str(row["samples"]),
                *(["-"] * len(own) if _ours(name) or not equal else ratios),
            ]
        )
    return lines if timed else []


def section(rows: list[Row]) -> Iterator[str]:
    """Lines of benchmarks/README.md: a table for each comparison, and the goals."""
    for of, block in by_case(rows).items():
        yield from (f"**{_name(of)}**", "")
        table = cells(block)
        if table:
            yield from (*tables.markdown(table), "")
        yield from (f"- {name}: `{note}`" for name, note in tables.notes(block))
        if tables.notes(block):
            yield ""
    goals = found(rows)
    if goals:
        yield from (*tables.markdown(tables.goal_cells(goals)), "")


def summary(rows: list[Row], words: Words) -> tables.Cells:
    """Heads and a line per comparison and precision for a README; none for unequal work."""
    lines = []
    for of, block in by_case(rows).items():
        timed = tables.timed(block) if _equal(block) else {}
        peers = {_precision(name): row for name, row in timed.items() if not _ours(name)}
        for name, own in timed.items():
            if not _ours(name) or _precision(name) not in peers:
                continue
            peer = peers[_precision(name)]
            memory = [tables.number(row["peak_mb"] / _GB) for row in (peer, own)]
            lines.append(
                [
                    f"{_name(of, words)}{words.comma}{_precision(name)}",
                    *(words.seconds.format(_seconds(row["median_ms"])) for row in (peer, own)),
                    f"{tables.number(peer['median_ms'] / own['median_ms'])}×",
                    f"{memory[0]} → {memory[1]} GiB",
                ]
            )
    return [words.heads, *lines] if lines else []


def terminal(rows: list[Row]) -> list[str]:
    """The tables for a terminal."""
    out: list[str] = []
    for of, block in by_case(rows).items():
        out += ["", _name(of), *("  " + line for line in tables.aligned(cells(block)))]
        out += [f"  {name}: {note}" for name, note in tables.notes(block)]
    goals = found(rows)
    return [*out, "", *tables.verdict_table(goals)] if goals else out
