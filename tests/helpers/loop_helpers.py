"""A tiny model, its prompts and a trainer on them, for the tests of the loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ppo_fast.loop import TrainConfig, Trainer
from ppo_fast.loop.data.experience import Batch, Plan, advantages
from ppo_fast.loop.data.sequences import Rollout, Scores
from ppo_fast.loop.model.load import tiny_model
from ppo_fast.loop.ranks.ranks import Ranks
from ppo_fast.loop.rewards import RewardFn, letters
from ppo_fast.loop.score import score

TEXTS = [
    "a film of great warmth and wit",
    "the plot is thin, the actors are tired and the jokes are old",
    "one of the best comedies in years",
    "it is slow",
    "nobody in this picture seems to know why they are there at all",
    "wonderful music, wonderful faces",
    "I laughed twice",
    "an honest and moving portrait of two brothers",
]


def tiny(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Any, Any]:
    """A tiny Llama and its tokenizer, ready for the loop."""
    torch.manual_seed(seed)
    model, tokenizer = tiny_model(TEXTS)
    tokenizer.padding_side = "left"
    return model.eval().to(dtype), tokenizer


def trainer(
    out: Path,
    reward: RewardFn = letters,
    dtype: torch.dtype = torch.float32,
    ranks: Ranks | None = None,
    prompts: list[Any] = TEXTS,
    model_of: tuple[Any, Any] | None = None,
    held_out: list[Any] | None = None,
    teacher: Any = None,
    **options: Any,
) -> Trainer:
    """A trainer of the tiny model: 8 prompts, 6 new tokens, one trainable layer of two."""
    defaults = {
        "updates": 3,
        "batch": 8,
        "minibatches": 2,
        "micro_batch": 2,
        "max_new_tokens": 6,
        "train_layers": 1,
        "lr": 1e-3,
        "warmup": 0,
        "model": "tiny",
        "device": "cpu",
    }
    config = TrainConfig(out=out, **(defaults | options))
    return Trainer(config, *(model_of or tiny(dtype)), prompts, reward, ranks, held_out, teacher)


def tiny_teacher(dtype: torch.dtype = torch.float32, seed: int = 7, **sizes: int) -> Any:
    """A tiny Llama of the same vocabulary as `tiny`'s, and of another hidden size."""
    torch.manual_seed(seed)
    return tiny_model(TEXTS, **({"hidden": 48, "layers": 3} | sizes))[0].eval().to(dtype)


def rollout_of(t: Trainer) -> Rollout:
    """Completions of the next prompts."""
    taken = [p.text for p in t.prompts.next(t.config.batch) for _ in range(t.config.group)]
    return t.sampler.rollout(taken, t.backend)


def ids_of(support: Any) -> list[list[int]]:
    """The ids of every row of a support."""
    return [ids.tolist() for ids in support.ids.tensor_split(support.offsets[1:-1].cpu())]


def batch_of(t: Trainer, scores: Scores | None = None) -> tuple[Rollout, Batch, Plan]:
    """A rollout, the batch made of it and the plan its old log-probs were scored in."""
    rollout = rollout_of(t)
    scores = scores or Scores([0.1 * i for i in range(t.config.sequences)])
    seqs, plan = rollout.seqs.kept(scores.kept), t.plan()
    scored = score(t.agent, seqs, [rows for part in plan for rows in part], t.backend)
    batch, _ = advantages(t.config, t.kl_coef, seqs, scored, scores, t.backend)
    return rollout, batch, plan


def weights(t: Trainer) -> list[torch.Tensor]:
    """Copies of the trainable weights."""
    return [p.detach().clone() for p in t.agent.parameters]


def gradients(t: Trainer) -> list[torch.Tensor]:
    """Copies of the gradients."""
    return [p.grad.clone() for p in t.agent.parameters if p.grad is not None]
