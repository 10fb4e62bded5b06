"""Curves and table of docs/tasks.md from the folders of finished runs.

    python benchmarks/loop/train_seeds.py --task qa --folder runs/tasks/qa
    python -m benchmarks.loop.task_page runs/tasks

Reads runs/tasks/NAME/SEED, adds the curves to those in docs/tasks/curves.json,
draws docs/tasks/NAME.png, writes docs/tasks/NAME.html as `ppo-fast report` would, and the table
between the page's markers.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from ppo_fast.loop.log.history import fifths
from ppo_fast.report import write_report

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE, CURVES = DOCS / "tasks.md", DOCS / "tasks" / "curves.json"
BEGIN, END = "<!-- table:begin -->\n", "<!-- table:end -->"

Curves = dict[str, dict[str, Any]]


def collect(folder: Path) -> Curves:
    """The runs under `folder`/NAME/SEED: task, reward, and each seed's rewards, KL, seconds."""
    found: Curves = {}
    for path in sorted(folder.glob("*/*/log.jsonl")):
        config = json.loads((path.parent / "config.json").read_text())
        records = [json.loads(line) for line in path.read_text().splitlines()]
        entry = found.setdefault(
            path.parent.parent.name,
            {
                "task": _task(config),
                "reward": config["reward"].partition(":")[2] or config["reward"],
                "seeds": {},
            },
        )
        entry["seeds"][path.parent.name] = {
            "rewards": [round(r["reward"], 4) for r in records],
            "kl": [round(r["kl"], 3) for r in records],
            "seconds": round(sum(sum(r["seconds"].values()) for r in records)),
        }
    return found


def _task(config: dict[str, Any]) -> str:
    """A run's task or file, and its baseline where it has no critic."""
    name = Path(config["data"]).name if config.get("data") else str(config["task"])
    advantages = config.get("advantages", "gae")
    return name if advantages == "gae" else f"{name} ({advantages})"


def gain(entry: dict[str, Any]) -> tuple[float, float, float, float]:
    """Mean of the seeds' first and of their last fifths, their difference, and the spread.

    The spread is the larger of the two ranges (largest minus smallest) over the seeds.
    """
    outer = [fifths(seed["rewards"]) for seed in entry["seeds"].values()]
    first, last = ([pair[i] for pair in outer] for i in (0, 1))
    a, b = statistics.mean(first), statistics.mean(last)
    return a, b, b - a, max(max(first) - min(first), max(last) - min(last))


def table(curves: Curves) -> str:
    """A Markdown table, one run a row."""
    rows = [
        "| run | task, reward | seeds | updates | first | last | gain | spread | KL | s | page |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for name, entry in sorted(curves.items()):
        seeds = list(entry["seeds"].values())
        first, last, gained, spread = gain(entry)
        kl = statistics.mean(fifths(seed["kl"])[1] for seed in seeds)
        took = max(seed["seconds"] for seed in seeds)
        cells = [
            f"[{name}](tasks/{name}.png)",
            f"{entry['task']}, {entry['reward']}",
            str(len(seeds)),
            str(len(seeds[0]["rewards"])),
            f"{first:+.3f}",
            f"{last:+.3f}",
            f"{gained:+.3f}",
            f"{spread:.3f}" if len(seeds) > 1 else "-",
            f"{kl:.1f}",
            str(took),
            f"[report](tasks/{name}.html)",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def plot(entry: dict[str, Any], path: Path) -> None:
    """The mean reward of the last three updates, a curve per seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 2.8), layout="constrained")
    axes = figure.subplots()
    for seed, run in entry["seeds"].items():
        rewards = run["rewards"]
        smooth = [statistics.mean(rewards[max(0, i - 2) : i + 1]) for i in range(len(rewards))]
        axes.plot(smooth, label=f"seed {seed}")
    axes.set_xlabel("update")
    axes.set_ylabel("reward, mean of three")
    axes.set_title(f"task {entry['task']}, reward {entry['reward']}", fontsize="medium")
    axes.legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=80)


def written(page: str, curves: Curves) -> str:
    """The page with its table written anew."""
    head, rest = page.split(BEGIN)
    return head + BEGIN + table(curves) + END + rest.split(END)[1]


def main() -> None:
    """Read the runs, keep their curves, draw them and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    fresh = collect(folder)
    kept = json.loads(CURVES.read_text()) if CURVES.exists() else {}
    curves = kept | fresh
    CURVES.parent.mkdir(parents=True, exist_ok=True)
    CURVES.write_text(json.dumps(curves, separators=(",", ":"), sort_keys=True) + "\n")
    for name, entry in fresh.items():
        plot(entry, CURVES.parent / f"{name}.png")
        runs = [folder / name / seed for seed in entry["seeds"]]
        write_report(runs, CURVES.parent / f"{name}.html")
    PAGE.write_text(written(PAGE.read_text(), curves))


if __name__ == "__main__":
    main()
