"""`whiten`: masked standardisation from moments that may span ranks."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from ppo_fast import _backend, _checks, reference
from ppo_fast._boundary import calls
from ppo_fast._results import Moments
from ppo_fast.ops.forward_mode import derivatives

_OP = "whiten"
_EPS_AT = ("var", "std")


@derivatives()
def whiten(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    moments: Moments | None = None,
    shift_mean: bool = True,
    unbiased: bool = True,
    eps: float = 1e-8,
    eps_at: str = "var",
    process_group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """(x − mean)·rsqrt(var + eps) over the unmasked slots (detached); masked slots are 0.

    The defaults are TRL's and verl's `masked_whiten`; `eps_at="std"` divides by std + eps, as
    Stable-Baselines3 and CleanRL do; `shift_mean=False` adds the mean back.

    Args:
        x: `(B, T)` or `(N,)`, fp32, bf16 or fp16 (fp64 except on Triton), any strides.
        mask: same shape, any real dtype, non-zero keeps.
        moments: those of `gae` or `rlhf_advantages`, to save the pass that computes them.
        unbiased: divide by n − 1 (0 variance for fewer than two samples), else by n.
        process_group: merge the moments over its ranks, in rank order.

    Returns:
        The whitened tensor, fp32 (fp64 for fp64), in x's shape; zero variance whitens to 0.

    Raises:
        ValueError: shape, device or range. TypeError: dtype or wrong object.
        NotImplementedError: a forward-mode tangent, as the op has no derivative.
    """
    x = _checks.main(_OP, "x", x).detach()
    mask = _checks.flags(_OP, "mask", mask, x.shape, x.device)
    _checks.choice(_OP, "eps_at", eps_at, _EPS_AT)
    eps = _checks.number(_OP, "eps", eps, 0.0)
    name = _backend.select(_OP, backend, x)
    if moments is None:
        if name == "reference":
            moments = reference.moments(x, mask)
        else:
            moments = Moments(calls.moments(name, x, mask))
    elif not isinstance(moments, Moments):
        raise TypeError(f"{_OP}: moments must be Moments, got {type(moments).__name__}")
    if process_group is not None:
        moments = moments.all_reduce(process_group)
    if name == "reference":
        return reference.whiten(
            x, mask, moments, shift_mean=shift_mean, unbiased=unbiased, eps=eps, eps_at=eps_at
        )
    return calls.whiten(
        name,
        x,
        mask,
        moments.values,
        shift_mean=shift_mean,
        unbiased=unbiased,
        eps=eps,
        eps_at_std=eps_at == "std",
    )
