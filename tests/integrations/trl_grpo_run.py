"""A real run of TRL's GRPOTrainer; as a script it prints what one costs, with `--patched` ours.

The script takes options such as `loss_type=sapo`.
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import tiny
from tiny import Run


def trainer(folder: str, vocab: int = tiny.WORDS, length: int = 12, **options: Any) -> Any:
    """A tiny GPT-2 whose completions are rewarded for their even words."""
    from datasets import Dataset
    from transformers import GPT2LMHeadModel, set_seed
    from trl import GRPOConfig, GRPOTrainer

    set_seed(0)
    words = tiny.tokenizer()
    # Saved, because a KL term loads the reference from the model's path.
    GPT2LMHeadModel(tiny.config(vocab)).save_pretrained(f"{folder}/model")
    model = GPT2LMHeadModel.from_pretrained(f"{folder}/model")
    prompts = [{"prompt": f"w{i} w{i + 1} w{2 * i}"} for i in range(16)]

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [sum(word[-1:] in "02468" for word in c.split()) / length for c in completions]

    chosen = {
        "beta": 0.04,
        "num_iterations": 2,
        "max_steps": 12,
        "learning_rate": 3e-3,
        "entropy_coef": 0.01,
        **options,
    }
    args = GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_generations=4,
        max_completion_length=length,
        temperature=0.9,
        adam_epsilon=1e-5,
        seed=1,
        **chosen,
    )
    return GRPOTrainer(
        model=model,
        processing_class=words,
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_list(prompts),
    )


def run(vocab: int = tiny.WORDS, length: int = 12, **options: Any) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        made = trainer(folder, vocab, length, **options)
        start = tiny.snapshot(made.model)
        made.train()
        metrics = [m for m in made.state.log_history if "loss" in m]
        return Run(metrics, tiny.snapshot(made.model), start)


if __name__ == "__main__":
    import trl.trainer.grpo_trainer  # noqa: F401  (not part of what is timed)

    from ppo_fast.integrations import trl_grpo

    options = dict(word.split("=") for word in sys.argv if "=" in word)
    tiny.report(lambda vocab: run(vocab, tiny.LENGTH, **options), trl_grpo.patched)
