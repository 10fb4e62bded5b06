"""Collection of samples: completions of prompts, and the rewards of these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ppo_fast.loop import rewards
from ppo_fast.loop.config import TrainConfig
from ppo_fast.loop.data.experience import Experience, joined
from ppo_fast.loop.data.prompts import Prompt, columns_of
from ppo_fast.loop.data.sequences import Scores
from ppo_fast.loop.log.history import mean
from ppo_fast.loop.log.meter import Phases
from ppo_fast.loop.ranks.ranks import Ranks
from ppo_fast.loop.sampling.sampler import Sampler

Check = Callable[[Scores], Scores]


class Collector:
    """Completions of prompts by the sampler, rewarded on the first rank."""

    def __init__(
        self,
        config: TrainConfig,
        sampler: Sampler,
        reward: rewards.RewardFn,
        ranks: Ranks,
        backend: str,
    ) -> None:
        self.config, self.sampler, self.reward = config, sampler, reward
        self.ranks, self.backend = ranks, backend

    def sample(
        self,
        prompts: list[Prompt],
        phases: Phases,
        check: Check,
        generator: torch.Generator | None = None,
    ) -> Experience:
        """A completion of each prompt and its reward; `check` sees the scores, on the first rank.

        `generator` takes the place of the sampler's own.
        """
        read = [prompt.text for prompt in prompts]

        # 1. Sample a completion of each prompt.
        with phases.timed("rollout"):
            rollout = self.sampler.rollout(read, self.backend, generator)
        texts, ended = self.sampler.completions(rollout.seqs)

        # 2. Reward them, on the first rank.
        def rewarded() -> Scores:
            rows = [prompt.row for prompt in prompts]
            plain, columns = [row.prompt for row in rows], columns_of(rows)
            lengths = rollout.seqs.mask.sum(1).tolist()
            scores = rewards.rewarded(
                self.reward, self.config, plain, texts, ended, lengths, columns
            )
            return check(scores)

        with phases.timed("reward"):
            scores = self.ranks.from_first(rewarded)
        return Experience(read, texts, rollout, scores, ended)

    def groups(
        self, take: Callable[[int], list[Prompt]], phases: Phases, check: Check
    ) -> tuple[Experience, dict[str, Any]]:
        """`batch` groups of completions, and for the log what was sampled for them.

        With `dynamic_filtering`, groups whose rewards are alike make room for others, in as many
        rollouts as that allows; then what still lacks is made up of those.
        """
        c = self.config
        differing: list[Experience] = []
        alike: list[Experience] = []
        seen: list[Scores] = []
        for _ in range(max(1, c.dynamic_filtering)):
            prompts = [prompt for prompt in take(c.batch) for _ in range(c.group)]
            sample = self.sample(prompts, phases, check)
            seen.append(sample.scores)
            for first in range(0, len(prompts), c.group):
                one = sample.rows(list(range(first, first + c.group)))
                (differing if one.scores.differ else alike).append(one)
            if c.dynamic_filtering == 0 or len(differing) >= c.batch:
                break
        told = _told(seen)
        if c.group > 1:
            told["groups_alike"] = len(alike) / (len(alike) + len(differing))
        if c.dynamic_filtering == 0:
            return sample, told
        told["rollouts"] = len(seen)
        return joined((differing + alike)[: c.batch]), told


def _told(seen: list[Scores]) -> dict[str, Any]:
    """The mean reward of all that was sampled, and each reward's own where there are several."""
    values = [v for s in seen for v, kept in zip(s.values, s.kept, strict=True) if kept]
    told: dict[str, Any] = {"reward": mean(values)}
    if seen[0].parts:
        told["rewards"] = {
            name: mean([v for s in seen for v in s.parts[name]]) for name in seen[0].parts
        }
    return told
