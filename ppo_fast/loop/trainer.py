"""The loop: rollout, reward, scoring, advantages, update, and what a run leaves behind."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import ppo_fast
from ppo_fast._backend import select
from ppo_fast.loop import rewards, tasks
from ppo_fast.loop.checkpoint.checkpoints import Checkpoints
from ppo_fast.loop.config import TrainConfig
from ppo_fast.loop.data.experience import Experience, importance
from ppo_fast.loop.data.prompts import PromptStream
from ppo_fast.loop.data.replay import TransitionStream, TransitionWriter, open_transitions
from ppo_fast.loop.data.sequences import Rollout, Sequences
from ppo_fast.loop.interrupt import patient_interrupt
from ppo_fast.loop.kl import adapt_penalty, adapt_reward_kl
from ppo_fast.loop.log.history import Record, fifths
from ppo_fast.loop.log.lock import RunLock
from ppo_fast.loop.log.meter import timed
from ppo_fast.loop.log.progress import shown
from ppo_fast.loop.log.recorder import Muted, Recorder
from ppo_fast.loop.model import load
from ppo_fast.loop.model.agent import Agent, Scored
from ppo_fast.loop.model.export import export
from ppo_fast.loop.model.first_batch import FirstBatch
from ppo_fast.loop.model.trial import check_is_causal_lm
from ppo_fast.loop.ranks.ranks import RankFailedError, Ranks, device_of
from ppo_fast.loop.sampling.generate import completions, encode
from ppo_fast.loop.update import Batch, Plan, Updated, make_plan, update

_STORED_CAP = 2.0  # of the importance weights of stored transitions, where none is given
_LOSS_KL = {"linear": 0.05, "penalty": 1.0}


@dataclass
class Outcome:
    """What a run ended with. `first` and `last` are the mean rewards of its outer fifths."""

    rewards: list[float]
    first: float
    last: float
    kl: float
    interrupted: bool
    plot: Path | None
    model: Path


class Trainer:
    """PPO on one model. `step` does one update; `run` does them all and saves what they left.

    `model` is any transformers causal LM and is trained in place, `reward` a function
    fn(prompts, completions) -> list[float]. Stored transitions in the place of prompts come with
    their rewards: nothing is sampled, and `reward` is not called.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: Any,
        tokenizer: Any,
        prompts: list[str] | TransitionStream,
        reward: rewards.RewardFn,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks or Ranks()
        config = config.absolute()
        torch.manual_seed(config.seed)
        self.config, self.tokenizer, self.reward = config, tokenizer, reward
        self.stored = isinstance(prompts, TransitionStream)
        # A model that cannot be trained is refused before anything of a former run is cleared.
        check_is_causal_lm(model)
        load.check_vocabulary(model, tokenizer)
        self.agent = Agent(model, config, self.ranks, sampled=not self.stored)
        self.first_batch = FirstBatch(self.agent)
        lock = RunLock(config.out)
        self.ranks.from_first(lock.claim)
        self.checkpoints = Checkpoints(self.ranks.saving(config))
        self.device = self.agent.parameters[0].device
        asked = None if config.backend == "auto" else config.backend
        self.backend = select("train", asked, self.agent.parameters[0])
        self.eos = load.eos_ids(model, tokenizer)
        self.prompts: PromptStream | TransitionStream = (
            prompts
            if isinstance(prompts, TransitionStream)
            else PromptStream(prompts, config.seed)
        )
        path = config.save_transitions if self.ranks.first else None
        self.writer = None if path is None else TransitionWriter(path, self.eos)
        self.sampling = torch.Generator(self.device).manual_seed(config.seed)
        self.shuffling = torch.Generator().manual_seed(config.seed)
        self.kl_coef = config.kl_coef
        coef = config.loss_kl_coef
        self.loss_kl_coef = _LOSS_KL.get(config.variant, 0.0) if coef is None else coef
        self.recorder = Recorder(config, self.backend, lock) if self.ranks.first else Muted()
        self.watch = rewards.Watch()
        self.updates = 0
        self.last_batch: tuple[list[str], rewards.Scores] | None = None
        lock.release()  # until `run`

    def run(self, console: Console) -> Outcome:
        """Train to the end, or to Ctrl-C. However it ends, log, plot and model are written.

        Only a model that learnt nothing, because nothing was rewarded, is not.
        """
        interrupted, learnt, plot = False, True, None
        folder, say = self.config.out, functools.partial(console.print, markup=False)
        self._begin(say)
        with patient_interrupt(say, hold=self.ranks.size > 1) as stop:
            try:
                with shown(console, self.updates, self.config.updates) as show:
                    while self.updates < self.config.updates and not self.ranks.any(stop.asked):
                        record = self.step()
                        self.watch.tell(say)
                        show(record, self.recorder.history)
                        self.checkpoints.after_step(self, say)
                interrupted = self.updates < self.config.updates
                self.checkpoints.finish(self)
            except KeyboardInterrupt:
                interrupted = True
            except rewards.NoRewardError:
                learnt = bool(self.agent.optimizer.state)
                raise
            except RankFailedError as error:
                say(f"{error}; what there is will be written")
                raise
            finally:
                stop.ending = True
                try:
                    if learnt:
                        folder = export(self.agent, self.tokenizer, folder)
                finally:
                    plot = self.recorder.close()
        history = self.recorder.history
        means = history.column("reward").tolist()
        kl = fifths(history.column("kl").tolist())[1]
        return Outcome(means, *fifths(means), kl, interrupted, plot, folder)

    def _begin(self, say: Callable[[str], None]) -> None:
        """Keep the folder to this run, and resume where asked to."""
        try:
            self.ranks.from_first(self.recorder.hold)
            if self.config.resume:
                self.checkpoints.resume(self, say)
        except BaseException:
            self.recorder.release()
            raise

    def step(self) -> Record:
        """One update, logged when it is finished."""
        seconds: dict[str, float] = {}
        sample = self.collect(seconds)
        prompts, texts, rollout, scores, _ = sample
        record: Record = {
            "update": self.updates,
            "reward": scores.mean,
            "dropped": scores.faults,
            "batch": len(prompts),
            "seconds": seconds,
        }
        seqs = self.kept(rollout.seqs, scores)
        if seqs.mask.any():
            record |= self._learn(sample, seqs, seconds)
            self.last_batch = None if self.stored else (prompts, scores)
        if self.writer is not None:
            self.writer.write(self.updates, sample)
        took = sum(seconds.values())
        record["tokens_per_second"] = int(rollout.seqs.mask.sum()) / took if took else math.nan
        self.updates += 1
        self.recorder.update(record)
        self.recorder.samples(record["update"], prompts, texts, scores)
        return record

    def collect(self, seconds: dict[str, float]) -> Experience:
        """The samples of one update: stored ones, or sampled and rewarded now."""
        prompts = self.prompts.next(self.config.batch)
        if isinstance(prompts, Experience):
            return prompts
        with timed(self.device) as rollout_time:
            rollout = self.rollout(prompts, self.backend)
        seconds["rollout"] = rollout_time.seconds
        texts = completions(self.tokenizer, rollout.seqs)
        with timed(self.device) as reward_time:
            scores = self.ranks.from_first(
                lambda: self.watch.checked(
                    self.scores(prompts, texts, rollout.seqs),
                    self.recorder.history.column("reward").tolist(),
                )
            )
        seconds["reward"] = reward_time.seconds
        return Experience(prompts, texts, rollout, scores)

    def _learn(self, sample: Experience, seqs: Sequences, seconds: dict[str, float]) -> Record:
        """Scoring, advantages and update; fills `seconds` and returns the rest of the record."""
        plan = self.plan()
        parts = [rows for part in plan for rows in part]
        self.first_batch.check_head(seqs, parts)
        with timed(self.device) as scoring_time:
            scored = self.agent.score(seqs, parts, self.backend)
        gap = (sample.rollout.logprobs - scored.old)[seqs.mask].abs()
        if not self.stored:
            self.first_batch.check_gap(gap)
        with timed(self.device) as advantage_time:
            batch, kl = self.advantages(
                seqs, scored, sample.scores, self.backend, sample.token_rewards
            )
            batch, weighing = self.weighted(batch, sample.rollout)
        warm = min(1.0, (self.updates + 1) / max(1, self.config.warmup))
        lr = self.config.lr * warm
        self.agent.set_lr(lr)
        with timed(self.device) as update_time:
            done = self.update(batch, plan, self.backend)
        seconds["scoring"] = scoring_time.seconds
        seconds["advantages"] = advantage_time.seconds
        seconds["update"] = update_time.seconds
        record: Record = {
            "lr": lr,
            "kl": kl,
            "kl_coef": self.kl_coef,
            "loss_kl_coef": self.loss_kl_coef,
            "rollout_gap_max": float(gap.max()),
            "rollout_gap_mean": float(gap.mean()),
            "grad_norm": done.grad_norm,
            "steps": done.steps,
            "skipped": done.skipped,
            "stopped_by_kl": done.stopped_by_kl,
        } | weighing
        if done.stats is not None:
            record |= done.stats.compute()
        self._control(kl, sum(sample.scores.kept), done)
        return record

    def _control(self, kl: float, n: int, done: Updated) -> None:
        """Move the KL coefficients."""
        c = self.config
        if c.kl_target is not None:
            self.kl_coef = adapt_reward_kl(self.kl_coef, kl, c.kl_target, n, c.kl_horizon)
        if c.variant == "penalty" and done.last is not None:
            reached = done.last.compute()["kl_k3"]
            self.loss_kl_coef = adapt_penalty(self.loss_kl_coef, reached, c.penalty_target)

    def plan(self) -> Plan:
        """The minibatches of a first epoch."""
        c = self.config
        forward = c.micro_batch * self.ranks.size
        return make_plan(c.batch, c.minibatches, forward, self.shuffling)

    def rollout(self, prompts: list[str], backend: str) -> Rollout:
        """Sample one completion per prompt, each rank those of its share."""
        limit = load.prompt_limit(self.agent.policy.model, self.config.max_new_tokens)
        tokens, attention = encode(self.tokenizer, prompts, self.device, limit)
        return self.agent.sample(
            tokens,
            attention,
            max_new_tokens=self.config.max_new_tokens,
            temperature=self.config.temperature,
            eos=self.eos,
            generator=self.sampling,
            backend=backend,
        )

    def scores(self, prompts: list[str], texts: list[str], seqs: Sequences) -> rewards.Scores:
        """The rewards of a rollout, clipped and less the penalty for a missing EOS."""
        c = self.config
        raw = rewards.score(self.reward, prompts, texts, c.reward_timeout)
        stops = torch.tensor(self.eos, device=self.device)
        ended = (torch.isin(seqs.response, stops) & seqs.mask).any(1).tolist()
        return rewards.shaped(raw, ended, c.score_clip, c.missing_eos_penalty)

    def kept(self, seqs: Sequences, scores: rewards.Scores) -> Sequences:
        """The same sequences with those without a reward masked out."""
        kept = torch.tensor(scores.kept, device=self.device)
        return seqs._replace(mask=seqs.mask & kept[:, None])

    def advantages(
        self,
        seqs: Sequences,
        scored: Scored,
        scores: rewards.Scores,
        backend: str,
        token_rewards: Tensor | None = None,
    ) -> tuple[Batch, float]:
        """The batch an update reads, and its mean KL to the reference per sequence (nats)."""
        given = scored.old.new_tensor(scores.values) if token_rewards is None else token_rewards
        out = ppo_fast.rlhf_advantages(
            given,
            scored.old,
            scored.ref,
            scored.values,
            seqs.mask,
            kl_coef=self.kl_coef,
            score_at="last-token" if token_rewards is None else "per-token",
            gamma=self.config.gamma,
            lam=self.config.lam,
            backend=backend,
        )
        kl = float(out.kl.sum()) / max(1, sum(scores.kept))
        return Batch(seqs, scored, out.advantages, out.returns, out.moments), kl

    def weighted(self, batch: Batch, rollout: Rollout) -> tuple[Batch, dict[str, float]]:
        """The batch with its importance weights, where they are asked for, and their record."""
        cap = self.config.is_truncation or (_STORED_CAP if self.stored else None)
        if cap is None:
            return batch, {}
        out = importance(batch.scored.old, rollout.logprobs, batch.seqs.mask, cap)
        return batch._replace(is_weights=out.weights), out.statistics

    def update(self, batch: Batch, plan: Plan, backend: str) -> Updated:
        """The optimisation phase."""
        return update(self.agent, batch, plan, self.loss_kl_coef, self.shuffling, backend)


def load_trainer(
    config: TrainConfig, report: Callable[[str], None] = print, ranks: Ranks | None = None
) -> Trainer:
    """A trainer of what `config` names: model, prompts or transitions, and reward."""
    config = config.resolved().absolute()
    device = device_of(config)
    task = tasks.load_task(config)
    torch.manual_seed(config.seed)
    model, tokenizer = load.load_model(config.model, task.texts[:200], device)
    task = task.as_chat(tokenizer) if config.chat else task
    reward = rewards.load_reward(config, task, device)
    source = (
        task.prompts
        if config.transitions is None
        else open_transitions(
            config.transitions,
            config.batch,
            config.seed,
            shuffle=config.shuffle,
            keep_truncated=config.keep_truncated,
            model=model,
            tokenizer=tokenizer,
            report=report,
        )
    )
    return Trainer(config, model, tokenizer, source, reward, ranks)


def train(
    config: TrainConfig, console: Console, ranks: Ranks | None = None
) -> tuple[Trainer, Outcome]:
    """Load what `config` names, train, and return the trainer with the outcome."""
    console.print(f"loading {config.resolved().model}")
    trainer = load_trainer(config, lambda line: console.print(line, markup=False), ranks)
    return trainer, trainer.run(console)
