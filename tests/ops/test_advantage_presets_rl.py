"""The control libraries' advantages, by their own functions: torchrl, tianshou, skrl.

Dones and truncations at random, with exact next values, in fp64.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from installed import assert_near, assert_near_whitened, reach
from preset_inputs import ENVS, STEPS, episodes
from torch import Tensor

import ppo_fast

# Exact in fp32, as is their product: torchrl and skrl multiply γ by integer or boolean flags,
# which rounds it to fp32 even where all else is fp64.
GAMMA, LAM = 31 / 32, 29 / 32


def torchrl() -> ModuleType:
    return pytest.importorskip(
        "torchrl.objectives.value.functional", reason="needs `pip install torchrl==0.14.1`"
    )


def columns(*tensors: Tensor) -> list[Tensor]:
    """torchrl's trailing feature dimension."""
    return [x[..., None] for x in tensors]


def per_token(x: Tensor) -> Tensor:
    """A λ for every step, in [0, 1)."""
    g = torch.Generator().manual_seed(5)
    return torch.rand(x.shape, generator=g, dtype=torch.float64).to(x.dtype)


GAE, TD = "generalized_advantage_estimate", "td_lambda_return_estimate"


@pytest.mark.parametrize(
    "name, tensor", [(GAE, False), ("vec_" + GAE, False), ("vec_" + GAE, True)]
)
def test_torchrl_gae(backend: str, device: str, name: str, tensor: bool) -> None:
    """`done` cuts the recursion, `terminated` V' too: truncated = done and not terminated.

    The vectorised form drops powers of γλ below 1e-7, which 24 steps of 0.88 do not reach.
    Its λ may be a tensor.
    """
    x = episodes(backend)
    lam = per_token(x.rewards) if tensor else torch.tensor(LAM)
    w, here = x.wide(), x.on(device)
    theirs = getattr(torchrl(), name)(
        GAMMA,
        lam.double()[..., None] if tensor else LAM,
        *columns(w.values, w.next_values, w.rewards, w.done, w.terminated),
    )
    out = ppo_fast.gae(
        **here.kwargs(), gamma=GAMMA, lam=lam.to(device) if tensor else LAM, backend=backend
    )
    size = reach(w.rewards, torch.cat([w.values, w.next_values]), GAMMA, LAM)
    assert_near(out.advantages.cpu(), theirs[0][..., 0], size, STEPS)
    assert_near(out.returns.cpu(), theirs[1][..., 0], size, STEPS)


@pytest.mark.parametrize(
    "name, lam",
    [(TD, 0.0), (TD, LAM), (TD, 1.0), (TD, None), ("vec_" + TD, LAM), ("vec_" + TD, 1.0)],
)
def test_torchrl_td_lambda(backend: str, device: str, name: str, lam: float | None) -> None:
    """λ-returns are `returns`; λ of 0 and 1 are TD(0) and TD(1), None one λ per step.

    The vectorised form takes neither a λ of 0 nor a batch of per-step ones (torchrl 0.14.1).
    """
    x = episodes(backend)
    lams = per_token(x.rewards) if lam is None else torch.full_like(x.rewards, lam)
    w, here = x.wide(), x.on(device)
    theirs = getattr(torchrl(), name)(
        GAMMA,
        lams.double()[..., None] if lam is None else lam,
        *columns(w.next_values, w.rewards, w.done, w.terminated),
    )
    ours = lams.to(device) if lam is None else lam
    out = ppo_fast.gae(**here.kwargs(), gamma=GAMMA, lam=ours, backend=backend)
    size = reach(w.rewards, torch.cat([w.values, w.next_values]), GAMMA, 1.0)
    assert_near(out.returns.cpu(), theirs[..., 0], size, STEPS)


@pytest.mark.parametrize("rho_clip, c_clip", [(1.0, 1.0), (1.25, 0.75)])
def test_torchrl_vtrace(backend: str, device: str, rho_clip: float, c_clip: float) -> None:
    """`returns` are vs. The policy's advantage is ρ(r + γ vs' − V), vs' being V' at an end."""
    x = episodes(backend)
    g = torch.Generator().manual_seed(2)
    ratio = torch.rand(x.rewards.shape, generator=g).to(x.rewards.dtype) + 0.5
    w, here, wide_ratio = x.wide(), x.on(device), ratio.double()
    theirs, theirs_vs = torchrl().vtrace_advantage_estimate(
        GAMMA,
        *columns(wide_ratio.log(), torch.zeros_like(wide_ratio), w.values),
        *columns(w.next_values, w.rewards, w.done, w.terminated),
        rho_thresh=rho_clip,
        c_thresh=c_clip,
    )
    rho, c = ratio.clamp(max=rho_clip).to(device), ratio.clamp(max=c_clip).to(device)
    out = ppo_fast.gae(**here.kwargs(), gamma=GAMMA, lam=1.0, rho=rho, c=c, backend=backend)
    size = rho_clip * reach(w.rewards, torch.cat([w.values, w.next_values]), GAMMA, 1.0)
    assert_near(out.returns.cpu(), theirs_vs[..., 0], size, STEPS)
    vs = torch.cat([out.returns[:, 1:], here.next_values[:, -1:]], 1)
    vs = torch.where(here.done, here.next_values, vs).masked_fill(here.terminated, 0.0)
    policy = rho * (here.rewards + GAMMA * vs - here.values)
    assert_near(policy.cpu(), theirs[..., 0], rho_clip * size, STEPS)


@pytest.mark.parametrize("layout", ["rows", "packed"])
def test_tianshou(backend: str, device: str, layout: str) -> None:
    """A vectorised buffer, environment after environment: its rows, or flat with cu_seqlens."""
    base = pytest.importorskip(
        "tianshou.algorithm.algorithm_base", reason="needs `pip install tianshou==2.0.1`"
    )
    data = pytest.importorskip("tianshou.data")
    x = episodes(backend)
    w, here = x.wide(), x.on(device)
    buffer = data.VectorReplayBuffer(ENVS * STEPS, ENVS)
    for t in range(STEPS):
        step = {name: y[:, t].numpy() for name, y in w.kwargs().items() if y.dtype == torch.bool}
        buffer.add(
            data.Batch(
                obs=np.zeros(ENVS),
                act=np.zeros(ENVS),
                obs_next=np.zeros(ENVS),
                rew=w.rewards[:, t].numpy(),
                info=[{}] * ENVS,
                **step,
            )
        )
    batch, indices = buffer.sample(0)
    order = torch.from_numpy(indices)
    returns, advantages = base.Algorithm.compute_episodic_return(
        batch,
        buffer,
        indices,
        w.next_values.flatten()[order],
        w.values.flatten()[order],
        GAMMA,
        LAM,
    )
    kwargs = here.kwargs()
    if layout == "packed":
        kwargs = {k: v.flatten() for k, v in kwargs.items()}
        kwargs["cu_seqlens"] = torch.arange(ENVS + 1, device=device) * STEPS
    out = ppo_fast.gae(**kwargs, gamma=GAMMA, lam=LAM, backend=backend)
    size = reach(w.rewards, torch.cat([w.values, w.next_values]), GAMMA, LAM)
    ours = out.advantages.flatten().cpu()[order], out.returns.flatten().cpu()[order]
    assert_near(ours[0], torch.from_numpy(advantages), size, STEPS)
    assert_near(ours[1], torch.from_numpy(returns), size, STEPS)


@pytest.mark.parametrize("time_limit_bootstrap", [False, True])
def test_skrl(backend: str, device: str, time_limit_bootstrap: bool) -> None:
    """Without time limits only `terminated` cuts; with them its agent adds γV' to the reward."""
    ppo = pytest.importorskip(
        "skrl.agents.torch.ppo.ppo", reason="needs `pip install --no-deps skrl==2.1.* gymnasium`"
    )
    x = episodes(backend)
    w, here = x.wide(), x.on(device)
    rewards = w.rewards + GAMMA * w.next_values * w.truncated * time_limit_bootstrap
    returns, white = ppo.compute_gae(
        rewards=rewards.T[..., None],
        terminated=w.terminated.T[..., None],
        truncated=w.truncated.T[..., None],
        values=w.values.T[..., None],
        last_values=w.next_values[:, -1:],
        discount_factor=GAMMA,
        lambda_coefficient=LAM,
        time_limit_bootstrap=time_limit_bootstrap,
    )
    kwargs = {k: v.T for k, v in here.kwargs().items()}
    if not time_limit_bootstrap:
        for name in ("truncated", "next_values"):
            del kwargs[name]
        kwargs["bootstrap"] = here.next_values[:, -1]
    out = ppo_fast.gae(**kwargs, gamma=GAMMA, lam=LAM, time_major=True, backend=backend)
    ours = ppo_fast.whiten(out.advantages, moments=out.moments, eps_at="std", backend=backend)
    size = reach(w.rewards, torch.cat([w.values, w.next_values]), GAMMA, LAM)
    raw = (returns[..., 0] - w.values.T).flatten()
    assert_near(out.returns.cpu(), returns[..., 0], size, STEPS)
    assert_near_whitened(ours.cpu(), white[..., 0], raw, size, STEPS)
