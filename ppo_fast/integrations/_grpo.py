"""Policy terms of TRL's GRPO, and of ms-swift's, as ppo_loss's options."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ppo_fast import Surrogate, TokenTerms


def cispo(high: float) -> dict[str, Any]:
    """−A·sg(min(ρ, high))·logprobs; the bound is the ratio's own, not its distance from 1."""
    if high < 1.0:
        return {"variant": "reinforce", "ratio_cap": high}
    return {"variant": "cispo", "clip_low": 1.0, "clip_high": high - 1.0}


def clip(low: float, high: float, delta: float | None) -> dict[str, Any]:
    """−min(min(ρ, δ)·A, clip(ρ, 1 − low, 1 + high)·A); δ None bounds nothing.

    The smaller of δ and 1 + high bounds ρ where A > 0, and the larger where A < 0, which is the
    dual clip.
    """
    low = min(low, 1.0)
    if delta is None:
        return {"variant": "clip", "clip_low": low, "clip_high": high}
    least, most = sorted((delta, 1.0 + high))
    if least < 1.0 or most == 1.0:
        bounds = (1.0 - low, least, most)
        return {"variant": Surrogate(partial(two_sided, bounds))}
    return {"variant": "clip", "clip_low": low, "clip_high": least - 1.0, "dual_clip": most}


def two_sided(bounds: tuple[float, float, float], t: TokenTerms) -> tuple[Tensor, Tensor]:
    """−A·min(ρ, least) where A > 0, else −A·clip(ρ, low, most); any bounds."""
    low, least, most = bounds
    ratio = t.ratio.detach()
    held = torch.where(t.advantages > 0, ratio.clamp(max=least), ratio.clamp(low, most))
    dropped = (held != ratio) & (ratio >= 0)  # a NaN is not dropped
    passing = torch.where(dropped, 0.0, t.log_ratio).exp()
    return -t.advantages * torch.where(dropped, held, passing), dropped
