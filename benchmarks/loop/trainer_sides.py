"""Trainers as sides of a comparison: ppo_fast's loop, TRL's PPOTrainer and TRL's GRPOTrainer.

A side does one update whenever it is asked to, and reports its time, peak memory and counts.
No completion ends early: an EOS is either left out, or a token that the model cannot sample.
`bench_trainers` runs each side in a process of its own, with the interpreter of its environment.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.harness.machine import THREADS
from benchmarks.harness.worker import answering, requests
from benchmarks.loop.equal_work import MODEL, Meter, Update, Work, prompt_file, read_prompts

_FOREVER = 10**6  # updates: the process is ended when it has done enough


class Asker(Protocol):
    """Whoever wants updates: `wait` returns when one is wanted, `take` gets it."""

    def wait(self) -> None: ...

    def take(self, update: Update) -> None: ...


def run(side: str, work: Work, folder: Path, asker: Asker) -> None:
    """Do updates of a side until the asker raises; `folder` is one that `prepare` has filled."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    meter = Meter()
    hook = register_optimizer_step_post_hook(meter.stepped)
    try:
        _SIDES[side](work, folder, meter, asker)
    finally:
        hook.remove()


def _ppo_fast(work: Work, folder: Path, meter: Meter, asker: Asker) -> None:
    """The loop, as `ppo-fast train` runs it."""
    from ppo_fast.loop import TrainConfig
    from ppo_fast.loop.run import load_trainer

    trainer = load_trainer(TrainConfig(**loop_options(work, folder)), lambda line: None)
    trainer.sampler.eos = []
    sampled = trainer.sampler.rollout

    def rollout(*args: Any) -> Any:
        out = sampled(*args)
        kept, prompts = out.seqs.mask, out.seqs.attention.sum(1) - out.seqs.mask.sum(1)
        rows = zip(out.seqs.tokens.tolist(), prompts.tolist(), strict=True)
        start = out.seqs.tokens.shape[1] - kept.shape[1]
        meter.counts.prompted([tokens[start - n : start] for tokens, n in rows])
        meter.counts.response_tokens += int(kept.sum())
        return out

    trainer.sampler.rollout = rollout
    with mock.patch.multiple("ppo_fast", **_counted_ops(meter)):
        while True:
            asker.wait()
            meter.begin()
            record = trainer.step()
            meter.reward, seconds = record["reward"], record["seconds"]
            meter.phases["rollout"] = seconds["rollout"]
            meter.phases["scoring"] = sum(seconds[k] for k in ("reward", "scoring", "advantages"))
            asker.take(meter.end())


def loop_options(work: Work, folder: Path) -> dict[str, Any]:
    """The options of `TrainConfig` that do this work."""
    own: dict[str, Any] = (
        {"critic": work.critic, "kl_coef": work.kl_coef}
        if work.algorithm == "ppo"
        else {
            "advantages": "grpo",
            "group": work.group,
            "kl_coef": 0.0,
            "loss_kl_coef": work.kl_coef,
        }
    )
    same = ("new_tokens", "epochs", "minibatches", "micro_batch", "dtype", "lr", "clip")
    same = (*same, "vf_coef", "vf_clip", "gamma", "lam")
    given = {name: getattr(work, name) for name in same}
    given["max_new_tokens"] = given.pop("new_tokens")
    return (
        own
        | given
        | {
            "model": str(folder / MODEL),
            "data": str(prompt_file(folder, work.prompts)),
            "reward": "letters",
            "out": Path(tempfile.mkdtemp(dir=folder)),
            "device": "cpu",
            "batch": work.prompts,
            "updates": _FOREVER,
            "train_layers": 0,
            "warmup": 1,
            "save_every": 0,
            "compare": 0,
        }
    )


def _counted_ops(meter: Meter) -> dict[str, Callable[..., Any]]:
    """The loop's ops, counting the tokens of their calls."""
    import ppo_fast

    def counting(name: str, count: Callable[..., None]) -> Callable[..., Any]:
        op = getattr(ppo_fast, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            result = op(*args, **kwargs)
            count(result[0], *args)
            return result

        return call

    def policy(loss: torch.Tensor, *args: torch.Tensor) -> None:
        if loss.requires_grad:
            meter.counts.trained_tokens += args[2].numel()
            meter.counts.forwards += 1

    def value(loss: torch.Tensor, values: torch.Tensor, *args: torch.Tensor) -> None:
        if loss.requires_grad:
            meter.counts.value_tokens += values.numel()

    def scored(logprobs: torch.Tensor, *args: torch.Tensor) -> None:
        if not logprobs.requires_grad:
            meter.counts.logprobs += logprobs.numel()

    counters = {
        "linear_ppo_loss": policy,
        "value_loss": value,
        "linear_token_logprobs": scored,
        "token_logprobs": scored,
    }
    return {name: counting(name, counter) for name, counter in counters.items()}


class LettersReward(nn.Module):
    """A reward model in the form that TRL's PPO wants: the loop's reward of the completion."""

    base_model_prefix = "body"

    def __init__(
        self, tokenizer: Any, new_tokens: int, reward: Callable[..., list[float]]
    ) -> None:
        super().__init__()
        self.body, self.score = self._hidden, nn.Identity()
        self._tokenizer, self._new_tokens, self._reward = tokenizer, new_tokens, reward

    def _hidden(self, input_ids: torch.Tensor, **unused: Any) -> Any:
        """ "Hidden states" (B, P + R, 1) that are the sequence's reward at every token."""
        from transformers.modeling_outputs import BaseModelOutput

        tokens = input_ids[:, -self._new_tokens :]
        texts = self._tokenizer.batch_decode(tokens, skip_special_tokens=True)
        values = torch.tensor(self._reward([""] * len(texts), texts))
        hidden = values[:, None, None].expand(*input_ids.shape, 1)
        return BaseModelOutput(hidden_states=(hidden,))


class SharedValue(nn.Module):
    """A value model in the form that TRL's PPO wants: a head on the policy's own body.

    TRL runs the body for the values and again for the policy.
    """

    base_model_prefix = "model"

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.model = policy.model
        self.score = nn.Linear(policy.config.hidden_size, 1)


def _trl_model(folder: Path, kind: str = "AutoModelForCausalLM", **options: Any) -> Any:
    import transformers

    load = getattr(transformers, kind).from_pretrained
    return load(folder / MODEL, dtype=torch.float32, **options)


def set_unsampled(tokenizer: Any, what: str, model: Any) -> None:
    """Make a special token one beyond the model's embeddings, which it cannot sample."""
    spare = model.get_input_embeddings().num_embeddings - len(tokenizer)
    tokenizer.add_tokens([f"<spare {i}>" for i in range(spare)])
    tokenizer.add_special_tokens({what: "<never sampled>"})


def _trl_arguments(work: Work, folder: Path) -> dict[str, Any]:
    """Arguments that both of TRL's trainers share with the loop."""
    return {
        "output_dir": tempfile.mkdtemp(dir=folder),
        "use_cpu": True,
        "bf16": work.dtype == "bfloat16",
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 10**9,
        "disable_tqdm": True,
        "learning_rate": work.lr,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "adam_epsilon": 1e-5,
        "weight_decay": 0.0,
        "temperature": 1.0,
    }


def _at_each_update(steps: int, meter: Meter, asker: Asker) -> Any:
    """A callback that waits before every update of `steps` calls of `on_step_end`, and reports."""
    from transformers import TrainerCallback

    class EachUpdate(TrainerCallback):
        done = 0

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            asker.wait()
            meter.begin()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.done += 1
            if self.done % steps == 0:
                asker.take(meter.end())
                asker.wait()
                meter.begin()

    return EachUpdate()


def _trl_ppo(work: Work, folder: Path, meter: Meter, asker: Asker) -> None:
    """TRL's PPOTrainer. A forward takes a whole minibatch, sampling and scoring the whole batch.

    With more than one accumulation step TRL would step the optimiser after as many micro-batches,
    whatever the minibatches are.
    """
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    from ppo_fast.loop.rewards.text import letters

    if work.sequences != work.minibatches * work.micro_batch:
        raise ValueError(f"micro_batch must be a minibatch for TRL's PPO, got {work.micro_batch}")
    tokenizer = AutoTokenizer.from_pretrained(folder / MODEL, padding_side="left")
    policy, reference = _trl_model(folder), _trl_model(folder)
    set_unsampled(tokenizer, "pad_token", policy)  # TRL takes a sampled one for the end
    value = (
        SharedValue(policy)
        if work.critic == "shared"
        else _trl_model(folder, "AutoModelForSequenceClassification", num_labels=1)
    )
    value.score = nn.Linear(policy.config.hidden_size, 1)
    nn.init.zeros_(value.score.weight), nn.init.zeros_(value.score.bias)
    prompts = [
        {"input_ids": tokenizer(text)["input_ids"]} for text in read_prompts(folder, work.prompts)
    ]
    args = PPOConfig(
        **_trl_arguments(work, folder),
        per_device_train_batch_size=work.sequences,
        gradient_accumulation_steps=1,
        num_mini_batches=work.minibatches,
        num_ppo_epochs=work.epochs,
        local_rollout_forward_batch_size=work.sequences,
        total_episodes=work.sequences * _FOREVER,
        response_length=work.new_tokens,
        stop_token=None,
        num_sample_generations=0,
        kl_coef=work.kl_coef,
        cliprange=work.clip,
        vf_coef=work.vf_coef,
        cliprange_value=work.vf_clip,
        gamma=work.gamma,
        lam=work.lam,
    )
    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=LettersReward(tokenizer, work.new_tokens, meter.rewarded(letters)),
        value_model=value,
        train_dataset=Dataset.from_list(prompts),
        callbacks=[_at_each_update(1, meter, asker)],
    )
    _require_precision(trainer, work)
    with mock.patch.multiple(ppo_trainer, **_counted_trl_ppo(trainer, ppo_trainer, work, meter)):
        trainer.train()


def _require_precision(trainer: Any, work: Work) -> None:
    """PPOTrainer's accelerator reads ACCELERATE_MIXED_PRECISION and not the argument `bf16`."""
    wanted = "bf16" if work.dtype == "bfloat16" else "no"
    if trainer.accelerator.mixed_precision != wanted:
        raise ValueError(f"TRL must run in {wanted}, got {trainer.accelerator.mixed_precision}")


def _counted_trl_ppo(
    trainer: Any, module: Any, work: Work, meter: Meter
) -> dict[str, Callable[..., Any]]:
    """Functions that PPOTrainer.train calls, which count; its own methods are wrapped here."""
    generation, log_softmax = module.batch_generation, module.selective_log_softmax
    accumulate, pad = trainer.accelerator.accumulate, trainer.processing_class.pad_token_id
    scored_from: list[float] = []

    def generate(model: Any, queries: torch.Tensor, *args: Any) -> Any:
        with meter.phase("rollout"):
            out, logits = generation(model, queries, *args)
        meter.counts.prompted([[t for t in row if t != pad] for row in queries.tolist()])
        meter.counts.response_tokens += int((out[:, queries.shape[1] :] != pad).sum())
        scored_from.append(time.perf_counter())
        return out, logits

    def accumulated(model: Any) -> Any:
        if scored_from:  # the first micro-batch
            meter.phases["scoring"] = time.perf_counter() - scored_from.pop()
        return accumulate(model)

    def counted(logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            meter.counts.trained_tokens += index.numel()
            meter.counts.forwards += 1
        else:
            meter.counts.logprobs += index.numel()
        return log_softmax(logits, index)

    def valued(_: nn.Module, args: object, output: torch.Tensor) -> None:
        if torch.is_grad_enabled():
            meter.counts.value_tokens += len(output) * work.new_tokens

    trainer.accelerator.accumulate = accumulated
    trainer.value_model.score.register_forward_hook(valued)
    return {"batch_generation": generate, "selective_log_softmax": counted}


def _trl_grpo(work: Work, folder: Path, meter: Meter, asker: Asker) -> None:
    """TRL's GRPOTrainer, which samples once for all micro-batches and epochs of an update."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    from ppo_fast.loop.rewards.text import letters

    tokenizer = AutoTokenizer.from_pretrained(folder / MODEL, padding_side="left")
    model = _trl_model(folder)
    set_unsampled(tokenizer, "eos_token", model)
    model.generation_config.eos_token_id = None
    accumulated = work.sequences // work.minibatches // work.micro_batch
    args = GRPOConfig(
        **_trl_arguments(work, folder),
        per_device_train_batch_size=work.micro_batch,
        gradient_accumulation_steps=accumulated,
        steps_per_generation=work.sequences // work.micro_batch,
        num_iterations=work.epochs,
        num_generations=work.group,
        max_completion_length=work.new_tokens,
        max_steps=_FOREVER,
        shuffle_dataset=False,
        top_k=0,
        beta=work.kl_coef,
        epsilon=work.clip,
    )
    rows = [{"prompt": text} for text in read_prompts(folder, work.prompts)]
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=meter.rewarded(letters),
        args=args,
        # Long, so that no pass over it ends within a comparison.
        train_dataset=Dataset.from_list(rows * 1000),
        callbacks=[_at_each_update(work.epochs * work.minibatches, meter, asker)],
    )
    _require_precision(trainer, work)
    _count_trl_grpo(trainer, meter)
    trainer.train()


def _count_trl_grpo(trainer: Any, meter: Meter) -> None:
    """Count and time the calls of GRPOTrainer's training step."""
    generation, logps = trainer._generate, trainer._get_per_token_logps_and_entropies

    def generate(prompts: list[Any]) -> Any:
        with meter.phase("rollout"):
            out = generation(prompts)
        meter.counts.prompted(out[0])
        meter.counts.response_tokens += sum(map(len, out[1]))
        return out

    def counted(
        model: Any, tokens: Any, attention: Any, kept: int, *args: Any, **kwargs: Any
    ) -> Any:
        if torch.is_grad_enabled():
            meter.counts.trained_tokens += len(tokens) * kept
            meter.counts.forwards += 1
        else:
            meter.counts.logprobs += len(tokens) * kept
        return logps(model, tokens, attention, kept, *args, **kwargs)

    def experience(inputs: Any) -> Any:
        before = meter.phases["rollout"]
        with meter.phase("scoring"):
            out = made(inputs)
        meter.phases["scoring"] -= meter.phases["rollout"] - before
        return out

    made = trainer._generate_and_score_completions
    trainer._generate, trainer._get_per_token_logps_and_entropies = generate, counted
    trainer._generate_and_score_completions = experience


_SIDES: dict[str, Callable[[Work, Path, Meter, Asker], None]] = {
    "ppo_fast": _ppo_fast,
    "trl-ppo": _trl_ppo,
    "trl-grpo": _trl_grpo,
}
# The package whose version a side's figures belong to.
_PACKAGE = {"ppo_fast": "ppo_fast", "trl-ppo": "trl", "trl-grpo": "trl"}


class _Process:
    """The asker of a process: requests on stdin, answers on what stdout was."""

    def __init__(self, say: Callable[[dict[str, Any]], None], version: str) -> None:
        self._say, self._version = say, version
        self._asked: Iterator[dict[str, Any]] = requests()
        self._ready = False

    def wait(self) -> None:
        if not self._ready:
            self._say({"ready": self._version})
        self._ready = True
        if next(self._asked, None) is None:
            sys.exit()

    def take(self, update: Update) -> None:
        self._say(dataclasses.asdict(update))


def main() -> None:
    """Say "ready" once the side is loaded, then answer each request with an update."""
    side, work, folder = sys.argv[1], Work(**json.loads(sys.argv[2])), Path(sys.argv[3])
    say = answering()
    version = importlib.import_module(_PACKAGE[side]).__version__
    run(side, work, folder, _Process(say, version))


if __name__ == "__main__":
    main()
