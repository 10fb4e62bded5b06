"""One run of the default model per seed, and the table of rewards and KL in docs/loop.md.

    python benchmarks/loop/train_seeds.py --seeds 0 1 2 --plot docs/reward.png

Options it does not know go to `ppo-fast train`. Each run is a process of its own; `--jobs` runs
that many at a time, the threads shared out between them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ppo_fast.loop.log.history import fifths

Log = list[dict[str, Any]]


def run(seed: int, folder: Path, options: list[str], threads: int) -> Log:
    """The log of one run."""
    command = [sys.executable, "-m", "ppo_fast", "train", "--compare", "0"]
    command += ["--seed", str(seed), "--out", str(folder), *options]
    settings = {"THP_MEM_ALLOC_ENABLE": "1", "OMP_NUM_THREADS": str(threads)}
    subprocess.run(command, check=True, env=os.environ | settings)
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def table(runs: dict[int, Log]) -> str:
    """A Markdown table, one seed a row."""
    rows = [
        "| seed | first fifth | last fifth | gain | KL to the reference (nats a sequence) |",
        "|---|---|---|---|---|",
    ]
    for seed, records in runs.items():
        first, last = fifths([r["reward"] for r in records])
        kl = fifths([r["kl"] for r in records])[1]
        rows.append(f"| {seed} | {first:+.3f} | {last:+.3f} | {last - first:+.3f} | {kl:.2f} |")
    return "\n".join(rows)


def plot(runs: dict[int, Log], path: Path) -> None:
    """The mean reward of the last five updates, a curve per seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for seed, records in runs.items():
        rewards = [r["reward"] for r in records]
        smooth = [
            sum(w) / len(w) for w in (rewards[max(0, i - 4) : i + 1] for i in range(len(rewards)))
        ]
        axes.plot(smooth, label=f"seed {seed}")
    axes.set_xlabel("update")
    axes.set_ylabel("reward, mean of five updates")
    axes.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Parse the options, run every seed, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--plot", type=Path, default=None)
    parser.add_argument("--jobs", type=int, default=1)
    chosen, options = parser.parse_known_args()
    threads = max(1, (os.cpu_count() or 1) // chosen.jobs)
    with ThreadPoolExecutor(chosen.jobs) as pool:
        logs = pool.map(
            lambda seed: run(seed, chosen.folder / str(seed), options, threads), chosen.seeds
        )
        runs = dict(zip(chosen.seeds, logs, strict=True))
    print(table(runs))
    if chosen.plot is not None:
        plot(runs, chosen.plot)
        print(f"curves: {chosen.plot}")


if __name__ == "__main__":
    main()
