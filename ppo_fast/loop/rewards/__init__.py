"""Reward functions fn(prompts, completions) -> list[float], and calling them safely."""

from ppo_fast.loop.data.sequences import Scores
from ppo_fast.loop.rewards.calls import RewardError, RewardFn, RewardLengthError
from ppo_fast.loop.rewards.load import REWARDS, load_reward
from ppo_fast.loop.rewards.scoring import score, shaped
from ppo_fast.loop.rewards.text import letters
from ppo_fast.loop.rewards.watch import NoRewardError, Watch

__all__ = [
    "REWARDS",
    "NoRewardError",
    "RewardError",
    "RewardFn",
    "RewardLengthError",
    "Scores",
    "Watch",
    "letters",
    "load_reward",
    "score",
    "shaped",
]
