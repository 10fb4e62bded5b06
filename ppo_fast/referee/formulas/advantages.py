"""Advantages and whitening in fp64.

GAE (arXiv 1506.02438, equation 16) over the tokens of responses and over environments' steps;
group baselines: GRPO (2402.03300), Dr. GRPO (2503.20783), RLOO (2402.14740), REINFORCE++
(2501.03262).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ppo_fast.referee.cases import Groups, Steps, Tokens
from ppo_fast.referee.formulas import MASKS, Change, Exact, Reading, counted


def whitened(
    x: Tensor, keep: Tensor, size: Tensor, unbiased: bool, eps: float, eps_at: str, shift: bool
) -> tuple[Tensor, Tensor]:
    """(x − mean) / std over the kept entries, and the size of its roundings."""
    n = int(keep.sum())
    mean = torch.where(keep, x, 0.0).sum() / n
    centred = torch.where(keep, x - mean, 0.0)
    squares = centred.square().sum()
    variance = squares / max(n - 1 if unbiased else n, 1)
    inverse = 1 / (variance + eps).sqrt() if eps_at == "variance" else 1 / (variance.sqrt() + eps)
    y = (x - mean) * inverse
    reach = torch.where(keep, size, 0.0)
    spread = reach + reach.sum() / n
    relative = 1 + 2 * (centred.abs() * spread).sum() / squares.clamp(min=1e-300)
    found = spread * inverse + y.abs() * relative
    if not shift:
        y, found = y + mean, found + mean.abs()
    return y, found


@dataclass(frozen=True)
class Whiten(Reading):
    """Zero mean and unit deviation over unmasked slots; `shift=False` puts the mean back.

    `eps` is the trainer's own, added to the variance or to the deviation.
    """

    part: ClassVar[str] = "whitening"
    paper: ClassVar[str] = "(x − mean) / std over unmasked slots, variance over n − 1"
    unbiased: bool = True
    eps: float = 1e-8
    eps_at: str = "variance"
    shift: bool = True
    mask: str = "select"

    def exact(self, batch: Tokens, eps: float) -> dict[str, Exact]:
        """`value` of unmasked slots."""
        keep = counted(batch.mask, self.mask)
        x = batch.rewards.double()
        if self.mask == "multiply" and bool(x.isnan().any()):
            y = torch.full_like(x, torch.nan)
            return {"value": Exact(y, torch.ones_like(x), 0.0, batch.mask)}
        y, size = whitened(
            x, keep, x.abs().nan_to_num(), self.unbiased, self.eps, self.eps_at, self.shift
        )
        return {"value": Exact(y, size.nan_to_num(), 0.0, batch.mask)}

    def changes(self) -> list[Change]:
        """Other variances, masks and means."""
        return self.others(
            [
                *VARIANCES,
                *(change for change in MASKS if change.fields["mask"] != "late"),
                Change("whitening: the mean is not put back", {"shift": True}, "whiten.mean"),
                Change("whitening: the mean is not removed", {"shift": False}, "whiten.mean"),
            ]
        )


VARIANCES = [
    Change(
        "whitening: variance over n (biased), not over n − 1", {"unbiased": False}, "whiten.biased"
    ),
    Change("whitening: variance over n − 1, not over n", {"unbiased": True}, "whiten.unbiased"),
]


@dataclass(frozen=True)
class TokenGAE(Reading):
    """GAE over a response's tokens; no value after the last one.

    `holes`: "skip", masked tokens are no steps; "zero", they are steps with a reward and a value
    of 0; "step", they are steps with what is written there. `whiten`: advantages are whitened.
    """

    part: ClassVar[str] = "GAE"
    paper: ClassVar[str] = "arXiv 1506.02438, equation 16; a response's tokens are the steps"
    gamma: float = 0.97
    lam: float = 0.9
    holes: str = "skip"
    bootstrap: str = "none"
    whiten: bool = False
    unbiased: bool = True
    eps: float = 1e-8
    mask: str = "select"

    def exact(self, batch: Tokens, eps: float) -> dict[str, Exact]:
        """`advantages` and `returns` of unmasked slots."""
        keep = batch.mask
        rewards, values = batch.rewards.double(), batch.values.double()
        if self.mask == "select":
            rewards, values = (torch.where(keep, x, 0.0) for x in (rewards, values))
        if self.holes == "zero":
            rewards, values = rewards * keep, values * keep
        moves = keep if self.holes == "skip" else torch.ones_like(keep)
        advantages, size = self._scan(batch, rewards, values, moves)
        returns, ret_size = advantages + values, size + values.abs().nan_to_num()
        if self.whiten:
            advantages, size = whitened(
                advantages, keep, size, self.unbiased, self.eps, "variance", True
            )
        return {
            "advantages": Exact(advantages, size.nan_to_num(), 0.0, keep),
            "returns": Exact(returns, ret_size, 0.0, keep),
        }

    def _scan(
        self, batch: Tokens, rewards: Tensor, values: Tensor, moves: Tensor
    ) -> tuple[Tensor, Tensor]:
        last = batch.values[:, -1].double() * (self.bootstrap == "last")
        later, reach, after = torch.zeros_like(last), torch.zeros_like(last), last
        found, sizes = [], []
        for t in reversed(range(rewards.shape[1])):
            delta = rewards[:, t] + self.gamma * after - values[:, t]
            size = rewards[:, t].abs() + after.abs() + values[:, t].abs()
            step, grown = (
                delta + self.gamma * self.lam * later,
                size + self.gamma * self.lam * reach,
            )
            if self.mask == "multiply":
                m = moves[:, t].double()
                later, after = step * m + (1 - m) * later, values[:, t] * m + (1 - m) * after
            else:
                later = torch.where(moves[:, t], step, later)
                after = torch.where(moves[:, t], values[:, t], after)
            reach = torch.where(moves[:, t], grown, reach).nan_to_num()
            found.append(later)
            sizes.append(reach)
        return torch.stack(found[::-1], 1), torch.stack(sizes[::-1], 1)

    def changes(self) -> list[Change]:
        """Other treatments of masked tokens, λ, γ, the end, whitening."""
        changes = [
            Change(
                "GAE: masked tokens are steps with a reward and a value of 0",
                {"holes": "zero"},
                "gae.zero",
            ),
            Change(
                "GAE: masked tokens are steps with the reward and value written there",
                {"holes": "step"},
                "gae.step",
            ),
            Change("GAE: masked tokens are skipped", {"holes": "skip"}, "gae.skip"),
            MASKS[0],
            Change("GAE: the last value is its own bootstrap", {"bootstrap": "last"}, "gae.end"),
            Change("GAE: λ is 1", {"lam": 1.0}, "gae.lam"),
            Change("GAE: λ is 0", {"lam": 0.0}, "gae.lam"),
            Change(
                "GAE: γ and λ change places", {"gamma": self.lam, "lam": self.gamma}, "gae.swap"
            ),
            Change("GAE: γ is 1", {"gamma": 1.0}, "gae.gamma"),
        ]
        return self.others([*changes, *(VARIANCES if self.whiten else [])])


@dataclass(frozen=True)
class StepGAE(Reading):
    """GAE over environments' steps `(T, B)`.

    A termination cuts value and recursion; a truncation cuts the recursion and bootstraps from
    the value of the state that the step led to.
    """

    part: ClassVar[str] = "GAE"
    paper: ClassVar[str] = "arXiv 1506.02438, equation 16"
    gamma: float = 0.97
    lam: float = 0.9
    truncation: str = "bootstrap"
    whiten: bool = False
    unbiased: bool = True
    eps: float = 1e-8

    def exact(self, batch: Steps, eps: float) -> dict[str, Exact]:
        """`advantages` and `returns`, `(T, B)`."""
        after = torch.cat([batch.values[1:], batch.last_values[None]])
        ends, cuts = batch.terminated, batch.terminated | batch.truncated
        if self.truncation == "bootstrap":
            after = torch.where(cuts, batch.next_values, after)
        elif self.truncation == "own value":
            after = torch.where(batch.truncated, batch.values, after)
        elif self.truncation == "terminal":
            ends = cuts
        elif self.truncation == "goes on":
            cuts = ends
        after = torch.where(ends, 0.0, after)
        later = reach = torch.zeros_like(batch.last_values)
        found, sizes = [], []
        for t in reversed(range(len(batch.rewards))):
            live = (~cuts[t]).double() * self.gamma * self.lam
            delta = batch.rewards[t] + self.gamma * after[t] - batch.values[t]
            size = batch.rewards[t].abs() + after[t].abs() + batch.values[t].abs()
            later, reach = delta + live * later, size + live * reach
            found.append(later)
            sizes.append(reach)
        advantages, size = torch.stack(found[::-1]), torch.stack(sizes[::-1])
        returns = Exact(advantages + batch.values, size + batch.values.abs())
        if self.whiten:
            keep = torch.ones_like(cuts)
            advantages, size = whitened(
                advantages, keep, size, self.unbiased, self.eps, "deviation", True
            )
        return {"advantages": Exact(advantages, size), "returns": returns}

    def changes(self) -> list[Change]:
        """Other treatments of a truncation, other λ and γ."""
        changes = [
            Change(
                "GAE: a truncated episode is a terminated one, without a value to bootstrap from",
                {"truncation": "terminal"},
                "gae.truncation",
            ),
            Change(
                "GAE: the recursion goes on from a truncated episode into the next, whose first"
                " value it bootstraps from",
                {"truncation": "goes on"},
                "gae.goes-on",
            ),
            Change(
                "GAE: a truncated episode bootstraps from the value of its last step, not of the"
                " state that the step led to",
                {"truncation": "own value"},
                "gae.own-value",
            ),
            Change(
                "GAE: a truncated episode bootstraps from the value after the reset",
                {"truncation": "after reset"},
                "gae.after-reset",
            ),
            Change("GAE: λ is 1", {"lam": 1.0}, "gae.lam"),
            Change(
                "GAE: γ and λ change places", {"gamma": self.lam, "lam": self.gamma}, "gae.swap"
            ),
        ]
        return self.others([*changes, *(VARIANCES if self.whiten else [])])


@dataclass(frozen=True)
class GroupAdvantages(Reading):
    """Scores less a baseline of their prompt's group, over a deviation.

    `baseline`: "mean", or "others" (leave one out); `scale`: "group", "batch" or "none".
    """

    part: ClassVar[str] = "group advantages"
    paper: ClassVar[str] = "arXiv 2402.03300, section 4.1.2; 2402.14740; 2503.20783"
    baseline: str = "mean"
    scale: str = "group"
    unbiased: bool = True
    eps: float = 1e-6

    def exact(self, batch: Groups, eps: float) -> dict[str, Exact]:
        """`value` `(N,)`."""
        scores, index = batch.scores, batch.groups
        n = torch.bincount(index)[index].double()
        mean = torch.bincount(index, scores)[index] / n
        size = scores.abs() + torch.bincount(index, scores.abs())[index] / n
        centred = scores - mean
        if self.baseline == "others":
            centred, size = centred * n / (n - 1), size * n / (n - 1)
        squares = torch.bincount(index, (scores - mean).square())[index]
        if self.scale == "batch":
            n, squares = torch.tensor(float(len(scores))), (scores - scores.mean()).square().sum()
        deviation = (squares / (n - 1 if self.unbiased else n)).sqrt()
        if self.scale == "none":
            return {"value": Exact(centred, size)}
        inverse = 1 / (deviation + self.eps)
        relative = 1 + size * size.abs().mean() / squares.clamp(min=1e-12)
        return {"value": Exact(centred * inverse, (size + centred.abs() * relative) * inverse)}

    def changes(self) -> list[Change]:
        """Other baselines, deviations and variances."""
        return self.others(
            [
                Change(
                    "group: deviation over n (biased), not over n − 1",
                    {"unbiased": False},
                    "group.biased",
                ),
                Change("group: not divided by a deviation", {"scale": "none"}, "group.scale"),
                Change("group: the batch's deviation", {"scale": "batch"}, "group.scale"),
                Change("group: the group's deviation", {"scale": "group"}, "group.scale"),
                Change(
                    "group: the baseline leaves the own score out",
                    {"baseline": "others"},
                    "group.baseline",
                ),
                Change(
                    "group: the baseline holds the own score",
                    {"baseline": "mean"},
                    "group.baseline",
                ),
            ]
        )
