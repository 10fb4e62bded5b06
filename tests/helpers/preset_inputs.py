"""Random rollouts of responses and of environments, for the presets."""

from __future__ import annotations

from typing import NamedTuple

import torch
from conftest import ON_GPU
from torch import Tensor

ENVS, STEPS = 4, 24


class Rollout(NamedTuple):
    """A score per response, the rest per token, rounded to what the backend takes."""

    scores: Tensor
    rewards: Tensor
    values: Tensor
    logprobs: Tensor
    ref: Tensor
    mask: Tensor

    def wide(self) -> Rollout:
        """As the peers get it: the same rounded numbers in fp64."""
        return Rollout(*(x.double() for x in self[:-1]), self.mask)

    def on(self, device: str) -> Rollout:
        return Rollout(*(x.to(device) for x in self))


def rollout(dtype: torch.dtype, mask: str, rows: int = 8, steps: int = 21) -> Rollout:
    """ "holes": masked tokens anywhere. "right": right-padded, one row full, one of one token."""
    g = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    keep = torch.rand(rows, steps, generator=g) < 0.6
    if mask == "right":
        lengths = torch.randint(2, steps, (rows,), generator=g)
        lengths[:2] = torch.tensor([steps, 1])
        keep = torch.arange(steps) < lengths[:, None]
    logprobs = -normal(rows, steps).abs()
    rewards, values, gap = (normal(rows, steps) for _ in range(3))
    floats = (normal(rows), rewards, values, logprobs, logprobs - gap / 2)
    return Rollout(*(x.to(dtype) for x in floats), keep)


class Episodes(NamedTuple):
    """`(ENVS, STEPS)` steps of several episodes; V' is V of the next step but where one ends."""

    rewards: Tensor
    values: Tensor
    next_values: Tensor
    terminated: Tensor
    truncated: Tensor

    @property
    def done(self) -> Tensor:
        return self.terminated | self.truncated

    def wide(self) -> Episodes:
        return Episodes(*(x.double() for x in self[:3]), *self[3:])

    def on(self, device: str) -> Episodes:
        return Episodes(*(x.to(device) for x in self))

    def kwargs(self) -> dict[str, Tensor]:
        return self._asdict()


def episodes(backend: str) -> Episodes:
    g = torch.Generator().manual_seed(11)
    dtype = torch.float32 if backend in ON_GPU else torch.float64
    shape = (ENVS, STEPS)
    rewards, values, final = (
        torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for _ in range(3)
    )
    dice = torch.rand(shape, generator=g)
    terminated, truncated = dice < 0.1, dice > 0.9
    terminated[0, -1], truncated[1, -1] = True, True
    terminated[2:, -1], truncated[2:, -1] = False, False
    after = torch.cat([values[:, 1:], final[:, -1:]], 1)
    return Episodes(
        rewards, values, torch.where(terminated | truncated, final, after), terminated, truncated
    )
