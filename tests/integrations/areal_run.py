"""A PPO run of AReaL's own engines, actor and critic, on one process without a GPU."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from areal.api import FinetuneSpec
from areal.api.cli_args import (
    MicroBatchSpec,
    NormConfig,
    OptimizerConfig,
    PPOActorConfig,
    PPOCriticConfig,
    RejectionSamplingConfig,
)
from areal.engine import FSDPPPOActor, FSDPPPOCritic
from areal.utils import stats_tracker
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

ROWS, LENGTH = 8, 24


def save_model(folder: str) -> None:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=tiny.WORDS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)


def common(folder: str) -> dict[str, Any]:
    return {
        "experiment_name": "e",
        "trial_name": "t",
        "path": folder,
        "backend": "fsdp:d1",
        "dtype": "float32",
        "attn_impl": "sdpa",
        "optimizer": OptimizerConfig(lr=3e-3, warmup_steps_proportion=0.0),
        "mb_spec": MicroBatchSpec(max_tokens_per_mb=96),
        "ppo_n_minibatches": 2,
        "gradient_checkpointing": False,
    }


def actor_config(folder: str = "", rejected: bool = False, **options: Any) -> PPOActorConfig:
    """Options of AReaL's actor; `rejected` tokens are those of a large k2."""
    if rejected:
        options["rejection_sampling"] = RejectionSamplingConfig(metric="kl_k2", upper=4.0)
    return PPOActorConfig(**common(folder) | options)


def started(made: Any) -> Any:
    made.create_process_group()
    made.initialize(None, FinetuneSpec(1, 64, 8))
    return made


def batch(seed: int) -> list[dict[str, Tensor]]:
    """Prompts and responses padded on the right, two without EOS, one with a tool's answer."""
    torch.manual_seed(seed)
    ids = torch.randint(2, tiny.WORDS, (ROWS, LENGTH))
    lengths = torch.tensor([24, 20, 9, 24, 16, 11, 23, 14])
    at = torch.arange(LENGTH)
    attention = (at < lengths[:, None]).long()
    loss = ((at >= 6) & (at < lengths[:, None])).long()
    loss[1, 10:14] = 0
    found = {
        "input_ids": ids * attention,
        "attention_mask": attention,
        "loss_mask": loss,
        "logprobs": (-3 + 0.3 * torch.randn(ROWS, LENGTH)) * loss,
        "versions": torch.where(loss > 0, 0, -1),
        "rewards": torch.randn(ROWS),
    }
    return [{k: v[i : i + 1] for k, v in found.items()} for i in range(ROWS)]


def run(folder: str, critic: bool = False, **options: Any) -> tiny.Run:
    """Three updates of the actor, and of the critic where there is one, from the same start."""
    torch.manual_seed(2)
    shared = {"adv_norm": NormConfig(), "discount": 0.99, "gae_lambda": 0.9, "temperature": 0.7}
    engines = [started(FSDPPPOActor(actor_config(folder, **shared | options)))]
    if critic:
        own = PPOCriticConfig(**common(folder), is_critic=True)
        engines.append(started(FSDPPPOCritic(own)))
    start, logged = weights(engines), []
    for version in (1, 2, 3):
        data = batch(seed=version)
        for made in engines:
            made.set_version(version)
        if critic:
            put(data, "values", engines[1].compute_values(data))
        if engines[0].config.should_compute_prox_logp():
            put(data, "prox_logp", engines[0].compute_logp(data))
        data = engines[0].compute_advantages(data)
        for made in engines:
            made.ppo_update([dict(row) for row in data])
            made.step_lr_scheduler()
        logged.append(stats_tracker.export_all())
    return tiny.Run(logged, weights(engines), start)


def put(data: list[dict[str, Tensor]], name: str, found: list[Tensor]) -> None:
    for row, x in zip(data, found, strict=True):
        row[name] = x


def weights(engines: list[Any]) -> dict[str, Tensor]:
    return {
        f"{i}.{name}": p.detach().full_tensor().clone()
        for i, made in enumerate(engines)
        for name, p in made.model.named_parameters()
    }
