"""Repeated evaluation of the policy on prompts that it is not trained on."""

from __future__ import annotations

import json

import torch

from ppo_fast.loop.collect import Collector
from ppo_fast.loop.config import OptionError
from ppo_fast.loop.data.prompts import Prompt, Row
from ppo_fast.loop.data.sequences import Scores
from ppo_fast.loop.log.history import mean
from ppo_fast.loop.log.meter import Phases


def held_out(rows: list[Row], n: int) -> tuple[list[Row], list[Row]]:
    """The rows but the last `n`, and these; prompts that are among both are left to the last.

    Raises OptionError where nothing is left to train on.
    """
    held = rows[-n:]
    known = {json.dumps(row.prompt) for row in held}
    left = [row for row in rows[:-n] if json.dumps(row.prompt) not in known]
    if not left:
        raise OptionError(
            f"eval_prompts must leave prompts to train on, got {n} of {len(rows)}: lower it, or"
            " give eval_data"
        )
    return left, held


class Evaluation:
    """Mean reward of a policy's completions of `prompts`, and of each prompt's best."""

    def __init__(self, collector: Collector, prompts: list[Prompt]) -> None:
        self.collector, self.prompts = collector, prompts

    def due(self, updates: int) -> bool:
        """True after that many updates: every `eval_every`, and at the end."""
        c = self.collector.config
        return updates % c.eval_every == 0 or updates == c.updates

    def measure(self, phases: Phases) -> dict[str, float]:
        """`eval_reward` and `eval_best` of `eval_samples` completions a prompt.

        Every evaluation of a run draws with the same random numbers, so that what differs is the
        policy. Completions without a reward are left out, and `eval_dropped` counts them.
        """
        c, seed = self.collector.config, self.collector.config.seed
        generator = torch.Generator(self.collector.sampler.device).manual_seed(seed)
        own = Phases(phases.device)  # not the training's rollout and reward
        rewards: list[list[float]] = []
        at_once = max(1, c.sequences // c.eval_samples)
        with phases.timed("evaluation"):
            for first in range(0, len(self.prompts), at_once):
                some = self.prompts[first : first + at_once]
                repeated = [prompt for prompt in some for _ in range(c.eval_samples)]
                scores = self.collector.sample(repeated, own, _without_errors, generator).scores
                for i in range(0, len(repeated), c.eval_samples):
                    rows = range(i, i + c.eval_samples)
                    rewards.append([scores.values[j] for j in rows if j not in scores.faults])
        found = {
            "eval_reward": mean([value for one in rewards for value in one]),
            "eval_best": mean([max(one) for one in rewards if one]),
        }
        lost = len(self.prompts) * c.eval_samples - sum(map(len, rewards))
        return found | ({"eval_dropped": lost} if lost else {})


def _without_errors(scores: Scores) -> Scores:
    """The scores as other ranks may get them: exceptions hold frames."""
    scores.errors = []
    return scores
