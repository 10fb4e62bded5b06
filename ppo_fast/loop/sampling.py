"""Drawing tokens from uniforms."""

from __future__ import annotations

import torch
from torch import Tensor


def draw(logits: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
    """Tokens (B,) of softmax(logits / temperature), logits (B, V), by inversion of the cdf.

    `uniforms` (B,) fp64 lie in [0, 1). The first token whose cdf exceeds a uniform's share of the
    whole sum has a width of its own, so one of probability 0 is never drawn, and the last step of
    the cdf need not be 1. fp64 keeps the widths of rare tokens far out in a large vocabulary.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    cdf = torch.softmax(wide / temperature, dim=-1).cumsum(-1, dtype=torch.float64)
    token = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True)
    return token.squeeze(1).clamp(max=logits.shape[-1] - 1)  # NaN logits: nothing exceeds


def draw_uniforms(generator: torch.Generator, steps: int, total: int) -> Tensor:
    """Numbers in [0, 1), (steps, total) fp64, on the generator's device."""
    return torch.rand(
        steps, total, generator=generator, device=generator.device, dtype=torch.float64
    )
