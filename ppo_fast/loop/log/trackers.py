"""Trackers that get the log's numbers: TensorBoard and those of accelerate."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ppo_fast.loop.config import OptionError, TrainConfig
from ppo_fast.loop.data.packages import require
from ppo_fast.loop.log.fields import Record
from ppo_fast.loop.values import described

PROJECT = "ppo_fast"  # the trackers' project or experiment
# Tags as TRL's PPO trainer groups them (trl 1.12, experimental/ppo): the objective, the policy's
# update, the losses and what is watched.
TAGS = {
    "reward": "objective/scores",
    "reward_std": "objective/scores_std",
    "kl": "objective/kl",
    "kl_coef": "objective/kl_coef",
    "entropy": "objective/entropy",
    "divergence": "objective/divergence",
    "z_loss": "loss/z_loss_avg",
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
    "response_length": "completions/mean_length",
    "ended": "completions/ended",
    "eval_reward": "eval/reward",
    "eval_best": "eval/best",
    "loss_kl_coef": "loss/kl_coef",
    "lr": "lr",
    "critic_lr": "critic_lr",
    "tokens_per_second": "perf/tokens_per_second",
}


class TrackerError(RuntimeError):
    """A tracker that does not start."""


def numbers(record: Record) -> dict[str, float]:
    """The finite numbers of a record, and the phases' seconds, by tag."""
    found = {tag: record.get(name, math.nan) for name, tag in TAGS.items()}
    found |= {f"seconds/{phase}": s for phase, s in record["seconds"].items()}
    found["objective/dropped"] = len(record["dropped"])
    found |= {f"objective/scores/{name}": x for name, x in record.get("rewards", {}).items()}
    return {tag: number for tag, number in found.items() if math.isfinite(number)}


def check(config: TrainConfig) -> None:
    """Look for the trackers that the options name, without starting any.

    Raises OptionError for one that accelerate does not know, and ModuleNotFoundError for one whose
    package is not installed.
    """
    for name in config.trackers():
        if name == "tensorboard":
            there = importlib.util.find_spec("tensorboard") is not None
        else:
            tracking = require("accelerate.tracking", "accelerate")
            known = tracking.LOGGER_TYPE_TO_CLASS
            if name not in known:
                raise OptionError(f"track must be of {', '.join(sorted(known))}, got {name!r}")
            # One that was registered by hand is none of these, and has no package to look for.
            own = name not in tracking.LoggerType.list()
            there = own or name in map(str, tracking.get_available_trackers())
        if not there:
            raise ModuleNotFoundError(
                f"No module named {name!r}; track {name} needs: pip install {name}"
            )


class Board:
    """TensorBoard's files in a folder.

    After a resume, `done` updates count; what the folder has of later ones is not shown.
    """

    def __init__(self, folder: Path, done: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=done)

    def update(self, record: Record) -> None:
        """Write one finished update."""
        for tag, number in numbers(record).items():
            self._writer.add_scalar(tag, number, record["update"])
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class Trackers:
    """The trackers of accelerate that the options name, each with the options as its run's config.

    One that fails later is reported to `say` and gets nothing more; the run goes on. Raises
    `TrackerError` for one that does not start.
    """

    def __init__(self, config: TrainConfig, say: Callable[[str], None]) -> None:
        self._say = say
        self._running: dict[str, Any] = {}
        for name in config.trackers():
            if name != "tensorboard":
                try:
                    self._running[name] = _started(name, config)
                except Exception as error:  # whatever a tracker raises: no login, no network
                    self.close()
                    raise TrackerError(
                        f"track {name} did not start: {described(error)}"
                    ) from error

    def update(self, record: Record) -> None:
        """Log one finished update, as the step of its number."""
        found, step = numbers(record), record["update"]
        self._each(f"update {step}", lambda tracker: tracker.log(found, step=step))

    def close(self) -> None:
        """End the trackers' runs."""
        self._each("the end", lambda tracker: tracker.finish())
        self._running.clear()

    def _each(self, at: str, act: Callable[[Any], None]) -> None:
        for name, tracker in list(self._running.items()):
            try:
                act(tracker)
            except Exception as error:  # whatever a tracker raises, it does not cost the run
                del self._running[name]
                self._say(
                    f"warning: track {name} failed at {at} and gets nothing more, the run goes on:"
                    f" {described(error)}"
                )


def _started(name: str, config: TrainConfig) -> Any:
    """A tracker of accelerate, started as its `Accelerator.init_trackers` does."""
    tracking = require("accelerate.tracking", "accelerate")
    tracking.PartialState()  # without which accelerate's logging raises
    kind, run = tracking.LOGGER_TYPE_TO_CLASS[name], config.out.name
    named = {"wandb": {"name": run, "dir": str(config.out)}, "mlflow": {"run_name": run}}
    project = os.environ.get("WANDB_PROJECT", PROJECT) if name == "wandb" else PROJECT
    folder = [str(config.out)] if kind.requires_logging_directory else []
    tracker = kind(project, *folder, **named.get(name, {}))
    tracker.start()
    tracker.store_init_configuration(
        json.loads(json.dumps(dataclasses.asdict(config), default=str))
    )
    return tracker
