"""A minimal PPO loop for transformers causal language models, built on the ops of ppo_fast."""

from ppo_fast.loop.checkpoint.checkpoints import CheckpointError
from ppo_fast.loop.config import OptionError, TrainConfig
from ppo_fast.loop.data.own import DataError, read_prompts
from ppo_fast.loop.data.transitions import TransitionsError
from ppo_fast.loop.log.lock import RunLockedError
from ppo_fast.loop.log.trackers import TrackerError
from ppo_fast.loop.model.agent import NonFiniteGradientError
from ppo_fast.loop.model.layers import UnsupportedModelError
from ppo_fast.loop.model.memory import OutOfMemoryStopError
from ppo_fast.loop.preflight import RunExistsError
from ppo_fast.loop.ranks.ranks import RankFailedError, processes
from ppo_fast.loop.rewards import NoRewardError, RewardError, RewardLengthError
from ppo_fast.loop.run import Outcome, Trainer, train

__all__ = [
    "CheckpointError",
    "DataError",
    "NoRewardError",
    "NonFiniteGradientError",
    "OptionError",
    "OutOfMemoryStopError",
    "Outcome",
    "RankFailedError",
    "RewardError",
    "RewardLengthError",
    "RunExistsError",
    "RunLockedError",
    "TrackerError",
    "TrainConfig",
    "Trainer",
    "TransitionsError",
    "UnsupportedModelError",
    "processes",
    "read_prompts",
    "train",
]
