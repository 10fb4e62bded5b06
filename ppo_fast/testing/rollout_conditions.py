"""The magnitudes whose roundings reach the weights of other policies' samples.

As `conditions.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_fast._results import ROLLOUT_FIELDS
from ppo_fast._sequences import Sequences
from ppo_fast.reference.common import keep_of
from ppo_fast.testing.calls import Call
from ppo_fast.testing.loss_conditions import Conditions, finite


def rollout_condition(call: Call, exact: dict[str, Tensor], eps: float) -> Conditions:
    """x rounds by |x|, and the weight by that much of itself, or by what its sequence adds up.

    The mask is exact: a token or sequence within a rounding of its bound has no budget. Means are
    sums of terms that round alike, so a sum's own size stands for them; x cancels, so the terms of
    k1 and the perplexities count with the log-probabilities' size.
    """
    t, c = call.tensors, call.options["correction"]
    keep = keep_of(t["old_logprobs"], t.get("mask"))
    seqs = Sequences(keep, t.get("cu_seqlens"))
    x = finite(torch.where(keep, t["old_logprobs"] - t["rollout_logprobs"], 0.0)).abs()
    size = torch.where(keep, finite(t["old_logprobs"]).abs() + x, 0.0)
    level = None if c is None else c.level
    reach = x if level in (None, "token") else seqs.spread(seqs.sum(x))
    weights = exact["weights"] * (1 + reach)
    stats = dict(zip(ROLLOUT_FIELDS, finite(exact["stats"]).abs().clone(), strict=True))
    stats["weight"] = weights.sum()
    stats["weight_sq"] = (weights * exact["weights"]).sum()
    stats["k1"] = x.sum()
    stats["ratio_sq"] = stats["ratio_sq"] * (1 + 2 * x.max())
    stats["seq_ratio_sq"] = stats["seq_ratio_sq"] * (1 + 2 * seqs.sum(x).max())
    for name in ("ppl", "rollout_ppl", "ppl_ratio"):
        stats[name] = stats[name] * (1 + 2 * seqs.mean(size).max())
    return {
        "weights": (8, weights, False),
        "mask": (0, torch.zeros(()), False),
        "stats": (16, torch.stack([stats[name] for name in ROLLOUT_FIELDS]), False),
    }
