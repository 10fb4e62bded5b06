"""Reward functions fn(prompts, completions, **columns) -> list[float], and safe calls of them."""

from ppo_fast.loop.rewards.calls import (
    RewardError,
    RewardFn,
    RewardLengthError,
    learns,
    taken,
)
from ppo_fast.loop.rewards.load import REWARDS, load_reward
from ppo_fast.loop.rewards.scoring import rewarded, score, shaped
from ppo_fast.loop.rewards.text import letters
from ppo_fast.loop.rewards.watch import NoRewardError, Watch

__all__ = [
    "REWARDS",
    "NoRewardError",
    "RewardError",
    "RewardFn",
    "RewardLengthError",
    "Watch",
    "learns",
    "letters",
    "load_reward",
    "rewarded",
    "score",
    "shaped",
    "taken",
]
