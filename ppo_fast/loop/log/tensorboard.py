"""The log's numbers for TensorBoard; `log.jsonl` stays the source."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ppo_fast.loop.data.packages import require_installed

# Tags as TRL's PPO trainer groups them (trl 1.12, experimental/ppo): the objective, the policy's
# update, the losses and what is watched.
TAGS = {
    "reward": "objective/scores",
    "kl": "objective/kl",
    "kl_coef": "objective/kl_coef",
    "entropy": "objective/entropy",
    "kl_k3": "policy/approxkl_avg",
    "clip_frac": "policy/clipfrac_avg",
    "ess": "policy/ess",
    "grad_norm": "policy/grad_norm",
    "policy_loss": "loss/policy_avg",
    "value_loss": "loss/value_avg",
    "vf_clip_frac": "val/clipfrac_avg",
    "explained_variance": "val/explained_variance",
    "ratio_mean": "val/ratio",
    "ratio_min": "val/ratio_min",
    "ratio_max": "val/ratio_max",
    "rollout_gap_mean": "val/rollout_gap",
    "lr": "lr",
    "tokens_per_second": "perf/tokens_per_second",
}


def require_tensorboard() -> None:
    """Raise ModuleNotFoundError where TensorBoard is not installed."""
    require_installed("tensorboard", "tensorboard", "pip install tensorboard")


class Board:
    """Writes every finite number of a record, and the phases' seconds, at its update.

    After a resume, `done` updates count; what the folder has of later ones is not shown.
    """

    def __init__(self, folder: Path, done: int | None = None) -> None:
        require_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=done)

    def update(self, record: dict[str, Any]) -> None:
        """Write one finished update."""
        numbers = {tag: record.get(name, math.nan) for name, tag in TAGS.items()}
        numbers |= {f"seconds/{phase}": s for phase, s in record["seconds"].items()}
        numbers["objective/dropped"] = len(record["dropped"])
        for tag, number in numbers.items():
            if math.isfinite(number):
                self._writer.add_scalar(tag, number, record["update"])
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
