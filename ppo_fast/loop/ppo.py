"""PPO on one model: an update's seven steps in order, and the state that they change."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import torch

from ppo_fast._backend import select
from ppo_fast.loop import distill, evaluate, rewards
from ppo_fast.loop.checkpoint import state
from ppo_fast.loop.coefficients import adapt_penalty, adapt_reward_kl, lr_share
from ppo_fast.loop.collect import Collector
from ppo_fast.loop.config import OptionError, TrainConfig
from ppo_fast.loop.data.chat import rendered
from ppo_fast.loop.data.experience import (
    Experience,
    Plan,
    advantages,
    corrected,
    make_plan,
    supported,
    taught,
)
from ppo_fast.loop.data.prompts import Prompt, PromptStream, Row, as_rows, columns_of
from ppo_fast.loop.data.replay import TransitionStream
from ppo_fast.loop.data.sequences import Rollout, Scores, Sequences
from ppo_fast.loop.evaluate import Evaluation
from ppo_fast.loop.log.history import History, Record
from ppo_fast.loop.log.meter import Phases
from ppo_fast.loop.losses import correction_of
from ppo_fast.loop.model.agent import Agent
from ppo_fast.loop.model.first_batch import FirstBatch
from ppo_fast.loop.model.load import check_vocabulary
from ppo_fast.loop.model.trial import check_is_causal_lm
from ppo_fast.loop.model.weights import chosen_dtype
from ppo_fast.loop.ranks.ranks import Ranks
from ppo_fast.loop.sampling.sampler import Sampler
from ppo_fast.loop.sampling.truncate import require_support
from ppo_fast.loop.score import score
from ppo_fast.loop.update import Ahead, numbers, update

_LOSS_KL = {"linear": 0.05, "penalty": 1.0}


class PPO:
    """The algorithm on one model, without a run's files: `iteration` does one update.

    The arguments are those of `Trainer`.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: Any,
        tokenizer: Any,
        prompts: Iterable[Any] | TransitionStream,
        reward: rewards.RewardFn,
        ranks: Ranks | None = None,
        held_out: Iterable[Any] | None = None,
        teacher: Any = None,
    ) -> None:
        self.ranks = ranks or Ranks()
        torch.manual_seed(config.seed)
        self.tokenizer, self.reward = tokenizer, reward
        check_is_causal_lm(model)
        device = model.get_input_embeddings().weight.device
        config = config.absolute()
        config = dataclasses.replace(config, dtype=chosen_dtype(config.dtype, device))
        self.config = config
        self.stored = isinstance(prompts, TransitionStream)
        held: list[Prompt] = []
        self.prompts: PromptStream | TransitionStream
        if isinstance(prompts, TransitionStream):
            self.prompts = prompts
        else:
            self.prompts, held = self._prompt_streams(prompts, held_out)
        check_vocabulary(model, tokenizer)
        distill.require_given(config, teacher)
        self.agent = Agent(model, config, self.ranks, not self.stored, teacher)
        self.first_batch = FirstBatch(self.agent)
        self.device = self.agent.parameters[0].device
        asked = None if config.backend == "auto" else config.backend
        self.backend = select("train", asked, self.agent.parameters[0])
        stored = isinstance(prompts, TransitionStream) and prompts.supported
        require_support(self.backend, config, stored)
        distill.require_kernels(self.backend, config)
        self.sampler = Sampler(self.agent, tokenizer, config, self.device)
        self.collector = Collector(config, self.sampler, reward, self.ranks, self.backend)
        self.evaluation = Evaluation(self.collector, held) if held else None
        self.shuffling = torch.Generator().manual_seed(config.seed)
        rounds = self.stored or self.agent.precision == torch.bfloat16
        self.correction = correction_of(config, rounds)
        self.kl_coef = config.kl_coef
        coef = config.loss_kl_coef
        self.loss_kl_coef = _LOSS_KL.get(config.variant, 0.0) if coef is None else coef
        self.watch = rewards.Watch()
        self.history = History()
        self.updates = 0
        self.last_batch: Experience | None = None

    def iteration(self) -> tuple[Record, Experience]:
        """One update: its record for the log, and the samples that it learnt from."""
        phases = Phases(self.device)
        before = self.evaluation.measure(phases) if self.evaluation and not self.updates else {}
        sample, told = self._collect(phases)
        seqs = sample.learnt(self.config)
        record: Record = {
            "update": self.updates,
            **told,
            **sample.lengths(),
            "reward_std": sample.scores.std,
            "dropped": sample.scores.faults,
            "batch": len(sample.prompts),
            "seconds": phases.seconds,
            **{f"{name}_before": value for name, value in before.items()},
        }
        if seqs.mask.any():
            record |= self._learn(sample, seqs, phases)
            # Without its ids, which may be more than all else and are drawn anew to compare.
            plain = Rollout(sample.rollout.seqs._replace(support=None), sample.rollout.logprobs)
            self.last_batch = None if self.stored else sample._replace(rollout=plain)
        took = sum(s for phase, s in phases.seconds.items() if phase != "evaluation")
        tokens = int(sample.rollout.seqs.mask.sum())
        record["tokens_per_second"] = tokens / took if took else math.nan
        self.updates += 1
        if self.evaluation and self.evaluation.due(self.updates):
            record |= self.evaluation.measure(phases)
        self.history.append(record)
        return record, sample

    def _prompt_streams(
        self, prompts: Iterable[Any], held_out: Iterable[Any] | None
    ) -> tuple[PromptStream, list[Prompt]]:
        """The texts that the model reads in training and in evaluations.

        A check that the reward's columns are there.
        """
        c = self.config
        rows, held = as_rows(prompts, c.prompt_field), list[Row]()
        if c.eval_every == 0:
            if held_out is not None:
                raise OptionError("held_out must be absent with eval_every 0, got prompts")
        elif held_out is None:
            rows, held = evaluate.held_out(rows, c.eval_prompts)
        else:
            held = as_rows(held_out, c.prompt_field)[: c.eval_prompts]
        if held and rewards.learns(self.reward):
            raise OptionError(
                f"eval_every must be 0 with a reward that learns from calls, got {c.eval_every}"
            )
        for some in (rows, held) if held else (rows,):
            rewards.taken(self.reward, columns_of(some))  # raises for one that is not there
        made, tested = (rendered(x, self.tokenizer, c.chat, c.system) for x in (rows, held))
        return PromptStream(made, c.seed), tested

    def _collect(self, phases: Phases) -> tuple[Experience, Record]:
        """The samples of one update: stored ones, or sampled and rewarded now."""
        if isinstance(self.prompts, TransitionStream):
            sample = self.prompts.next(self.config.batch)
            return sample, {"reward": sample.scores.mean}

        def check(scores: Scores) -> Scores:
            return self.watch.checked(scores, self.history.column("reward").tolist())

        return self.collector.groups(self.prompts.next, phases, check)

    def _learn(self, sample: Experience, seqs: Sequences, phases: Phases) -> Record:
        """Learn from the rewarded sequences `seqs`; the rest of the record."""
        c, rollout, scores = self.config, sample.rollout, sample.scores
        plan = self.plan()
        parts = [rows for part in plan for rows in part]
        # Shards belong to one forward and its backward at a time.
        ahead = Ahead() if self.first_batch.repeats and not self.ranks.sharded else None
        self.first_batch.check_head(seqs, parts)

        # 3. Score every token with policy, reference and critic.
        with phases.timed("scoring"):
            scored = score(self.agent, seqs, parts, self.backend, ahead)
        gap = (rollout.logprobs - scored.old)[seqs.mask].abs()
        if not self.stored:
            self.first_batch.check_gap(gap)

        with phases.timed("advantages"):
            # 4. Estimate advantages and returns from rewards, KL and values.
            batch, kl = advantages(
                c, self.kl_coef, seqs, scored, scores, self.backend, sample.token_rewards
            )
            # 5. Correct for what another policy sampled.
            batch, correcting = corrected(batch, rollout, self.correction, self.backend)

        # 6. Update policy and critic.
        share = lr_share(c, self.updates)
        self.agent.set_lr(share)
        with phases.timed("update"):
            done = update(
                self.agent, batch, plan, self.loss_kl_coef, self.shuffling, self.backend, ahead
            )
        self.first_batch.repeats |= done.steps > 0
        record: Record = {
            "lr": c.lr * share,
            "kl": kl,
            "kl_coef": self.kl_coef,
            "loss_kl_coef": self.loss_kl_coef,
            "rollout_gap_max": float(gap.max()),
            "rollout_gap_mean": float(gap.mean()),
            **done.record(),
            **supported(seqs, rollout),
            **taught(c, seqs, scored),
            **correcting,
        }
        if c.critic_lr is not None:
            record["critic_lr"] = c.critic_lr * share
        if done.stats is not None:
            record |= numbers(self.agent, done.stats)

        # 7. Move the KL coefficients towards their targets.
        if c.kl_target is not None:
            n = sum(scores.kept)
            self.kl_coef = adapt_reward_kl(self.kl_coef, kl, c.kl_target, n, c.kl_horizon)
        if c.variant == "penalty" and done.last is not None:
            reached = done.last.compute()["kl_k3"]
            self.loss_kl_coef = adapt_penalty(self.loss_kl_coef, reached, c.penalty_target)
        return record

    @property
    def eos(self) -> list[int]:
        """The tokens that end a completion."""
        return self.sampler.eos

    def plan(self) -> Plan:
        """The minibatches of a first epoch."""
        c = self.config
        forward = c.micro_batch * self.ranks.size
        return make_plan(c.sequences, c.minibatches, forward, self.shuffling)

    def state_dict(self) -> state.Tree:
        """Everything that updates change, as tensors and JSON values; tensors are the live ones.

        Shards are gathered, so every rank must ask. The learning rate's schedule is a function of
        `updates`; log and samples are cut back to that number by whoever restores.
        """
        reward: Any = self.reward
        return {
            "updates": self.updates,
            "kl_coef": self.kl_coef,
            "loss_kl_coef": self.loss_kl_coef,
            **state.agent_state(self.agent),
            "prompts": self.prompts.state_dict(),
            "random": state.random_state(self.device, self.sampler.generator, self.shuffling),
            "reward": reward.state_dict() if hasattr(reward, "state_dict") else None,
        }

    def load_state_dict(self, saved: state.Tree) -> None:
        """Continue where `state_dict` was taken; the agent takes over the tensors of `saved`."""
        state.load_agent_state(self.agent, saved)
        self.updates = saved["updates"]
        self.kl_coef, self.loss_kl_coef = saved["kl_coef"], saved["loss_kl_coef"]
        self.prompts.load_state_dict(saved["prompts"])
        if saved["reward"] is not None:
            reward: Any = self.reward
            reward.load_state_dict(saved["reward"])
        state.set_random_state(
            self.device, self.sampler.generator, self.shuffling, saved["random"]
        )

    def identity(self) -> state.Tree:
        """JSON values in which a checkpoint and the run that resumes from it must agree.

        The options that move the mathematics, the prompts, and a sha256 over every frozen weight:
        the base model under the trained weights, and the reference, and another of a teacher's.
        """
        options = dataclasses.asdict(self.config)
        used = {"device": self.device.type, "backend": self.backend}
        kept = {k: v for k, v in (options | used).items() if k not in state.FREE}
        kept |= {name: list(kept[name]) for name in ("stop", "reject")}  # as JSON has them
        if isinstance(self.prompts, PromptStream):
            kept["the columns' sha256"] = self.prompts.columns_digest()
        if self.config.lr_schedule != "constant":
            kept["updates, which the schedule needs,"] = self.config.updates
        if (teacher := state.digest_of_teacher(self.agent)) is not None:
            kept["the teacher's sha256"] = teacher
        return kept | {
            "the prompts' sha256": self.prompts.digest(),
            "the frozen weights' sha256": state.digest_of_frozen(self.agent),
        }
