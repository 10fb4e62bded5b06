"""`gae`: advantages, returns and whitening moments from one pass over rewards and values."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ppo_fast import _backend, _checks, reference
from ppo_fast._boundary import calls
from ppo_fast._boundary.options import Lambda
from ppo_fast._boundary.schema import MASKED
from ppo_fast._results import Advantages, Moments
from ppo_fast.ops.forward_mode import derivatives

_OP = "gae"


@derivatives()
def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,
    lam_returns: float | Tensor | None = None,
    mask: Tensor | None = None,
    masked: str = "carry",
    next_values: Tensor | None = None,
    bootstrap: Tensor | None = None,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    time_major: bool = False,
    rho: Tensor | None = None,
    c: Tensor | None = None,
    backend: str | None = None,
) -> Advantages:
    """A_t = δ_t + γλ·c_t·A_{t+1}, δ_t = ρ_t(r_t + γV'_t − V_t), returns = A + V (detached).

    GAE: Schulman et al. 2016, eq. 16. With `rho` and `c` (clipped by the caller) V-trace:
    Espeholt et al. 2018, eq. 1; then returns are vs and advantages vs − V.

    Args:
        rewards, values: `(B, T)`, `(T, B)` with `time_major`, or flat `(N,)` with `cu_seqlens`;
            fp32, bf16, fp16 (fp64 except Triton), any strides.
        gamma, lam: in [0, 1]; `lam` may be a tensor `(B,)`, `(S,)` or of the rewards' shape.
        lam_returns: the returns' own λ, like `lam`; None means `lam`.
        mask: rewards' shape, any real dtype, non-zero keeps. `masked="carry"`: masked steps are
            as if absent (verl, NeMo-RL); "zero": r = V = 0 there and the recursion decays
            through them (TRL, OpenRLHF). Outputs there are 0.
        next_values: rewards' shape, V' of every step; required with `truncated`, excludes
            `bootstrap`.
        bootstrap: `(B,)` or `(S,)`, the value after the last (valid) step; absent it is 0.
        terminated, truncated: end-of-step flags; both cut the recursion, `terminated` also V'.
        cu_seqlens: `(S + 1,)` int32 or int64 offsets of packed sequences. On a GPU they are not
            validated: if they do not rise from 0 to N, every output is NaN.

    Returns:
        `Advantages(advantages, returns, moments)`, fp32 (fp64 for fp64) in the rewards' shape;
        `moments` of the unmasked advantages for `whiten` or `ppo_loss`.

    Raises:
        ValueError: shape, device or range. TypeError: dtype or wrong object.
        NotImplementedError: a forward-mode tangent, as the op has no derivative.
    """
    rewards = _checks.main(_OP, "rewards", rewards, cu_seqlens, time_major=time_major)
    _check_layout(rewards, values, cu_seqlens, next_values, bootstrap, truncated)
    _checks.alike(
        _OP, rewards, time_major=time_major, values=values, next_values=next_values, rho=rho, c=c
    )
    mask, terminated, truncated = _check_flags(rewards, mask, terminated, truncated)
    count = n_sequences(rewards, cu_seqlens, time_major)
    if bootstrap is not None:
        _checks.sized(_OP, "bootstrap", bootstrap, rewards, (count,), "(B,)")
    _checks.number(_OP, "gamma", gamma, 0.0, 1.0)
    lam_adv, lam_ret = _check_lambdas(rewards, lam, lam_returns, count, time_major)
    masked_code = _checks.choice(_OP, "masked", masked, MASKED)
    name = _backend.select(_OP, backend, rewards, sequences=count, time_major=time_major)
    if name == "reference":
        return reference.gae(
            rewards,
            values,
            gamma=gamma,
            lam=lam,
            lam_returns=lam_returns,
            mask=mask,
            masked=masked,
            next_values=next_values,
            bootstrap=bootstrap,
            terminated=terminated,
            truncated=truncated,
            cu_seqlens=cu_seqlens,
            time_major=time_major,
            rho=rho,
            c=c,
        )
    advantages, returns, moments = calls.gae(
        name,
        rewards,
        values,
        gamma=gamma,
        lam_adv=lam_adv,
        lam_ret=lam_ret,
        mask=mask,
        masked=masked_code,
        next_values=next_values,
        bootstrap=bootstrap,
        terminated=terminated,
        truncated=truncated,
        cu_seqlens=cu_seqlens,
        time_major=time_major,
        rho=rho,
        c=c,
    )
    return Advantages(advantages, returns, Moments(moments))


def n_sequences(main: Tensor, cu_seqlens: Tensor | None, time_major: bool = False) -> int:
    """B of `(B, T)` or `(T, B)`, S of packed inputs."""
    if cu_seqlens is not None:
        return cu_seqlens.numel() - 1
    return main.shape[1] if time_major else main.shape[0]


def _check_layout(
    rewards: Tensor, values: Any, cu_seqlens: Any, next_values: Any, bootstrap: Any, truncated: Any
) -> None:
    _checks.tensor(_OP, "values", values)
    if rewards.dim() == 1 and cu_seqlens is None:
        raise ValueError(
            f"{_OP}: cu_seqlens must be given for flat rewards {tuple(rewards.shape)}"
        )
    if next_values is not None and bootstrap is not None:
        raise ValueError(f"{_OP}: bootstrap must be None with next_values, got a tensor")
    if truncated is not None and next_values is None:
        raise ValueError(f"{_OP}: next_values must be given with truncated, got None")


def _check_flags(
    rewards: Tensor, mask: Any, terminated: Any, truncated: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    shape, device = rewards.shape, rewards.device
    return (
        _checks.flags(_OP, "mask", mask, shape, device),
        _checks.flags(_OP, "terminated", terminated, shape, device),
        _checks.flags(_OP, "truncated", truncated, shape, device),
    )


def _check_lambdas(
    rewards: Tensor, lam: Any, lam_returns: Any, count: int, time_major: bool
) -> tuple[Lambda, Lambda]:
    """λ of the advantages and of the returns, which is the same one unless it is given."""
    lam_adv = _check_lambda("lam", lam, rewards, count, time_major)
    if lam_returns is None:
        return lam_adv, lam_adv
    return lam_adv, _check_lambda("lam_returns", lam_returns, rewards, count, time_major)


def _check_lambda(name: str, lam: Any, rewards: Tensor, count: int, time_major: bool) -> Lambda:
    if not isinstance(lam, Tensor):
        return Lambda(_checks.number(_OP, name, lam, 0.0, 1.0), None, False)
    if lam.shape == rewards.shape:
        _checks.alike(_OP, rewards, time_major=time_major, **{name: lam})
        return Lambda(0.0, lam.detach(), True)
    _checks.sized(_OP, name, lam, rewards, (count,), "(B,)")
    if rewards.dim() == 2:
        lam = (lam if time_major else lam[:, None]).expand(rewards.shape)
    return Lambda(0.0, lam.detach(), False)
