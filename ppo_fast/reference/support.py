"""Kept ids of a support, as multiplicities over the whole vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_fast.support import Support


def multiplicity(support: Support, tokens: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """Multiplicity of every id, (..., V) fp64, and True for rows with a wrong id, (...).

    A row's own token is kept once at least; a row with nothing kept keeps every id.
    """
    n, rows, ids = tokens.numel(), support.row_of_pairs().long(), support.ids.long()
    legal = (ids >= 0) & (ids < vocab)
    times = torch.zeros(n, vocab, dtype=torch.float64, device=tokens.device)
    at = (rows, ids.clamp(0, vocab - 1))
    times = times.index_put(at, legal.double(), accumulate=True)
    wrong = torch.zeros(n, dtype=torch.int64, device=tokens.device)
    wrong = wrong.index_add(0, rows, (~legal).long()) > 0
    label = tokens.reshape(-1, 1).long().clamp(0, vocab - 1)
    times = times.scatter(1, label, times.gather(1, label).clamp(min=1))
    times = torch.where(support.whole[:, None], 1.0, times)
    return times.view(*tokens.shape, vocab), wrong.view(tokens.shape)


def log_multiplicity(support: Support, tokens: Tensor, keep: Tensor, like: Tensor) -> Tensor:
    """ln of it, in the type of `like`: NaN in rows with a wrong id, 0 where not kept."""
    times, wrong = multiplicity(support, tokens, like.shape[-1])
    times = torch.where(wrong[..., None], torch.nan, times)
    return torch.where(keep[..., None], times, 1.0).log().to(like.dtype)
