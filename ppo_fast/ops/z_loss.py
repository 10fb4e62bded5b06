"""The z-loss (ln Σe^z)², of logits over their temperature: its slope in the kernels' gradients.

Chowdhery et al. 2022 (PaLM), section 5; Zoph et al. 2022 (ST-MoE), equation 5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_fast._boundary.options import Softmax

# Beside k an entropy's slope below this share of it is lost in rounding, and may be replaced.
_NEGLIGIBLE = 2.0**-60


def with_lse(softmax: Softmax, h: Tensor, k: Tensor | None) -> tuple[Softmax, Tensor]:
    """Softmax numbers and entropy's slopes that give a gradient k·p, of ln Σe^z, as well.

    The kernels form −p (g + h (ln p + H)): H − k/h in place of H adds k·p to it. Where h is 0 or
    next to nothing beside k, a negligible one takes its place.
    """
    if k is None:
        return softmax, h
    least = (k.abs() * _NEGLIGIBLE).clamp(min=torch.finfo(k.dtype).tiny)
    none = k == 0
    h = torch.where(none | (h.abs() >= least), h, least)
    shift = torch.where(none, 0.0, k / h)
    return softmax._replace(entropy=softmax.entropy - shift), h
