"""PPO on a task of your own: prompts with answers in a jsonl, and a reward that reads them.

python examples/own_task.py examples/own_task.jsonl SmolLM2-or-another-model-folder runs/own
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_fast.loop import TrainConfig, Trainer, read_prompts


def first_letter(prompts: list[str], completions: list[str], answer: list[str]) -> list[float]:
    """1 where a completion begins as the answer in its row does; `answer` is a column."""
    return [
        float(text.strip().startswith(wanted[0]))
        for text, wanted in zip(completions, answer, strict=True)
    ]


def main(data: str, model_name: str, out: str, updates: int = 40) -> None:
    """Train the model of that name on the file, into the folder `out`."""
    model = AutoModelForCausalLM.from_pretrained(model_name)
    tokenizer = AutoTokenizer.from_pretrained(model_name, padding_side="left")
    config = TrainConfig(out=Path(out), updates=updates, batch=8, max_new_tokens=8, train_layers=1)
    rows = read_prompts(data)  # or a list of texts, or of dicts such as the lines of the file
    Trainer(config, model, tokenizer, rows, first_letter).run(Console())


if __name__ == "__main__":
    main(*sys.argv[1:4])
