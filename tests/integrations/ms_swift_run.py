"""A real run of ms-swift's GRPO; as a script it prints what one costs, with `--patched` ours.

The script takes options such as `loss_type=sapo`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import tiny
from swift import RLHFArguments
from swift.pipelines.train.rlhf import SwiftRLHF
from swift.rewards import ORM, orms
from swift.template import TemplateMeta, register_template
from tiny import Run


class EvenWords(ORM):  # type: ignore[misc]
    """The share of even words."""

    def __call__(self, completions: list[str], **_: Any) -> list[float]:
        return [sum(word[-1:] in "02468" for word in c.split()) / 12 for c in completions]


orms["even"] = EvenWords
register_template(TemplateMeta("words", [], ["{{QUERY}} "], None, ["<eos>"]), exist_ok=True)


class Training(SwiftRLHF):  # type: ignore[misc]
    """ms-swift's own pipeline up to its trainer, which is kept."""

    trainer: Any

    def train(self, trainer: Any) -> dict[str, Any]:
        self.trainer = trainer
        return {}


def trainer(folder: str, vocab: int = tiny.WORDS, length: int = 12, **options: Any) -> Any:
    """A tiny Llama whose completions are rewarded for their even words."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(0)
    tiny.tokenizer().save_pretrained(f"{folder}/model")
    shape = {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    config = LlamaConfig(
        vocab_size=vocab, num_hidden_layers=2, initializer_range=0.2, **shape, **ids
    )
    LlamaForCausalLM(config).save_pretrained(f"{folder}/model")
    prompts = [f"w{i} w{i + 1} w{2 * i}" for i in range(16)]
    rows = [{"messages": [{"role": "user", "content": prompt}]} for prompt in prompts]
    Path(f"{folder}/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = {"beta": 0.04, "num_iterations": 2, "max_steps": 4, "learning_rate": 2e-2, **options}
    args = RLHFArguments(
        rlhf_type="grpo",
        model=f"{folder}/model",
        model_type="llama",
        template="words",
        dataset=[f"{folder}/rows.jsonl"],
        output_dir=f"{folder}/out",
        reward_funcs=["even"],
        tuner_type="full",
        torch_dtype="float32",
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        check_model=False,  # against a hub
        load_from_cache_file=False,
        split_dataset_ratio=0,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_generations=4,
        max_completion_length=length,
        temperature=0.9,
        adam_epsilon=1e-5,
        log_entropy=True,
        seed=1,
        **chosen,
    )
    made = Training(args)
    made.run()
    return made.trainer


def run(vocab: int = tiny.WORDS, length: int = 12, **options: Any) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        made = trainer(folder, vocab, length, **options)
        start = tiny.snapshot(made.model)
        made.train()
        metrics = [m for m in made.state.log_history if "loss" in m]
        return Run(metrics, tiny.snapshot(made.model), start)


if __name__ == "__main__":
    from ppo_fast.integrations import ms_swift

    options = dict(word.split("=") for word in sys.argv if "=" in word)
    tiny.report(lambda vocab: run(vocab, tiny.LENGTH, **options), ms_swift.patched)
