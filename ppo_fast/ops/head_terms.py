"""Terms of a head's loss beside the policy's: the divergence from a teacher, and the z-loss."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ppo_fast import _checks
from ppo_fast._boundary.options import Softmax
from ppo_fast._results import STATS_FIELDS
from ppo_fast.ops.head_inputs import HeadInputs
from ppo_fast.ops.policy import PolicyInputs, over
from ppo_fast.ops.surrogate import set_fields
from ppo_fast.ops.teacher import Slopes, TeacherInputs, check_teacher

_LOSS = STATS_FIELDS.index("loss")


class HeadTerms(NamedTuple):
    """coef·divergence + z_loss_coef·(ln Σe^z)² of every token, under the policy loss's w and D.

    Corrections do not touch them, but for one that drops tokens from "all" terms.
    """

    teacher: TeacherInputs | None
    z_loss_coef: float | Tensor

    @property
    def has_z_loss(self) -> bool:
        """True where the second is there; a tensor's value is not looked at."""
        return isinstance(self.z_loss_coef, Tensor) or self.z_loss_coef != 0.0

    @property
    def any(self) -> bool:
        """True where there is a term."""
        return self.teacher is not None or self.has_z_loss

    def slopes(
        self, g: Tensor, h: Tensor, softmax: Softmax, keep: Tensor, weights: Tensor
    ) -> Slopes:
        """All slopes of rows, of which g and h are the policy's; `weights` are w / D or 0-d."""
        if not self.any:
            return Slopes(g, h)
        w, c, k = torch.where(keep, weights, torch.zeros_like(g)), None, None
        if self.teacher is not None:
            c = (self.teacher.coef * w).to(w.dtype)
        if self.has_z_loss:
            k = (2.0 * self.z_loss_coef * w * (softmax.row_max + softmax.log_sum)).to(w.dtype)
        return Slopes(g, h, c, k)

    def added(
        self,
        loss: Tensor,
        stats: Tensor,
        policy: PolicyInputs,
        mask: Tensor,
        counted: Tensor,
        divergence: Tensor,
        lse: Tensor,
    ) -> Tensor:
        """The loss with the terms of the tokens of `mask`, whose sums are written into `stats`."""
        parts: dict[str, tuple[float | Tensor, Tensor]] = {}
        if self.teacher is not None:
            parts["divergence"] = self.teacher.coef, divergence
        if self.has_z_loss:
            parts["z_loss"] = self.z_loss_coef, lse * lse
        mask = mask.contiguous()  # strides change the order of a sum
        weights, zero = policy.row_weights(mask), torch.zeros_like(lse)
        total = torch.where(mask, weights * sum(c * x for c, x in parts.values()), zero)
        sums = {
            name: torch.where(mask, x.detach(), zero).double().sum()
            for name, (_, x) in parts.items()
        }
        before = stats[_LOSS] + total.detach().double().sum()
        set_fields(stats, loss=before, **sums)
        # Wide: among many tokens a sum of small terms would lose some.
        extra = over(total.double().sum(), policy.denom(counted))
        return loss + extra.to(loss.dtype)

    def for_reference(self) -> dict[str, Any]:
        """Keyword arguments of the reference."""
        teacher = self.teacher and self.teacher.for_reference()
        return {"teacher": teacher, "z_loss_coef": self.z_loss_coef}


def check_terms(
    op: str, teacher: Any, z_loss_coef: Any, given: HeadInputs, group: dist.ProcessGroup | None
) -> HeadTerms:
    """The terms of a call, or ValueError or TypeError."""
    other = None if teacher is None else check_teacher(op, teacher, given, group)
    number, tensor = _checks.coefficient(op, "z_loss_coef", z_loss_coef, given.hidden.device, 0.0)
    return HeadTerms(other, number if tensor is None else tensor)
