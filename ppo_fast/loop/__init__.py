"""A minimal PPO loop for transformers causal language models, built on the ops of ppo_fast."""

from ppo_fast.loop.agent import NonFiniteGradientError
from ppo_fast.loop.checkpoint import CheckpointError
from ppo_fast.loop.config import TrainConfig
from ppo_fast.loop.layers import UnsupportedModelError
from ppo_fast.loop.lock import RunLockedError
from ppo_fast.loop.memory import OutOfMemoryStopError
from ppo_fast.loop.parallel import RankFailedError, processes
from ppo_fast.loop.rewards import NoRewardError, RewardError, RewardLengthError
from ppo_fast.loop.trainer import Outcome, Trainer, train
from ppo_fast.loop.transitions import TransitionsError

__all__ = [
    "CheckpointError",
    "NoRewardError",
    "NonFiniteGradientError",
    "OutOfMemoryStopError",
    "Outcome",
    "RankFailedError",
    "RewardError",
    "RewardLengthError",
    "RunLockedError",
    "TrainConfig",
    "Trainer",
    "TransitionsError",
    "UnsupportedModelError",
    "processes",
    "train",
]
