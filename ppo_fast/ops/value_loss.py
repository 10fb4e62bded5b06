"""`value_loss`: the clipped critic loss, its gradient and statistics in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ppo_fast import _backend, _checks, reference
from ppo_fast._boundary import calls
from ppo_fast._boundary.options import ValueOptions, value_options
from ppo_fast._boundary.schema import FORMS
from ppo_fast._results import Loss, Stats
from ppo_fast.ops.backward import detached, n_grads, once_differentiable, scaled
from ppo_fast.ops.forward_mode import derivatives
from ppo_fast.ops.loss_options import Coefficient, check_denom, check_reduction

_OP = "value_loss"


# A value loss's validated arguments after the values, in the order of `calls.value_loss`.
_Inputs = tuple[Tensor | None, Tensor, Tensor | None, Tensor | None, ValueOptions]


class _ValueLoss(torch.autograd.Function):
    """The gradient is formed in the forward; the backward only scales it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, given: _Inputs, backend: str) -> Any:
        loss, stats, *saved = calls.value_loss(backend, values, *given, n_grads=1)
        ctx.save_for_backward(*saved)
        ctx.backend = backend
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return loss, stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> Any:
        if grad is None:
            return None, None, None
        scale, grads = ctx.saved_tensors
        return scaled(ctx.backend, grads, grad, scale)[0], None, None


@derivatives("values")
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
    denom: Coefficient | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Loss:
    """Σ w·scale·l / D over the unmasked tokens, v clipped to within ±clip of the old value.

    "max": l = max((v − R)², (clip(v) − R)²), as in OpenAI Baselines' ppo2; "clipped":
    l = (clip(v) − R)², as in Stable-Baselines3; without `clip`: l = (v − R)².

    Args:
        values: `(B, T)`, or flat `(N,)`; differentiable. fp32, bf16, fp16 (fp64 except Triton).
        old_values: same shape; None if and only if `clip` is None.
        returns: same shape.
        mask: same shape, any real dtype, non-zero keeps.
        reduction, denom, cu_seqlens: as in `ppo_loss`.

    Returns:
        `Loss(loss, stats)`; the statistics hold value_loss, vf_clip_frac and explained_variance,
        and merge with a policy loss's by `+`. Gradients under `retain_graph`: as `ppo_loss`'s.

    Raises:
        ValueError: shape, device or range. TypeError: dtype or wrong object.
        NotImplementedError: a forward-mode tangent of a constant, or on a named kernel backend.
    """
    values = _checks.main(_OP, "values", values, cu_seqlens)
    _checks.tensor(_OP, "returns", returns)
    _checks.alike(_OP, values, old_values=old_values, returns=returns)
    mask = _checks.flags(_OP, "mask", mask, values.shape, values.device)
    form_code = _checks.choice(_OP, "form", form, FORMS[1:]) + 1
    if (old_values is None) != (clip is None):
        got = "None" if old_values is None else "a tensor"
        raise ValueError(f"{_OP}: old_values must be None if and only if clip is, got {got}")
    divisor, divisor_tensor = check_denom(_OP, denom, values)
    options = value_options(
        form=0 if clip is None else form_code,
        reduction=check_reduction(_OP, reduction, denom, values, cu_seqlens),
        clip=0.0 if clip is None else _checks.number(_OP, "clip", clip, 0.0),
        scale=_checks.number(_OP, "scale", scale, 0.0),
        denom=divisor,
        denom_tensor=divisor_tensor,
    )
    name = _backend.select(_OP, backend, values)
    if name == "reference":
        return reference.value_loss(
            values,
            detached(old_values),
            returns.detach(),
            mask,
            clip=clip,
            form=form,
            scale=scale,
            reduction=reduction,
            denom=denom,
            cu_seqlens=cu_seqlens,
        )
    given: _Inputs = (old_values, returns, mask, cu_seqlens, options)
    if n_grads(values):
        loss, stats = _ValueLoss.apply(values, given, name)
    else:
        loss, stats, *_ = calls.value_loss(name, values, *given, n_grads=0)
    return Loss(loss, Stats(stats))
