"""`group_advantages`: advantages of whole responses from their groups' scores, in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_fast import _checks
from ppo_fast._boundary.schema import compute_dtype
from ppo_fast.ops.forward_mode import derivatives

_OP = "group_advantages"
_BASELINES = ("grpo", "rloo", "reinforce++", "dr_grpo")
_EPS = 1e-6


@derivatives()
def group_advantages(scores: Tensor, group_ids: Tensor, *, baseline: str = "grpo") -> Tensor:
    """One advantage per response, against the responses to the same prompt.

    With m and σ the mean and the unbiased standard deviation of a response's group of n scores:

    - "grpo": (s − m) / (σ + 1e-6) (Shao et al. 2024, DeepSeekMath, section 4.1.2);
    - "rloo": s − the mean of the other n − 1 (Ahmadian et al. 2024, "Back to Basics");
    - "dr_grpo": s − m (Liu et al. 2025, "Understanding R1-Zero-Like Training");
    - "reinforce++": s − m, then whitened over all responses, 1e-8 added to the variance
      (Hu et al. 2025, REINFORCE++, the variant with a baseline).

    A response without another in its group, or whose group's scores are all equal, has nothing to
    be compared with: its advantage is exactly 0 ("reinforce++": before whitening). A score that is
    not finite leaves no finite advantage in its group, and none at all in "reinforce++".

    Args:
        scores: `(n,)` fp32, bf16, fp16 or fp64, of every response.
        group_ids: `(n,)` int32 or int64, equal where the prompt is; in any order.

    Returns:
        `(n,)` fp32 (fp64 for fp64 scores), detached, computed in fp64 without asking the device.

    Raises:
        ValueError: shape, device or baseline. TypeError: dtype.
        NotImplementedError: a forward-mode tangent, as the op has no derivative.
    """
    if _checks.floating(_OP, "scores", scores).dim() != 1:
        raise ValueError(f"{_OP}: scores must have shape (n,), got {tuple(scores.shape)}")
    _checks.indices(_OP, "group_ids", group_ids, scores.shape, scores.device)
    _checks.choice(_OP, "baseline", baseline, _BASELINES)
    s = scores.detach().double()
    groups = _Groups(group_ids)
    count, total = groups.sum(torch.ones_like(s)), groups.sum(s)
    centred = s - total / count
    alone = (count < 2) | groups.all_equal(s)
    centred = torch.where(alone, s - s, centred)  # 0, or NaN of a score that is not finite
    if baseline == "grpo":
        deviation = (groups.sum(centred * centred) / (count - 1).clamp(min=1)).sqrt()
        out = centred / (deviation + _EPS)
    elif baseline == "rloo":
        out = centred * count / (count - 1).clamp(min=1)
    elif baseline == "reinforce++":
        mean = centred.sum() / max(1, s.numel())
        variance = ((centred - mean) ** 2).sum() / max(1, s.numel() - 1)
        whitened = (centred - mean) / (variance + 1e-8).sqrt()
        out = torch.where(variance == 0, torch.zeros_like(centred), whitened)
    else:
        out = centred
    return out.to(compute_dtype(scores))


class _Groups:
    """Sums within groups, each in the order of its members, wherever they are in the batch."""

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

    def _reduce(self, x: Tensor, how: str) -> Tensor:
        if x.numel() == 0:
            return x
        sums = torch.segment_reduce(x[self.order], how, offsets=self.starts, unsafe=True)
        return torch.empty_like(x).scatter_(0, self.order, sums[self.group])
