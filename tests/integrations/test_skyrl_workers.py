"""SkyRL's processes: a Ray actor with the shared registry, its model's wrapper, its workers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pages
import pytest
import torch
from both_sides import B, T, assert_near, mask_of, normal
from torch import Tensor
from trainers import needs

needs("skyrl")
import ray
import skyrl_imports  # noqa: F401
import tiny
from skyrl.backends.skyrl_train.utils import ppo_utils, torch_utils
from skyrl.backends.skyrl_train.workers import model_wrapper, worker
from skyrl.train.config.config import TrainerConfig
from skyrl.train.trainer import RayPPOTrainer
from skyrl_calls import config
from transformers import GPT2LMHeadModel

from ppo_fast import integrations
from ppo_fast.integrations import skyrl

RAY = """
import os

import ray
import skyrl_imports
import torch


class Worker:
    def __init__(self):
        import skyrl_imports
        from ppo_fast.integrations import skyrl

        skyrl.apply(("policy_loss",))
        from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry

        self.loss = PolicyLossRegistry.get("dual_clip")

    def step(self):
        from ppo_fast.integrations import skyrl
        from skyrl.train.config import AlgorithmConfig

        x, own = torch.arange(6.0).view(2, 3) / -9, AlgorithmConfig(policy_loss_type="dual_clip")
        value, metrics = self.loss(x, x - 0.5, x, own, torch.ones(2, 3))
        calls = skyrl.integration.calls["policy_loss"]
        return os.getpid(), float(value), metrics["clip_ratio"], calls.fused


ray.init(num_cpus=1, include_dashboard=False, logging_level="ERROR")
from skyrl.backends.skyrl_train.utils.ppo_utils import sync_registries
from ppo_fast.integrations import skyrl

skyrl.apply(("policy_loss",))
sync_registries()  # pickles every loss, the replacements too
pid, *found = ray.get(ray.remote(Worker).remote().step.remote())
assert pid != os.getpid()
print(*found)
ray.shutdown()
"""


def test_a_ray_actor_is_patched() -> None:
    """As on the page, with SkyRL's registry, which all its processes share through Ray."""
    done = subprocess.run(
        [sys.executable, "-c", RAY],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    x = torch.arange(6.0).view(2, 3) / -9
    ratio = torch.full_like(x, 0.5).exp()
    theirs = -torch.min(ratio * x, ratio.clamp(0.8, 1.2) * x).sum()
    value, share, fused = map(float, done.stdout.strip().splitlines()[-1].split())
    assert value == pytest.approx(float(theirs), rel=1e-6)
    assert (share, fused) == (0.0, 1.0)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_model_forward_and_loss(compiled: bool) -> None:
    """SkyRL's own wrapper around a model, left-padded, then loss, entropy and its gradients."""
    model = GPT2LMHeadModel(tiny.config(vocab=97)).eval()
    tokens = torch.randint(2, 97, (B, 20), generator=torch.Generator().manual_seed(0))
    attention = torch.ones_like(tokens)
    attention[1, :6] = attention[3, :3] = 0
    mask = mask_of("float").float()
    old, advantages = -4 + 0.1 * normal(B, T).float(), normal(B, T, seed=2).float() / (B * T)

    def step() -> tuple[Tensor, Tensor, float, Tensor]:
        wrapper = model_wrapper.HFModelWrapper(model, use_torch_compile=compiled)
        new, output = wrapper(
            tokens, T, attention, temperature=0.7, return_output=True, compute_entropy=True
        )
        own = config("dual_clip")
        loss, metrics = ppo_utils.PolicyLossRegistry.get("dual_clip")(
            new, old, advantages, own, mask
        )
        total = loss - 0.01 * torch_utils.masked_mean(output["entropy"][:, -T - 1 : -1], mask)
        (gradient,) = torch.autograd.grad(total, model.transformer.wte.weight)
        return new, total, metrics["clip_ratio"], gradient

    theirs = step()
    with skyrl.patched(("policy_loss", "logprobs", "entropy")) as counts:
        ours = step()
    assert {op: (n.fused, n.left) for op, n in counts.items()} == {
        "policy_loss": (1, 0),
        "logprobs": (1, 0),
        "entropy": (1, 0),
    }
    for a, b in zip(ours, theirs, strict=True):
        assert_near(a, b, size=20.0, terms=97)


def test_the_block_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer that builds workers which patch themselves before they take their losses."""
    (block,) = pages.blocks(pages.ROOT / "docs/integrations/skyrl.md")
    scope: dict[str, Any] = {"__name__": "block"}
    exec(compile(block.code, block.page, "exec"), scope)
    built: list[Any] = []
    monkeypatch.setattr(
        RayPPOTrainer, "build_models", lambda self, *workers: built.extend(workers)
    )

    def start(self: Any, cfg: Any) -> None:
        self.cfg = cfg

    monkeypatch.setattr(worker.Worker, "__init__", start)
    own, taken = TrainerConfig(algorithm=config("gspo")), {}
    loss, critic = ppo_utils.PolicyLossRegistry.get("gspo"), ppo_utils.ppo_critic_loss
    for name in ("Policy", "Critic", "Reference"):
        taken[name] = scope[name](cfg=own)
        assert [*skyrl.integration.calls] == {
            "Policy": ["policy_loss", "logprobs", "entropy"],
            "Critic": ["value_loss"],
            "Reference": ["logprobs"],
        }[name]
        with pytest.raises(integrations.NeverReachedError):
            skyrl.revert()
    assert taken["Policy"].policy_loss_fn is not loss
    assert taken["Critic"].critic_loss_fn is not critic
    scope["Trainer"].build_models(object.__new__(scope["Trainer"]), None, None, None)
    with pytest.raises(integrations.NeverReachedError, match="gae"):
        skyrl.revert()
    assert len(built) == 3 and all(isinstance(one, ray.actor.ActorClass) for one in built)
