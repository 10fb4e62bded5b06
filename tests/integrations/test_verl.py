"""verl 0.9.1: every loss, mode and estimator patched, against its own."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor
from trainers import needs

needs("verl", "0.9.1")
os.environ["VERL_USE_EXTERNAL_PLUGINS"] = "none"  # the tests say when it is patched

from verl.trainer.ppo import core_algos
from verl.utils import torch_functional
from verl.utils.experimental.torch_functional import FusedLinearForPPO
from verl.workers.config import ActorConfig
from verl.workers.utils import losses

from ppo_fast import integrations, testing
from ppo_fast.integrations import verl

B, T = 5, 11
MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)
GLOBAL = {
    "alone": {},
    "scaled": {"loss_scale_factor": 40},
    "ranks": {"dp_size": 2, "batch_num_tokens": 71, "global_batch_size": 9},
    "all": {
        "dp_size": 4,
        "batch_num_tokens": torch.tensor(171),
        "global_batch_size": 19,
        "loss_scale_factor": 40,
    },
}
KINDS = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3")


def config(info: dict[str, Any], **options: Any) -> ActorConfig:
    return ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        global_batch_info=info,
        **options,
    )


def mask_of(kind: str) -> Tensor:
    """Holes (tool tokens), a whole sequence left out, padding on the right."""
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, 3:6], mask[1, 7:], mask[3] = False, False, False
    return mask if kind == "bool" else mask.double()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def near(ours: Any, theirs: Any, size: float, terms: int = B * T) -> None:
    """fp32's budget for fp64 inputs: verl adds 1e-8 to counts and variances."""
    assert type(ours) is type(theirs)
    if isinstance(ours, Tensor):
        testing.assert_within_budget(
            ours.detach().double(),
            theirs.detach().double(),
            condition=size,
            ops=8 + terms,
            compute=torch.float32,
        )
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            near(ours[key], theirs[key], size, terms)
    else:
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-7)


def both(op: str, call: Any, *leaves: Tensor, size: float, terms: int = B * T) -> None:
    """The call's results and gradients, on verl and on ppo_fast."""
    runs = []
    for patched in (False, True):
        if patched:
            with verl.patched((op,)) as calls:
                found = call()
            assert (calls[op].fused, calls[op].left) == (1, 0)
        else:
            found = call()
        results = list(found) if isinstance(found, tuple) else [found]
        total = sum(x.sum() for x in results if isinstance(x, Tensor) and x.requires_grad)
        gradients = torch.autograd.grad(total, leaves) if leaves else ()
        runs.append([*results, *gradients])
    for theirs, ours in zip(*runs, strict=True):
        near(ours, theirs, size, terms)


@pytest.mark.parametrize("name", ["vanilla", "gspo", "cispo"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", GLOBAL)
def test_policy_losses(name: str, mode: str, batch: str) -> None:
    """By the registry, as verl's workers take them; rollout weights, both kinds of mask."""
    new = (0.7 * normal(B, T) - 2).requires_grad_()
    old, advantages = 0.7 * normal(B, T, seed=1) - 2, normal(B, T, seed=2)
    info, options = GLOBAL[batch], {"clip_ratio_low": 0.1, "clip_ratio_high": 0.3}
    for weights, mask in ((None, "bool"), (normal(B, T, seed=3).exp(), "float")):
        both(
            "policy_loss",
            lambda weights=weights, mask=mask: core_algos.get_policy_loss_fn(name)(
                old_log_prob=old,
                log_prob=new,
                advantages=advantages,
                response_mask=mask_of(mask),
                loss_agg_mode=mode,
                config=config(info, **options),
                rollout_is_weights=weights,
            ),
            new,
            size=4e4,  # A·ρ·weight, summed: 3·e^4·12
        )


def test_a_mean_over_nothing() -> None:
    """A micro-batch without a token: verl's metrics are 0."""
    x, mask = normal(B, T), torch.zeros(B, T)
    info = {"dp_size": 1, "batch_num_tokens": 7}
    both(
        "policy_loss",
        lambda: core_algos.compute_policy_loss_vanilla(x, x, x, mask, config=config(info)),
        size=1.0,
    )
    both("value_loss", lambda: core_algos.compute_value_loss(x, x, x, mask, 0.2, **info), size=1.0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", GLOBAL)
def test_value_loss(mode: str, batch: str) -> None:
    values = normal(B, T).requires_grad_()
    old, returns = normal(B, T, seed=1), normal(B, T, seed=2)
    both(
        "value_loss",
        lambda: core_algos.compute_value_loss(
            vpreds=values,
            values=old,
            returns=returns,
            response_mask=mask_of("bool"),
            cliprange_value=0.4,
            loss_agg_mode=mode,
            **GLOBAL[batch],
        ),
        values,
        size=40.0 * B * T,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("straight", ["", "+"])
def test_kl(kind: str, straight: str) -> None:
    new, ref = (3 * normal(B, T)).requires_grad_(), 3 * normal(B, T, seed=1)
    both("kl", lambda: losses.kl_penalty(new, ref, kind + straight), new, size=200.0, terms=4)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_gae(gamma: float) -> None:
    """Over the kept slots: verl leaves whitened numbers at the others, ppo_fast zeros."""
    rewards, values, mask = normal(B, T), normal(B, T, seed=1), mask_of("float")

    def call() -> tuple[Tensor, ...]:
        found = core_algos.get_adv_estimator_fn("gae")(rewards, values, mask, gamma, 0.95)
        return tuple(x[mask != 0] for x in found)

    both("gae", call, size=60.0)


@pytest.mark.parametrize("shape", [(7, 13), (2, 5, 13)])
def test_logprobs(shape: tuple[int, ...]) -> None:
    logits = normal(*shape).float().requires_grad_()
    labels = torch.randint(13, shape[:-1])
    both(
        "logprobs",
        lambda: torch_functional.logprobs_from_logits(logits, labels),
        logits,
        size=10.0,
        terms=13,
    )


@pytest.mark.parametrize("shape", [(70, 16), (2, 5, 16)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_fused_head(shape: tuple[int, ...], temperature: float) -> None:
    hidden, weight = (normal(*s, seed=len(s)).float() for s in (shape, (101, 16)))
    hidden.requires_grad_(), weight.requires_grad_()
    ids = torch.randint(101, shape[:-1])
    head = FusedLinearForPPO()
    both(
        "linear_logprobs",
        lambda: head(hidden, weight, ids, temperature=temperature),
        hidden,
        weight,
        size=100.0,
        terms=16 + 70,
    )


def test_it_is_patched_at_every_import_site_and_put_back() -> None:
    original = core_algos.compute_value_loss
    places = verl.apply()
    assert {
        "verl.trainer.ppo.core_algos.POLICY_LOSS_REGISTRY['vanilla']",
        "verl.trainer.ppo.core_algos.POLICY_LOSS_REGISTRY['gspo']",
        "verl.trainer.ppo.core_algos.POLICY_LOSS_REGISTRY['cispo']",
        "verl.trainer.ppo.core_algos.ADV_ESTIMATOR_REGISTRY['gae']",
        "verl.workers.utils.losses.compute_value_loss",
        "verl.workers.utils.losses.kl_penalty",
        "verl.utils.torch_functional.logprobs_from_logits",
        "verl.utils.experimental.torch_functional.FusedLinearForPPO.forward",
    } <= set(places)
    assert losses.compute_value_loss is core_algos.compute_value_loss is not original
    with pytest.raises(integrations.NeverReachedError, match="policy_loss, value_loss, kl, gae"):
        verl.revert()
    assert losses.compute_value_loss is core_algos.compute_value_loss is original


@pytest.mark.parametrize(("mode", "info"), [("token-mean", {"dp_size": 2}), ("no-such-mode", {})])
def test_errors_are_verls_own(mode: str, info: dict[str, Any]) -> None:
    x, mask = normal(B, T), mask_of("bool")
    message = "is required when dp_size > 1" if info else "Invalid loss_agg_mode"

    def call() -> Any:
        return core_algos.compute_value_loss(x, x, x, mask, 0.2, loss_agg_mode=mode, **info)

    with pytest.raises(ValueError, match=message):
        call()
    with pytest.raises(ValueError, match=message), verl.patched(("value_loss",)):
        call()
