"""Tests of the lines on docs/integrations/cleanrl.md against CleanRL's own statements."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import installed
import pages
import pytest
import torch
from control import loop
from torch import Tensor

import ppo_fast
from ppo_fast import testing

STEPS, ENVS, BATCH = 24, 3, 40
ARGS = SimpleNamespace(
    gamma=31 / 32,
    gae_lambda=29 / 32,
    num_steps=STEPS,
    clip_coef=0.2,
    norm_adv=True,
    clip_vloss=True,
    ent_coef=0.01,
    vf_coef=0.5,
)
GAE, LOSS = "ends = torch.cat", "policy, stats ="


def source() -> ast.Module:
    """Its ppo.py, found without importing it: it wants gym, which is no more."""
    spec = importlib.util.find_spec("cleanrl")
    if spec is None:
        pytest.skip("needs `pip install --no-deps --ignore-requires-python cleanrl==1.2.0`")
    (folder,) = spec.submodule_search_locations or [""]
    return ast.parse((Path(folder) / "ppo.py").read_text(encoding="utf-8"))


def rollout() -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    last = normal(ENVS, 1)
    return {
        "rewards": normal(STEPS, ENVS),
        "values": normal(STEPS, ENVS),
        "dones": (torch.rand(STEPS, ENVS, generator=g) < 0.2).double(),
        "next_done": torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64),
        "next_obs": None,
        "agent": SimpleNamespace(get_value=lambda _: last),
        "args": ARGS,
        "device": "cpu",
    }


def minibatch() -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    names = ("newlogprob", "b_logprobs", "b_advantages", "b_values", "b_returns", "entropy")
    x: dict[str, Any] = {name: normal(BATCH) for name in names}
    x["newvalue"] = (x["b_values"] + 0.3 * normal(BATCH))[:, None]
    x["newlogprob"] = x["b_logprobs"] + 0.3 * normal(BATCH)
    for name in ("newlogprob", "newvalue", "entropy"):
        x[name] = x[name].requires_grad_()
    return {**x, "mb_inds": torch.arange(BATCH), "args": ARGS, "clipfracs": []}


def ours(holding: str, scope: dict[str, Any]) -> dict[str, Any]:
    scope = {"torch": torch, "ppo_fast": ppo_fast, **scope}
    exec(pages.block("integrations/cleanrl.md", holding), scope)
    return scope


def test_the_change_is_five_lines() -> None:
    text = pages.block("integrations/cleanrl.md", GAE)
    assert len(text.strip().splitlines()) == 5


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_advantages_beside_a_loop(backend: str) -> None:
    """Environment by environment in Python's doubles."""
    x = rollout()
    with ppo_fast.use_backend(backend):
        got = ours(GAE, x)
    ends = torch.cat([x["dones"][1:], x["next_done"][None]])
    after = torch.cat([x["values"][1:], x["agent"].get_value(None).T]) * (1 - ends)
    size = installed.reach(x["rewards"], x["values"], ARGS.gamma, ARGS.gae_lambda)
    for env in range(ENVS):
        columns = {
            "rewards": x["rewards"],
            "values": x["values"],
            "next_values": after,
            "done": ends,
        }
        one = {name: column[:, env].tolist() for name, column in columns.items()}
        want = loop(**one, gamma=ARGS.gamma, lam=ARGS.gae_lambda)
        for name, exact in zip(("advantages", "returns"), want, strict=True):
            exact = torch.tensor(exact, dtype=torch.float64)
            installed.assert_near(got[name][:, env], exact, size, STEPS)


def test_advantages_beside_its_own() -> None:
    x = rollout()
    theirs = installed.block(source(), "next_value", "returns", **x)
    got = ours(GAE, x)
    size = installed.reach(x["rewards"], x["values"], ARGS.gamma, ARGS.gae_lambda)
    for name in ("advantages", "returns"):
        installed.assert_near(got[name], theirs[name], size, STEPS)


def test_losses_beside_its_own() -> None:
    """Loss, what it logs and every gradient; sums of 40 terms, ratios of up to e."""
    runs = []
    for run in (
        lambda x: installed.block(source(), "logratio", "loss", **x),
        lambda x: ours(LOSS, x),
    ):
        x = minibatch()
        out = run(x)
        out["loss"].backward()
        runs.append((out, {k: v.grad for k, v in x.items() if getattr(v, "requires_grad", 0)}))
    (theirs, want), (got, grads) = runs
    stats = got["stats"].compute()
    for name, value in (
        ("loss", got["loss"]),
        ("old_approx_kl", stats["kl_k1"]),
        ("approx_kl", stats["kl_k3"]),
    ):
        exact = theirs[name].detach().double()
        value = torch.as_tensor(value, dtype=torch.float64).detach()
        testing.assert_within_budget(value, exact, condition=10.0, ops=BATCH, name=name)
    assert stats["clip_frac_eps"] == pytest.approx(theirs["clipfracs"][0], rel=2**-22)
    for name, grad in want.items():
        testing.assert_within_budget(grads[name], grad, condition=1.0, ops=BATCH, name=name)
