"""Result tuples and the two mergeable summaries, `Stats` and `Moments`."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# One float64 slot per field. Everything is a sum except the ratio's extremes, so micro-batches
# and ranks merge exactly. `loss_denom` is 0 under "token-sum", where sums are the loss itself.
STATS_FIELDS = (
    "n_tokens",
    "n_seqs",
    "loss",
    "loss_denom",
    "policy_loss",
    "entropy",
    "ref_kl",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "ratio",
    "ratio_sq",
    "clip_low",
    "clip_high",
    "clip_dual",
    "clip_eps",
    "vf_n_tokens",
    "vf_loss",
    "vf_loss_denom",
    "vf_clip",
    "ret",
    "ret_sq",
    "err",
    "err_sq",
    "rollout_tokens",
    "rollout_weight",
    "rollout_weight_sq",
    "rollout_k3",
    "rollout_rejected",
    "rollout_missing",
    "divergence",
    "z_loss",
    "ratio_min",
    "ratio_max",
)
N_STATS = len(STATS_FIELDS)
N_SUMS = N_STATS - 2


class Stats(NamedTuple):
    """Sufficient statistics of one or more loss calls.

    `values` is one float64 tensor `(34,)` on the loss's device, in the order of `STATS_FIELDS`:
    undivided sums and counts, then the smallest and the largest ratio. `a + b` merges
    micro-batches, `all_reduce` merges ranks, `compute` is the caller's own synchronisation.
    """

    values: Tensor

    def __add__(self, other: Stats) -> Stats:  # type: ignore[override]
        return Stats(_merged(self.values, other.values))

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Stats:
        """Merge the statistics of every rank of `group`, in rank order."""
        return Stats(functools.reduce(_merged, _gather(self.values, group)))

    def field(self, name: str) -> Tensor:
        """The raw 0-d float64 slot `name`, one of `STATS_FIELDS`."""
        return self.values[STATS_FIELDS.index(name)]

    def compute(self) -> dict[str, float]:
        """Divide the sums: one device synchronisation. A mean over nothing is NaN, a loss 0.

        `ess` is the effective sample size of the ratios as a share of the tokens,
        (Σρ)² / (n Σρ²); `kl_k1..3` estimate KL(old‖new) from log-probability differences
        (Schulman 2020, "Approximating KL Divergence"). `rollout_*` are of the weights of an
        off-policy correction: their mean and effective sample size, the mean k3 of KL(rollout‖old)
        and the share of rejected tokens; `rollout_missing` counts tokens without a rollout
        log-probability. `divergence` (from a teacher) and `z_loss`, (ln Σe^z)², are means per
        token before their coefficients, and 0 where a loss has no such term.
        """
        s = dict(zip(STATS_FIELDS, self.values.tolist(), strict=True))
        n, m = s["n_tokens"], s["vf_n_tokens"]
        denom, vf_denom = s["loss_denom"] or 1.0, s["vf_loss_denom"] or 1.0
        out = {
            "loss": s["loss"] / denom,
            "policy_loss": s["policy_loss"] / denom,
            "value_loss": s["vf_loss"] / vf_denom,
        }
        for name in ("entropy", "ref_kl", "divergence", "z_loss", "kl_k1", "kl_k2", "kl_k3"):
            out[name] = _ratio(s[name], n)
        out["ratio_mean"] = _ratio(s["ratio"], n)
        out["ratio_min"] = s["ratio_min"] if n else float("nan")
        out["ratio_max"] = s["ratio_max"] if n else float("nan")
        out["ess"] = _ratio(s["ratio"] ** 2, n * s["ratio_sq"])
        out["clip_frac"] = _ratio(s["clip_low"] + s["clip_high"], n)
        for name in ("eps", "low", "high", "dual"):
            out[f"clip_frac_{name}"] = _ratio(s[f"clip_{name}"], n)
        out["vf_clip_frac"] = _ratio(s["vf_clip"], m)
        err_var = s["err_sq"] - _ratio(s["err"] ** 2, m)
        ret_var = s["ret_sq"] - _ratio(s["ret"] ** 2, m)
        out["explained_variance"] = 1.0 - _ratio(err_var, ret_var)
        r = s["rollout_tokens"]
        out["rollout_weight_mean"] = _ratio(s["rollout_weight"], r)
        out["rollout_ess"] = _ratio(s["rollout_weight"] ** 2, r * s["rollout_weight_sq"])
        out["rollout_k3"] = _ratio(s["rollout_k3"], r)
        out["rollout_rejected_frac"] = _ratio(s["rollout_rejected"], r)
        out["rollout_missing"] = s["rollout_missing"]
        out["n_tokens"] = n or m
        out["n_seqs"] = s["n_seqs"]
        return out


# Sums over unmasked tokens, then over sequences that have one, then the weights' extremes.
ROLLOUT_FIELDS = (
    "tokens",
    "missing",
    "rejected",
    "weight",
    "weight_sq",
    "below",
    "above",
    "k1",
    "k3",
    "ratio_sq",
    "seqs",
    "rejected_seqs",
    "seq_ratio_sq",
    "log_ppl",
    "rollout_log_ppl",
    "ppl",
    "rollout_ppl",
    "ppl_ratio",
    "weight_min",
    "weight_max",
)


class RolloutStats(NamedTuple):
    """Distance of a batch's samples from the policy, and the effect of their correction.

    `values` is one float64 tensor `(20,)` on the log-probabilities' device, in the order of
    `ROLLOUT_FIELDS`: undivided sums, then the smallest and the largest weight. It merges as
    `Stats` does. The names of `compute` are those of verl's `rollout_corr` metrics where both
    have one (verl/trainer/ppo/rollout_corr_helper.py).
    """

    values: Tensor

    def __add__(self, other: RolloutStats) -> RolloutStats:  # type: ignore[override]
        return RolloutStats(_merged(self.values, other.values))

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> RolloutStats:
        """Merge the statistics of every rank of `group`, in rank order."""
        return RolloutStats(functools.reduce(_merged, _gather(self.values, group)))

    def field(self, name: str) -> Tensor:
        """The raw 0-d float64 slot `name`, one of `ROLLOUT_FIELDS`."""
        return self.values[ROLLOUT_FIELDS.index(name)]

    def compute(self) -> dict[str, float]:
        """Divide the sums: one device synchronisation. A mean over nothing is NaN.

        `weight_*` and `ess`, (Σw)² / (n Σw²), are of the weights before `normalize`; `frac_low`
        and `frac_high` of the tokens whose ratio is outside of the correction's bounds; `kl` (k1)
        and `k3_kl` estimate KL(rollout‖old) per token; `chi2_token` and `chi2_seq` are E ρ² − 1;
        the perplexities are means of exp(−mean log-prob) over sequences, NaN without sequences.
        """
        s = dict(zip(ROLLOUT_FIELDS, self.values.tolist(), strict=True))
        n, m = s["tokens"], s["seqs"]
        mean = _ratio(s["weight"], n)
        return {
            "weight_mean": mean,
            "weight_std": max(_ratio(s["weight_sq"], n) - mean * mean, 0.0) ** 0.5,
            "weight_min": s["weight_min"] if n else float("nan"),
            "weight_max": s["weight_max"] if n else float("nan"),
            "ess": _ratio(s["weight"] ** 2, n * s["weight_sq"]),
            "frac_low": _ratio(s["below"], n),
            "frac_high": _ratio(s["above"], n),
            "rejected_frac": _ratio(s["rejected"], n),
            "seq_rejected_frac": _ratio(s["rejected_seqs"], m),
            "kl": _ratio(s["k1"], n),
            "k3_kl": _ratio(s["k3"], n),
            "chi2_token": _ratio(s["ratio_sq"], n) - 1.0,
            "chi2_seq": _ratio(s["seq_ratio_sq"], m) - 1.0,
            "ppl": _ratio(s["ppl"], m),
            "rollout_ppl": _ratio(s["rollout_ppl"], m),
            "ppl_ratio": _ratio(s["ppl_ratio"], m),
            "log_ppl_diff": _ratio(s["log_ppl"] - s["rollout_log_ppl"], m),
            "missing": s["missing"],
            "n_tokens": n,
            "n_seqs": m,
        }


class RolloutWeights(NamedTuple):
    """Weights fp32 (fp64 for fp64) and the mask after rejections, in the log-probabilities' shape,
    and the statistics."""

    weights: Tensor
    mask: Tensor
    stats: RolloutStats


class Moments(NamedTuple):
    """Count, mean and sum of squared deviations (M2), one float64 tensor `(3,)`.

    Merging follows Chan, Golub and LeVeque (1979), so ranks and micro-batches add up.
    """

    values: Tensor

    def __add__(self, other: Moments) -> Moments:  # type: ignore[override]
        (n_a, mean_a, m2_a), (n_b, mean_b, m2_b) = self.values.unbind(), other.values.unbind()
        n = n_a + n_b
        share = torch.where(n > 0, n_b / n.clamp(min=1), torch.zeros_like(n))
        delta = mean_b - mean_a
        return Moments(
            torch.stack([n, mean_a + delta * share, m2_a + m2_b + delta * delta * n_a * share])
        )

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Moments:
        """Merge the moments of every rank of `group`, in rank order (deterministic)."""
        merged = _gather(self.values, group)
        total = Moments(merged[0])
        for values in merged[1:]:
            total = total + Moments(values)
        return total


class TokenLogProbs(NamedTuple):
    """Per-token log-probability and entropy (nats), each `(...)` fp32 (fp64 for fp64 logits)."""

    logprobs: Tensor
    entropy: Tensor


class TokenStats(NamedTuple):
    """Statistics of each token's distribution, `(...)` fp32 (fp64 for fp64), detached.

    Log-probability and entropy (nats), ln Σ e^z, ln Σ p², True (bool) where the token is the
    likeliest id, and the mean of z over the vocabulary.
    """

    logprobs: Tensor
    entropy: Tensor
    lse: Tensor
    log_sum_sq_probs: Tensor
    is_top1: Tensor
    mean_logit: Tensor


class TokenDivergence(NamedTuple):
    """Per-token divergence and student's entropy (nats), each `(...)` fp32 (fp64 for fp64)."""

    divergence: Tensor
    entropy: Tensor


class DivergenceLoss(NamedTuple):
    """A loss and its statistics; divergences and student's entropies `(...)`, detached."""

    loss: Tensor
    stats: Stats
    divergence: Tensor
    entropy: Tensor


class TopKDivergence(NamedTuple):
    """Divergence per token, and student's and teacher's mass of the K ids, detached: `(...)`."""

    divergence: Tensor
    student_mass: Tensor
    teacher_mass: Tensor


class Loss(NamedTuple):
    """A 0-d differentiable loss and its statistics."""

    loss: Tensor
    stats: Stats


class HeadLoss(NamedTuple):
    """A loss and its statistics; log-probabilities and entropies `(...)`, detached."""

    loss: Tensor
    stats: Stats
    logprobs: Tensor
    entropy: Tensor


class Advantages(NamedTuple):
    """Advantages and returns in the rewards' shape, and the advantages' masked moments."""

    advantages: Tensor
    returns: Tensor
    moments: Moments


class TokenAdvantages(NamedTuple):
    """Advantages and returns of every token, in the rewards' shape, detached."""

    advantages: Tensor
    returns: Tensor


class RLHFAdvantages(NamedTuple):
    """Advantages, returns, shaped rewards and unscaled KL, each `(B, T)`, and the moments."""

    advantages: Tensor
    returns: Tensor
    rewards: Tensor
    kl: Tensor
    moments: Moments


def _merged(a: Tensor, b: Tensor) -> Tensor:
    """Sums added; of the last two, the smallest and the largest."""
    low, high = torch.minimum(a[-2], b[-2]), torch.maximum(a[-1], b[-1])
    return torch.cat([a[:-2] + b[:-2], torch.stack([low, high])])


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else float("nan")


def _gather(values: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, values.contiguous(), group=group)
    return parts
