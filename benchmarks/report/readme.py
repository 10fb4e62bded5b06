"""Figures for the first screen of README.md, in each language, made from results alone."""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.ops.case import Case
from benchmarks.ops.gae import GAE, GPU_GAE
from benchmarks.ops.linear_ppo_loss import GPU_LINEAR_LOSS, LINEAR_LOSS_BOTH
from benchmarks.ops.ppo_loss import GPU_PPO_LOSS, PPO_LOSS_BOTH
from benchmarks.ops.token_logprobs import GPU_LOGPROBS_FORWARD, LOGPROBS_FORWARD
from benchmarks.report import pages, tables, trainers
from benchmarks.report.results import Row, by_case

# The figure's name in the texts, its cases (of a CPU, of a GPU), and whether it is peak memory.
FIGURES = (
    ("logprobs", (LOGPROBS_FORWARD, GPU_LOGPROBS_FORWARD), False),
    ("loss", (PPO_LOSS_BOTH, GPU_PPO_LOSS), False),
    ("head", (LINEAR_LOSS_BOTH, GPU_LINEAR_LOSS), True),
    ("gae", (GAE, GPU_GAE), False),
)


class Words(NamedTuple):
    """Words of one language: the figures, the heads, the machine's line, the last line."""

    figures: dict[str, str]
    heads: list[str]
    machine: str
    loop: str
    comma: str
    no_gpu: str
    trainers: trainers.Words


ENGLISH = Words(
    figures={
        "logprobs": "log-probabilities and entropy of {} tokens, vocabulary of {}",
        "loss": "PPO loss of {} × {} tokens, with its gradients and statistics",
        "head": "peak memory of the PPO loss from hidden states, {} tokens, vocabulary of {}",
        "gae": "advantages (GAE) of {} sequences of {} tokens",
    },
    heads=["one call", "plain PyTorch", "`torch.compile`", "ppo_fast", "gain over each"],
    machine="{title}, {threads} threads, torch {torch} ([{file}](benchmarks/results/{file})):",
    loop="{} (loop over tokens, as in trainers)",
    comma=", ",
    no_gpu="No figure has been measured on a GPU yet; there are "
    "[predictions](benchmarks/README.md#gpu-goals-predicted), counted from machine code.",
    trainers=trainers.ENGLISH,
)
CHINESE = Words(
    figures={
        "logprobs": "{} 个词元的对数概率与熵，词表大小 {}",
        "loss": "{} × {} 个词元的 PPO 损失，含梯度与统计量",
        "head": "由隐藏状态计算 PPO 损失的峰值内存，{} 个词元，词表大小 {}",
        "gae": "{} 条长 {} 的序列的优势（GAE）",
    },
    heads=["一次调用", "普通 PyTorch", "`torch.compile`", "ppo_fast", "各自的倍数"],
    machine="{title}，{threads} 线程，torch {torch}（[{file}](benchmarks/results/{file})）：",
    loop="{}（训练器中逐词元的循环）",
    comma="，",
    no_gpu="目前还没有在 GPU 上测得的数据；只有根据机器码计数得出的"
    "[预测](benchmarks/README.md#gpu-goals-predicted)。",
    trainers=trainers.CHINESE,
)


def section(files: pages.Files, words: Words = ENGLISH, beside: pages.Files | None = None) -> str:
    """Text between the markers of a README: tables, and whether a GPU was measured.

    Of the CPUs, and of the GPUs, the machine measured last has a table; so has the one on which
    whole updates were measured last beside other trainers, the files of which are `beside`.
    """
    lines: list[str] = []
    for path, results in latest(files).items():
        facts = results.runs[0]
        versions = facts["versions"]["torch"]
        named = {"title": tables.title(facts), "threads": facts["threads"], "torch": versions}
        named["file"] = path.name
        cells = [words.heads, *_figures(results.rows, words)]
        if len(cells) > 1:
            lines += [words.machine.format(**named), "", *tables.markdown(cells), ""]
    for path, results in latest(beside or {}).items():
        cells = trainers.summary(results.rows, words.trainers)
        if cells:
            title = tables.title(results.runs[0])
            line = words.trainers.machine.format(title=title, file=path.name)
            lines += [line, "", *tables.markdown(cells), ""]
    if not any("gpu" in run for results in files.values() for run in results.runs):
        lines.append(words.no_gpu)
    return "\n".join(lines).rstrip()


def latest(files: pages.Files) -> pages.Files:
    """The file with the latest date in its name of each kind of device."""
    by_date = sorted(files.items(), key=lambda item: item[0].stem[-len("2026-01-31") :])
    return dict({"gpu" in results.runs[0]: (path, results) for path, results in by_date}.values())


def _figures(rows: list[Row], words: Words) -> tables.Cells:
    """A line per figure that the file has; one of a GPU's cases says so by its device."""
    blocks, lines = by_case(rows), []
    for name, cases, memory in FIGURES:
        for case in cases:
            line = _line(blocks.get(case, []), memory, words)
            if line is not None:
                lines.append([_named(name, case, words), *line])
    return lines


def _named(name: str, case: Case, words: Words) -> str:
    sizes = [f"{n:,}" for n in case.shape.dims[:2]]
    device = [] if case.device == "cpu" else ["GPU"]
    return words.comma.join([words.figures[name].format(*sizes), case.dtype, *device])


def _line(block: list[Row], memory: bool, words: Words) -> list[str] | None:
    """Cells of eager PyTorch (or the loop), `torch.compile`, the best backend, and the ratios."""
    key = "peak_mb" if memory else "median_ms"
    values = {name: row[key] for name, row in tables.timed(block).items() if row[key]}
    mine = [
        values[name] for name in tables.ours(block) if name in values and "inplace" not in name
    ]
    eager, compiled = values.get("eager"), values.get("compile")
    base = eager or values.get("loop")
    if not mine or base is None:
        return None
    gain = [f"{tables.number(peer / min(mine))}×" for peer in (base, compiled) if peer]
    first = _amount(base, memory)
    return [
        first if eager else words.loop.format(first),
        _amount(compiled, memory) if compiled else "-",
        _amount(min(mine), memory),
        ", ".join(gain),
    ]


def _amount(value: float, memory: bool) -> str:
    return f"{value:,.0f} MB" if memory else tables.duration(value)
