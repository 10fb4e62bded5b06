"""`group_advantages`: advantages of whole responses from their groups' scores, in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_fast import _checks
from ppo_fast._boundary.schema import compute_dtype
from ppo_fast.ops.forward_mode import derivatives

_OP = "group_advantages"


@derivatives()
def group_advantages(
    scores: Tensor,
    group_ids: Tensor,
    *,
    baseline: str = "grpo",
    eps: float = 1e-6,
    lengths: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """One advantage per response, against the responses to the same prompt.

    With m and σ the mean and the unbiased standard deviation of a response's group of n scores:

    - "grpo": (s − m) / (σ + eps) (Shao et al. 2024, DeepSeekMath, section 4.1.2);
    - "grpo-batch-std": the same with σ over all responses (Hu et al. 2025, REINFORCE++; TRL's
      `scale_rewards="batch"`);
    - "grpo-passk": (best − second) / (σ + eps) for a group's best response, 0 for the others
      (Tang et al. 2025, "Optimizing Language Models for Inference Time Objectives");
    - "rloo": s − the mean of the other n − 1 (Ahmadian et al. 2024, "Back to Basics");
    - "dr_grpo": s − m (Liu et al. 2025, "Understanding R1-Zero-Like Training");
    - "opo": s − Σ|y|s / Σ|y|, |y| a response's length (Hao et al. 2025, "On-Policy RL with Optimal
      Reward Baseline");
    - "maxrl": (s − m) / (m + eps), for scores that are not negative (Tajwar et al. 2026, "Maximum
      Likelihood Reinforcement Learning");
    - "gdpo": of R scores a response, Σ w_k (s_k − m_k) / (σ_k + eps), then standardised over all
      responses, (a − mean) / (standard deviation + eps) (Liu et al. 2026, "GDPO: Group
      reward-Decoupled Normalization Policy Optimization"; TRL's "normalize_then_sum");
    - "reinforce++": s − m, then whitened over all responses, 1e-8 added to the variance
      (Hu et al. 2025, REINFORCE++, the variant with a baseline).

    A response without another in its group, or whose group's scores are all equal, has nothing to
    be compared with: its advantage is exactly 0 ("reinforce++": before whitening). A score that is
    not finite leaves no finite advantage in its group, and none at all in "gdpo", "reinforce++"
    and "grpo-batch-std". In "gdpo" it is each score for itself, before the standardisation.

    Args:
        scores: `(n,)` fp32, bf16, fp16 or fp64, of every response; for "gdpo" `(n, R)`.
        group_ids: `(n,)` int32 or int64, equal where the prompt is; in any order.
        eps: what "grpo", its two forms, "gdpo" and "maxrl" add to the divisor (TRL adds 1e-4).
        lengths: `(n,)` int32 or int64, tokens of every response; for "opo".
        weights: `(R,)`, the scores' weights w, for "gdpo"; 1 where absent.

    Returns:
        `(n,)` fp32 (fp64 for fp64 scores), detached, computed in fp64 without asking the device.

    Raises:
        ValueError: shape, device, baseline or a negative eps, lengths or weights with another
            baseline, lengths absent with "opo". TypeError: dtype.
        NotImplementedError: a forward-mode tangent, as the op has no derivative.
    """
    _check(scores, group_ids, baseline, eps)
    _check_extras(scores, baseline, lengths, weights)
    s = scores.detach().double()
    groups = Groups(group_ids)
    count = groups.sum(torch.ones_like(s))
    mean = groups.sum(s) / count
    zero = s - s  # NaN of a score that is not finite
    alone = (count < 2) | groups.all_equal(s)
    centred = torch.where(alone, zero, s - mean)
    if baseline in ("grpo", "grpo-passk", "gdpo"):
        deviation = (groups.sum(centred * centred) / (count - 1).clamp(min=1)).sqrt()
        if baseline == "grpo-passk":
            centred = torch.where(alone, centred, groups.lead(s, centred - centred))
        out = centred / (deviation + eps)
        if baseline == "gdpo":
            total = out.sum(-1) if weights is None else out @ weights.detach().double()
            out = (total - _mean(total)) / (_variance(total).sqrt() + eps)
    elif baseline == "grpo-batch-std":
        out = centred / (_variance(s).sqrt() + eps)
    elif baseline == "rloo":
        out = centred * count / (count - 1).clamp(min=1)
    elif baseline == "opo" and lengths is not None:
        sizes = lengths.detach().double()
        tokens = groups.sum(sizes)
        out = torch.where(alone, zero, s - groups.sum(sizes * s) / tokens.clamp(min=1))
    elif baseline == "maxrl":
        out = centred / (mean + eps)
    elif baseline == "reinforce++":
        variance = _variance(centred)
        whitened = (centred - _mean(centred)) / (variance + 1e-8).sqrt()
        out = torch.where(variance == 0, torch.zeros_like(centred), whitened)
    else:
        out = centred
    return out.to(compute_dtype(scores))


_BASELINES = (
    "grpo",
    "grpo-batch-std",
    "grpo-passk",
    "rloo",
    "dr_grpo",
    "opo",
    "maxrl",
    "gdpo",
    "reinforce++",
)


def _check(scores: Tensor, group_ids: Tensor, baseline: str, eps: float) -> None:
    _checks.choice(_OP, "baseline", baseline, _BASELINES)
    dims, shape = (2, "(n, R) for 'gdpo'") if baseline == "gdpo" else (1, "(n,)")
    if _checks.floating(_OP, "scores", scores).dim() != dims:
        raise ValueError(f"{_OP}: scores must have shape {shape}, got {tuple(scores.shape)}")
    _checks.indices(_OP, "group_ids", group_ids, scores.shape[:1], scores.device)
    _checks.number(_OP, "eps", eps, 0.0)


def _check_extras(
    scores: Tensor, baseline: str, lengths: Tensor | None, weights: Tensor | None
) -> None:
    """The arguments that one baseline alone takes."""
    if (lengths is not None) != (baseline == "opo"):
        given = "absent" if lengths is None else "given"
        raise ValueError(
            f"{_OP}: lengths must be there for 'opo' alone, got them {given} with {baseline!r}"
        )
    if lengths is not None:
        _checks.indices(_OP, "lengths", lengths, scores.shape, scores.device)
    if weights is None:
        return
    if baseline != "gdpo":
        raise ValueError(
            f"{_OP}: weights must be there for 'gdpo' alone, got them given with {baseline!r}"
        )
    _checks.sized(_OP, "weights", weights, scores, (scores.shape[1],), "(R,)")


@derivatives()
def prompt_weights(lengths: Tensor, group_ids: Tensor) -> Tensor:
    """Weights of sequences that give every prompt the same share of a loss (SkyRL's prompt mean).

    1 / (prompts · tokens of the sequence's prompt), for `sequence_weights` of a loss with
    `reduction="token-sum"`: its micro-batches and ranks then add up. A prompt without a token is
    none. In PyTorch, without a synchronisation.

    Args:
        lengths: `(n,)` unmasked tokens of every sequence of the whole batch, any real dtype.
        group_ids: `(n,)` int32 or int64, the same number for one prompt's sequences.

    Returns:
        `(n,)` fp32 (fp64 for fp64 lengths).

    Raises:
        ValueError: shape, device. TypeError: dtype.
    """
    op = "prompt_weights"
    if _checks.tensor(op, "lengths", lengths).dim() != 1:
        raise ValueError(f"{op}: lengths must have shape (n,), got {tuple(lengths.shape)}")
    if lengths.dtype.is_complex or lengths.dtype == torch.bool:
        raise TypeError(f"{op}: lengths must be numbers, got {lengths.dtype}")
    _checks.indices(op, "group_ids", group_ids, lengths.shape, lengths.device)
    tokens = lengths.detach().double()
    groups = Groups(group_ids)
    own = groups.sum(tokens)
    live = tokens > 0
    # Each prompt once: its sequences with a token share one.
    share = torch.where(live, 1.0 / groups.sum(live.double()).clamp(min=1), 0.0)
    weights = torch.where(live, 1.0 / (own * share.sum().clamp(min=1)).clamp(min=1e-300), 0.0)
    return weights.to(torch.float64 if lengths.dtype == torch.float64 else torch.float32)


def _mean(x: Tensor) -> Tensor:
    return x.sum() / max(1, x.numel())


def _variance(x: Tensor) -> Tensor:
    """The unbiased variance, 0 of fewer than two numbers."""
    return ((x - _mean(x)) ** 2).sum() / max(1, x.numel() - 1)


class Groups:
    """Sums of (n, ...) within groups, each in the order of its members, wherever they are."""

    def __init__(self, ids: Tensor) -> None:
        n = ids.numel()
        ids, self.order = ids.sort(stable=True)
        place = torch.arange(n, device=ids.device)
        first = torch.ones(n, dtype=torch.bool, device=ids.device)
        first[1:] = ids[1:] != ids[:-1]
        self.group = first.cumsum(0) - 1
        # Where group k begins; groups that do not exist begin, and end, at n.
        starts = torch.full((n + 1,), n, device=ids.device)
        self.starts = starts.scatter(0, torch.where(first, self.group, n), place)
        self.starts[n:] = n

    def sum(self, x: Tensor) -> Tensor:
        """Each member's own group's sum."""
        return self._reduce(x, "sum")

    def all_equal(self, x: Tensor) -> Tensor:
        """True for members whose group holds one value only."""
        return self._reduce(x, "max") == self._reduce(x, "min")

    def lead(self, x: Tensor, others: Tensor) -> Tensor:
        """A group's largest value minus its second, at the largest; `others` elsewhere.

        Of a member alone in its group the result means nothing.
        Where two are the largest, their lead is 0 at either.
        """
        if x.numel() == 0:
            return x
        # Members ascending within their group: its last one leads.
        order = self.order[self.by_value(x)]
        ranked = x[order]
        after = self.group.new_full((1,), -1)
        last = self.group != torch.cat([self.group[1:], after])
        gap = ranked - torch.cat([ranked[:1], ranked[:-1]])
        return others.scatter(0, order, torch.where(last, gap, others[order]))

    def by_value(self, x: Tensor) -> Tensor:
        """Places in the order of groups, ascending by value within each."""
        inner = x[self.order].argsort(stable=True)
        return inner[self.group[inner].argsort(stable=True)]

    def _reduce(self, x: Tensor, how: str) -> Tensor:
        if x.numel() == 0:
            return x
        sums = torch.segment_reduce(x[self.order], how, offsets=self.starts, unsafe=True, axis=0)
        return torch.empty_like(x).index_copy_(0, self.order, sums[self.group])
