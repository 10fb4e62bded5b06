"""A run whose reward is trained alongside goes on from a checkpoint to the bit."""

from __future__ import annotations

from pathlib import Path

import torch
from loop_helpers import TEXTS, trainer, weights

from ppo_fast.loop import Trainer
from ppo_fast.loop.checkpoint.folder import read, write
from ppo_fast.loop.rewards.gail import Discriminator


class Lengths:
    """An encoder of two numbers: letters and blanks."""

    def __init__(self) -> None:
        self.model = torch.nn.Linear(1, 1)
        self.model.config = type("Config", (), {"hidden_size": 2})()
        self.model.device = torch.device("cpu")

    def __call__(self, texts: list[str]) -> torch.Tensor:
        return torch.tensor([[len(t) / 9, t.count(" ") / 2] for t in texts])


def made(out: Path) -> Trainer:
    rows = [{"prompt": text, "reference": "of great warmth and wit"} for text in TEXTS]
    return trainer(out, Discriminator(Lengths(), seed=0), prompts=rows)  # type: ignore[arg-type]


def test_a_discriminator_is_part_of_the_checkpoint(tmp_path: Path) -> None:
    through, stopped, resumed = (made(tmp_path / name) for name in ("a", "b", "c"))
    rewards = [through.step()["reward"] for _ in range(4)]
    for _ in range(2):
        stopped.step()
    (tmp_path / "kept").mkdir()
    write(tmp_path / "kept", {"identity": {}, "state": stopped.state_dict()}, 2)
    resumed.load_state_dict(read(tmp_path / "kept")["state"])
    assert [resumed.step()["reward"] for _ in range(2)] == rewards[2:]
    assert all(map(torch.equal, weights(resumed), weights(through)))
    a, b = through.reward.state_dict(), resumed.reward.state_dict()  # type: ignore[attr-defined]
    assert len(a) == 4 + 4 * 3 and all(torch.equal(a[k], b[k]) for k in a)
