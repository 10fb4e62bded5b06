"""The clipped value loss."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_fast._results import Loss
from ppo_fast._sequences import Sequences
from ppo_fast.reference.common import clamp, keep_of, reduce_loss, select, stats_of


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor | None = None,
    *,
    clip: float | None = 0.2,
    form: str = "max",
    scale: float = 0.5,
    reduction: str = "token-mean",
    denom: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Loss:
    """scale·max((v−R)², (clip(v)−R)²) ("max", as OpenAI's ppo2), or its clipped term alone."""
    keep = keep_of(values, mask)
    seqs = Sequences(keep, cu_seqlens)
    new = select(keep, values)
    target = select(keep, returns).to(new.dtype)
    old = new.detach() if old_values is None else select(keep, old_values).to(new.dtype)
    plain = (new - target) ** 2
    active = torch.zeros_like(keep)
    terms = plain
    if clip is not None:
        bounded = clamp(new, old - clip, old + clip)
        clipped = (bounded - target) ** 2
        if form == "max":
            active = clipped > plain
            terms = torch.where(active, clipped.detach(), plain)
        else:
            active = (new > old + clip) | (new < old - clip)
            terms = clipped
        # Comparisons pass over a NaN: one in the old value is put into value and slope.
        unknown = ~(old - clip <= old + clip)
        shown = torch.where(unknown, new, 0.0) * torch.where(unknown, float("nan"), 1.0)
        terms = torch.where(unknown, shown, terms)
    loss, weights, own = reduce_loss(scale * terms, seqs, reduction, denom)
    ret, err = target.double(), target.double() - old.double()
    sums = {"vf_loss": weights * scale * terms, "vf_clip": active, "ret": ret, "ret_sq": ret * ret}
    sums |= {"err": err, "err_sq": err * err}
    stats = {name: torch.where(keep, x.detach().double(), 0.0).sum() for name, x in sums.items()}
    return Loss(loss, stats_of(new.device, vf_n_tokens=keep.sum(), vf_loss_denom=own, **stats))
