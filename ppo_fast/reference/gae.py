"""Generalised advantage estimation: one backward recurrence for every convention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ppo_fast._results import Advantages
from ppo_fast.reference.common import compute
from ppo_fast.reference.whiten import moments as moments_of


@torch.no_grad()
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
) -> Advantages:
    """A_t = δ_t + γλ c_t A_{t+1}, δ_t = ρ_t (r_t + γ V'_t − V_t); returns = A + V.

    Schulman et al. 2016 (GAE), eq. 16; with rho and c Espeholt et al. 2018 (V-trace), eq. 1.
    """
    lam_returns = lam if lam_returns is None else lam_returns
    steps: dict[str, Any] = {
        "reward": rewards,
        "value": values,
        "mask": mask,
        "next": next_values,
        "terminated": terminated,
        "truncated": truncated,
        "rho": rho,
        "c": c,
    }
    lams = {"lam": lam, "lam_returns": lam_returns}
    per_row = {"bootstrap": bootstrap}
    for name, value in lams.items():
        if isinstance(value, Tensor):
            (steps if value.shape == rewards.shape else per_row)[name] = value
    layout = _Layout(rewards, cu_seqlens, time_major)
    rows = {name: layout.rows(x) for name, x in steps.items() if x is not None}
    given = {name: x for name, x in per_row.items() if x is not None}
    for name, value in lams.items():
        if not isinstance(value, Tensor):
            given[name] = torch.full((), value, dtype=torch.float64)
    adv, ret = _recur(rows, given, layout.exists, gamma, masked)
    advantages, returns = layout.back(adv), layout.back(ret)
    return Advantages(advantages, returns, moments_of(advantages, mask))


class _Layout:
    """Any layout as rows `(B, T)` right-padded, and back."""

    def __init__(self, like: Tensor, cu_seqlens: Tensor | None, time_major: bool) -> None:
        self.time_major, self.packed = time_major, cu_seqlens is not None
        if cu_seqlens is None:
            shape = like.T.shape if time_major else like.shape
            self.exists = torch.ones(shape, dtype=torch.bool, device=like.device)
            return
        lengths = cu_seqlens[1:].long() - cu_seqlens[:-1].long()
        longest = int(lengths.max()) if lengths.numel() else 0
        position = torch.arange(longest, device=like.device)
        self.exists = position < lengths[:, None]
        self.slot = (cu_seqlens[:-1].long()[:, None] + position)[self.exists]

    def rows(self, x: Tensor) -> Tensor:
        x = x.detach()
        if not self.packed:
            return x.T if self.time_major else x
        out = x.new_zeros(self.exists.shape)
        out[self.exists] = x[self.slot]
        return out

    def back(self, rows: Tensor) -> Tensor:
        if not self.packed:
            return rows.T.contiguous() if self.time_major else rows
        return rows[self.exists]


def _recur(
    rows: dict[str, Tensor],
    given: dict[str, Tensor],
    exists: Tensor,
    gamma: float,
    masked: str,
) -> tuple[Tensor, Tensor]:
    """The recurrence on rows `(B, T)`, last step first."""
    reward = compute(rows["reward"])
    dtype, (n_rows, length) = reward.dtype, exists.shape
    live_all = exists & (rows["mask"] != 0) if "mask" in rows else exists
    zero = torch.zeros(n_rows, dtype=dtype, device=reward.device)
    state = {"lam": zero, "lam_returns": zero}
    next_value = compute(given["bootstrap"].detach()) if "bootstrap" in given else zero
    adv, ret = torch.zeros_like(reward), torch.zeros_like(reward)

    def at(name: str, t: int, live: Tensor, default: float) -> Tensor:
        """Column t of an input; a masked slot or an absent input gives `default`."""
        if name not in rows:
            return torch.full_like(zero, default)
        return torch.where(live, rows[name][:, t].to(dtype), default)

    for t in reversed(range(length)):
        live = live_all[:, t]
        moves = live if masked == "carry" else exists[:, t]
        r, v = at("reward", t, live, 0.0), at("value", t, live, 0.0)
        terminated = at("terminated", t, live, 0.0) != 0
        done = terminated | (at("truncated", t, live, 0.0) != 0)
        after = at("next", t, live, 0.0) if "next" in rows else next_value
        future = torch.where(terminated, zero, gamma * after)
        delta = at("rho", t, live, 1.0) * (r + future - v)
        c = at("c", t, live, 1.0)
        for name, later in state.items():
            lam = at(name, t, live, 1.0).double() if name in rows else given[name].double()
            decay = (gamma * lam).to(dtype) * c
            now = torch.where(done, delta, delta + decay * later)
            state[name] = torch.where(moves, now, later)
        next_value = torch.where(moves, v, next_value)
        adv[:, t] = torch.where(live, state["lam"], 0.0)
        ret[:, t] = torch.where(live, state["lam_returns"] + v, 0.0)
    return adv, ret
