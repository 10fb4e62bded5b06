"""torchrl on CartPole: GAE and ClipPPOLoss, patched against unpatched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from control import Weights, assert_trains_alike, weights
from torch import Tensor, nn

import ppo_fast
from ppo_fast.integrations import torchrl as swap

torchrl = pytest.importorskip(
    "torchrl", reason="needs `pip install torchrl gymnasium`, torchrl 0.12 to 0.14"
)
pytest.importorskip("gymnasium")

from tensordict.nn import TensorDictModule
from torchrl.collectors import Collector
from torchrl.envs import GymEnv
from torchrl.modules import ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE, functional

FRAMES, UPDATES = 128, 6
PLAIN, VECTORISED = "generalized_advantage_estimate", "vec_generalized_advantage_estimate"


def networks() -> tuple[Any, Any]:
    torch.manual_seed(0)

    def mlp(out: int) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, out))

    actor = ProbabilisticActor(
        TensorDictModule(mlp(2), in_keys=["observation"], out_keys=["logits"]),
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )
    return actor, ValueOperator(mlp(1), in_keys=["observation"])


def train(vectorized: bool, **options: Any) -> Weights:
    """Six updates of two epochs on 128 frames each."""
    actor, critic = networks()
    env = GymEnv("CartPole-v1", categorical_action_encoding=True, device="cpu")
    env.set_seed(0)
    collector = Collector(
        env, actor, frames_per_batch=FRAMES, total_frames=FRAMES * UPDATES, device="cpu"
    )
    estimate = GAE(gamma=0.99, lmbda=0.95, value_network=critic, vectorized=vectorized, **options)
    loss = ClipPPOLoss(actor, critic, entropy_coeff=0.01)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    for batch in collector:
        estimate(batch)
        for _ in range(2):
            terms = loss(batch)
            total = sum(terms[f"loss_{name}"] for name in ("objective", "critic", "entropy"))
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
    collector.shutdown()
    return weights(actor, critic)


def test_trains_alike() -> None:
    assert_trains_alike(swap.integration, lambda: train(False), UPDATES, weights(*networks()))


def test_the_vectorised_form_is_patched_as_well() -> None:
    """It drops powers of γλ below 1e-7, so its own run differs in the last bits already."""
    with swap.patched() as calls:
        ours = train(True)
        assert (calls["gae"].fused, calls["gae"].left) == (UPDATES, 0)
    with ppo_fast.use_backend("reference"), swap.patched():
        plain = train(True)
    theirs = train(True)
    for name in theirs:
        for one in (ours, plain):
            assert float((one[name] - theirs[name]).abs().max()) <= 1e-4


def inputs(*shape: int, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    names = ("state_value", "next_state_value", "reward")
    floats = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name in names}
    done = torch.rand(shape, generator=g) < 0.2
    return {**floats, "done": done, "terminated": done & (torch.rand(shape, generator=g) < 0.5)}


@pytest.mark.parametrize(
    "shape, time_dim",
    [
        ((7, 1), -2),
        ((3, 7, 2), -2),
        ((2, 3, 7, 1), -2),
        ((3, 7, 1), 1),
        ((7, 3, 1), 0),
        ((7, 3, 1), -3),
        ((3, 7), -1),
    ],
)
@pytest.mark.parametrize("lam", ["number", "scalar", "tensor"])
def test_layouts_and_lambdas(shape: tuple[int, ...], time_dim: int, lam: str) -> None:
    """Random flags, a termination that is not `done` too, in fp64, beside its own loop.

    Numbers are exact in fp32, to which torchrl's products with integer flags round them.
    """
    x = inputs(*shape)
    x["terminated"] |= torch.rand(shape, generator=torch.Generator().manual_seed(4)) < 0.1
    value: Any = {
        "number": 29 / 32,
        "scalar": torch.tensor(0.9, dtype=torch.float64),
        "tensor": torch.rand(shape, generator=torch.Generator().manual_seed(2)).double(),
    }[lam]
    if lam == "tensor" and time_dim != -2:
        value = value.transpose(time_dim, -2).contiguous().transpose(time_dim, -2)
    gamma = 31 / 32
    with ppo_fast.use_backend("reference"):
        ours = swap.estimate(gamma, value, **x, time_dim=time_dim)
    theirs = getattr(functional, PLAIN)(gamma, value, **x, time_dim=time_dim)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape == shape and a.dtype == b.dtype
        assert float((a - b).abs().max()) <= 7 * 8 * 2.0**-52 * float(b.abs().max())


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"gamma": torch.full((3, 7, 1), 0.9)}, "a value for each step"),
        ({"state_value": torch.zeros(3, 7, 1, dtype=torch.float64, requires_grad=True)}, "differ"),
        ({"reward": torch.zeros(3, 7, 1)}, "float64 beside"),
    ],
    ids=["gamma", "gradient", "precision"],
)
def test_what_is_not_covered_is_left_to_torchrl(change: dict[str, Any], reason: str) -> None:
    x = {"gamma": 0.9, "lmbda": 0.8, **inputs(3, 7, 1), **change}
    theirs = getattr(functional, PLAIN)(**x)
    with swap.patched() as calls:
        with pytest.warns(RuntimeWarning, match=reason):
            ours = getattr(functional, PLAIN)(**x)
        assert (calls["gae"].fused, calls["gae"].left) == (0, 1)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b) and a.requires_grad == b.requires_grad


def test_every_import_site_is_patched_and_put_back() -> None:
    from torchrl.objectives.value import advantages

    before = [getattr(m, f) for m in (functional, advantages) for f in (PLAIN, VECTORISED)]
    places = swap.apply()
    assert sorted(places) == sorted(
        f"{m.__name__}.{f}" for m in (functional, advantages) for f in (PLAIN, VECTORISED)
    )
    x = inputs(3, 7, 1)
    getattr(advantages, PLAIN)(0.9, 0.8, **x)
    swap.revert()
    assert before == [getattr(m, f) for m in (functional, advantages) for f in (PLAIN, VECTORISED)]
