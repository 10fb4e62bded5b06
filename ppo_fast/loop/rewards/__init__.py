"""Reward functions fn(prompts, completions) -> list[float], and calling them safely."""

from ppo_fast.loop.rewards.load import REWARDS, load_reward
from ppo_fast.loop.rewards.scoring import RewardFn, RewardLengthError, Scores, score, shaped
from ppo_fast.loop.rewards.text import letters

__all__ = [
    "REWARDS",
    "RewardFn",
    "RewardLengthError",
    "Scores",
    "letters",
    "load_reward",
    "score",
    "shaped",
]
