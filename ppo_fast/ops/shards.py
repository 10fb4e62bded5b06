"""A vocabulary split over ranks: merging what each rank knows of a row's softmax.

Every rank holds an equal share of the weight's rows, in rank order, and all tokens. Per token four
numbers travel: the share's maximum m, Σ e^(z−m), Σ (z−m) e^(z−m), and the token's own logit on
the rank that holds it. They are merged in rank order, so every rank has the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Softmax(NamedTuple):
    """What a row's log-probability, entropy and gradient are made of, each (R,)."""

    logprobs: Tensor
    entropy: Tensor
    row_max: Tensor
    log_sum: Tensor


class Shard:
    """This rank's rows of the vocabulary: [first, first + size)."""

    def __init__(self, group: dist.ProcessGroup, size: int) -> None:
        self.group, self.size = group, size
        self.first = dist.get_rank(group) * size
        self.vocab = dist.get_world_size(group) * size

    def local(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Each token's row here (0 where it is elsewhere), and whether it is here."""
        here = (tokens >= self.first) & (tokens < self.first + self.size)
        return torch.where(here, tokens - self.first, torch.zeros_like(tokens)), here

    def merge(self, part: Softmax, z: Tensor, heat: Tensor | float, tokens: Tensor) -> Softmax:
        """The whole vocabulary's softmax, from this share's and its logits z (R, V)."""
        label, here = self.local(tokens)
        own = z.gather(1, label.long()[:, None])[:, 0] / heat
        # A share of −inf alone has no weight; alone it is no distribution, hence its NaN.
        dead = z.amax(1).isneginf()
        zero = torch.zeros_like(own)
        total = torch.where(dead, zero, part.log_sum.exp())
        mine = torch.stack([
            torch.where(dead, zero - float("inf"), part.row_max),
            total,
            torch.where(dead, zero, (part.log_sum - part.entropy) * total),
            torch.where(here, own, zero),
        ])  # fmt: skip
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, mine, group=self.group)
        return self._fold(parts, tokens)

    def _fold(self, parts: list[Tensor], tokens: Tensor) -> Softmax:
        row_max = torch.stack([part[0] for part in parts]).amax(0)
        total, dot, label = (torch.zeros_like(row_max) for _ in range(3))
        for m, s, t, own in parts:
            delta = m - row_max
            scale = delta.exp()
            total = total + s * scale
            dot = dot + torch.where(s == 0, s, (t + delta * s) * scale)
            label = label + own
        log_sum = total.log()
        outside = (tokens < 0) | (tokens >= self.vocab)
        poison = torch.where(outside, float("nan"), 0.0).to(total.dtype)
        return Softmax(
            (label - row_max) - log_sum + poison, log_sum - dot / total + poison, row_max, log_sum
        )

    def spread_gradient(self, z: Tensor, heat: Tensor | float, part: Softmax, tokens: Tensor,
                        upstream: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Column 0's gradient where the token is on another rank, and which rows those are.

        There the kernel takes column 0 for the token; its logit is replaced by a finite one that
        it reads nothing from, and the caller writes this gradient over its result.
        """
        _, here = self.local(tokens)
        g, h = upstream
        ln_p = z[:, 0] / heat - part.row_max - part.log_sum
        p = ln_p.exp()
        slope = torch.where(p == 0, p, p * (g + h * (ln_p + part.entropy)))
        z[:, 0] = torch.where(here, z[:, 0], torch.zeros_like(p))
        return -slope / heat, ~here
