"""The questions of `--task qa` as a file of one's own, and the checker that scores their answers.

    python -m benchmarks.loop.qa_rows runs/qa.jsonl
    python benchmarks/loop/train_seeds.py --folder runs/tasks/qa-grpo --data runs/qa.jsonl \
        --reward benchmarks.loop.qa_rows:checked --advantages grpo --batch 4 \
        --updates 15 --max-new-tokens 6 --train-layers 4 --lr 2e-4 --warmup 4
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ppo_fast.loop import TrainConfig
from ppo_fast.loop.tasks import load_task


def checked(prompts: list[str], completions: list[str], entry: list[Any]) -> list[float]:
    """reasoning-gym's score of each completion; `entry` is the column that its checker reads."""
    import reasoning_gym

    score = reasoning_gym.get_score_answer_fn("chain_sum")
    return [float(score(c.strip(), e)) for c, e in zip(completions, entry, strict=True)]


def main() -> None:
    """Write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    path = parser.parse_args().file
    rows = load_task(TrainConfig(task="qa")).rows
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"prompt": r.prompt, **r.columns}) + "\n" for r in rows)
    print(f"{len(rows)} rows: {path}")


if __name__ == "__main__":
    main()
