"""A real run of TRL's PPOTrainer; as a script it prints what one costs, with `--patched` ours."""

from __future__ import annotations

import tempfile
from typing import Any

import tiny
from tiny import Run


def run(vocab: int = tiny.WORDS, updates: int = 10, response: int = 12, **options: Any) -> Run:
    """Ten updates of 8 episodes: 2 epochs of 2 mini-batches of 2 micro-batches."""
    from datasets import Dataset
    from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel, set_seed
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    set_seed(0)
    words = tiny.tokenizer()
    policy, ref = (GPT2LMHeadModel(tiny.config(vocab)) for _ in range(2))
    ref.load_state_dict(policy.state_dict())
    value, reward = (
        GPT2ForSequenceClassification(tiny.config(vocab, num_labels=1)) for _ in range(2)
    )
    prompts = [{"input_ids": words(f"w{i} w{i + 1} w{2 * i}").input_ids} for i in range(16)]
    with tempfile.TemporaryDirectory() as folder:
        args = PPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            num_mini_batches=2,
            num_ppo_epochs=2,
            total_episodes=8 * updates,
            local_rollout_forward_batch_size=4,
            response_length=response,
            stop_token="eos",
            missing_eos_penalty=1.0,
            learning_rate=1e-3,
            adam_epsilon=1e-5,
            kl_coef=0.05,
            num_sample_generations=0,
            seed=1,
            **options,
        )
        trainer = PPOTrainer(
            args=args,
            processing_class=words,
            model=policy,
            ref_model=ref,
            reward_model=reward,
            value_model=value,
            train_dataset=Dataset.from_list(prompts),
        )
        start = tiny.snapshot(trainer.model)
        trainer.train()
        metrics = [m for m in trainer.state.log_history if "loss/policy_avg" in m]
        return Run(metrics, tiny.snapshot(trainer.model), start)


if __name__ == "__main__":
    import trl.experimental.ppo  # noqa: F401  (not part of what is timed)

    from ppo_fast.integrations import trl_ppo

    tiny.report(lambda vocab: run(vocab, response=tiny.LENGTH), trl_ppo.patched)
