"""A real run of TRL's DistillationTrainer; as a script it prints what one costs.

The script takes options such as `beta=0.5`; with `--patched` it runs on ppo_fast.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from typing import Any

import tiny
from tiny import Run


def trainer(
    folder: str,
    vocab: int = tiny.WORDS,
    length: int = 12,
    scaled: bool = False,
    **options: Any,
) -> Any:
    """A tiny GPT-2 that learns from a wider one; `scaled`: with a scale and a cap of each head."""
    from datasets import Dataset
    from transformers import GPT2LMHeadModel, set_seed
    from trl import DistillationConfig, DistillationTrainer

    set_seed(0)
    own: dict[str, Any] = {}
    other: dict[str, Any] = {}
    if scaled:
        own = {"logit_scale": 0.5, "final_logit_softcapping": 4.0}
        other = {"logit_scale": 2.0, "final_logit_softcapping": 9.0}
    teacher = GPT2LMHeadModel(tiny.config(vocab, n_embd=48, n_head=4, **other))
    student = GPT2LMHeadModel(tiny.config(vocab, **own))
    prompts = [{"prompt": f"w{i} w{i + 1} w{2 * i}"} for i in range(16)]
    chosen = {"max_steps": 12, "learning_rate": 3e-3, "temperature": 0.9, **options}
    args = DistillationConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_completion_length=length,
        adam_epsilon=1e-5,
        seed=1,
        **chosen,
    )
    return DistillationTrainer(
        model=student,
        teacher_model=teacher,
        processing_class=tiny.tokenizer(),
        args=args,
        train_dataset=Dataset.from_list(prompts),
    )


def gkd(folder: str) -> Any:
    """The same pair in TRL's GKDTrainer, which trains on its dataset's answers too."""
    from datasets import Dataset
    from transformers import GPT2LMHeadModel, set_seed
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    set_seed(0)
    words = tiny.tokenizer()
    words.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    asked = [f"w{i} w{i + 1}" for i in range(16)]
    answers = [f"w{2 * i} w{i} w{i + 3}" for i in range(16)]
    chats = [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
        for a, b in zip(asked, answers, strict=True)
    ]
    args = GKDConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=6,
        learning_rate=3e-3,
        max_new_tokens=8,
        adam_epsilon=1e-5,
        seed=1,
    )
    return GKDTrainer(
        model=GPT2LMHeadModel(tiny.config(tiny.WORDS)),
        teacher_model=GPT2LMHeadModel(tiny.config(tiny.WORDS, n_embd=48, n_head=4)),
        processing_class=words,
        args=args,
        train_dataset=Dataset.from_list(chats),
    )


def run(vocab: int = tiny.WORDS, length: int = 12, **options: Any) -> Run:
    return run_of(lambda folder: trainer(folder, vocab, length, **options))


def run_of(make: Callable[[str], Any]) -> Run:
    """The training run of a trainer made in a folder."""
    with tempfile.TemporaryDirectory() as folder:
        made = make(folder)
        start = tiny.snapshot(made.model)
        made.train()
        metrics = [m for m in made.state.log_history if "loss" in m]
        return Run(metrics, tiny.snapshot(made.model), start)


if __name__ == "__main__":
    import trl.trainer.distillation_trainer  # noqa: F401  (not part of what is timed)

    from ppo_fast.integrations import trl_distillation

    options = {k: float(v) for k, v in (word.split("=") for word in sys.argv if "=" in word)}
    tiny.report(lambda vocab: run(vocab, tiny.LENGTH, **options), trl_distillation.patched)
