"""verl: every loss, mode and estimator patched, against its own."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor
from trainers import needs

needs("verl")
os.environ["VERL_USE_EXTERNAL_PLUGINS"] = "none"  # the tests say when it is patched

from verl.trainer.ppo import core_algos
from verl.utils import torch_functional
from verl.utils.experimental.torch_functional import FusedLinearForPPO
from verl.workers.config import PolicyLossConfig
from verl.workers.utils import losses
from verl_calls import (
    COUNTS,
    MODES,
    SUMS,
    VERSION,
    B,
    T,
    assert_alike,
    assert_all_alike,
    config,
    mask_of,
    normal,
)

from ppo_fast import integrations
from ppo_fast.integrations import verl

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


# What each loss reads beside the clip's bounds, such that every option acts on a few tokens.
OWN = {
    "clip_cov": {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.1, "clip_cov_ub": 2.0},
    "kl_cov": {"kl_cov_ratio": 0.1, "ppo_kl_coef": 0.7},
    "dro": {"dro_beta": 0.3},
}
REGISTERED = [name for name in core_algos.POLICY_LOSS_REGISTRY if name != "bypass_mode"]
needs_dro = pytest.mark.skipif("dro" not in REGISTERED, reason=f"{VERSION} has no dro")


def call_of(name: str, new: Tensor, **given: Any) -> Any:
    """A loss of the registry, as verl's workers call it; an advantage is 0."""
    old, advantages = 0.7 * normal(B, T, seed=1) - 2, normal(B, T, seed=2)
    advantages[2, 3] = 0.0
    own = PolicyLossConfig(**OWN.get(name, {}) | given.pop("own", {}))
    options = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.3, "tau_pos": 1.1, "tau_neg": 1.3}
    info = given.pop("info", {})
    arguments = {
        "old_log_prob": old,
        "log_prob": new,
        "advantages": advantages,
        "response_mask": mask_of("float"),
        "config": config(info, policy_loss=own, **options),
    } | given
    return lambda: core_algos.get_policy_loss_fn(name)(**arguments)


@pytest.mark.parametrize("name", REGISTERED)
def test_policy_losses(name: str) -> None:
    """By the registry: every mode and batch, rollout weights (one is 0), both kinds of mask."""
    new = (0.7 * normal(B, T) - 2).requires_grad_()
    weights = normal(B, T, seed=3).exp()
    weights[2, 4] = 0.0
    calls = [
        call_of(
            name,
            new,
            info=info,
            loss_agg_mode=mode,
            rollout_is_weights=given,
            response_mask=mask_of(mask),
        )
        for mode in MODES
        for info in GLOBAL.values()
        for given, mask in ((None, "bool"), (weights, "float"))
    ]
    # Its own mode, and one bound for both sides of the clip.
    options = {"clip_ratio": 0.15, "clip_ratio_low": None, "clip_ratio_high": None}
    own = PolicyLossConfig(**OWN.get(name, {}))
    calls.append(call_of(name, new, config=config({}, policy_loss=own, **options)))
    assert_all_alike("policy_loss", calls, new, size=4e4)  # A·ρ·weight, summed: 3·e^4·12


@pytest.mark.parametrize("name", ["vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "cispo"])
def test_log_ratios_beyond_the_clamps(name: str) -> None:
    """±20 of a token, 10 of gspo's sequence: ratios that are capped, and a KL that is not."""
    new = -0.1 * normal(B, T).abs()
    old = new - 15.0
    old[2, :4], new[2, 4:8] = new[2, :4] - 25.0, old[2, 4:8] - 25.0
    new.requires_grad_()
    size = 3.0 * 11 * torch.tensor(10.0).exp() if name == "gspo" else 4e4
    assert_alike("policy_loss", call_of(name, new, old_log_prob=old), new, size=float(size))


def test_clip_cov_chooses_as_many_tokens() -> None:
    """A random choice, as verl's: of the same number, by torch's seed, another at every call."""
    new = (0.7 * normal(B, T) - 2).requires_grad_()
    call = call_of("clip_cov", new, own={"clip_cov_ratio": 0.1})

    def dropped() -> tuple[list[int], float]:
        loss, metrics = call()
        (gradient,) = torch.autograd.grad(loss, new)
        zero = (gradient == 0) & (mask_of("bool"))
        return zero.flatten().nonzero().flatten().tolist(), metrics["actor/pg_clipfrac"]

    count = int(0.1 * int(mask_of("bool").sum()))
    theirs = dropped()
    with verl.patched(("policy_loss",)) as calls:
        dropped()  # the first call is compared with every eligible token chosen
        chosen = []
        for seed in (0, 0, 1, 2, 3):
            torch.manual_seed(seed)
            chosen.append(dropped())
        assert (calls["policy_loss"].fused, calls["policy_loss"].left) == (6, 0)
    assert chosen[0] == chosen[1]
    assert len({tuple(tokens) for tokens, _ in chosen}) > 1
    for tokens, fraction in chosen:
        assert len(tokens) == len(theirs[0])
        assert fraction == pytest.approx(theirs[1], rel=1e-6)
        assert fraction == pytest.approx(count / int(mask_of("bool").sum()), rel=1e-6)


@needs_dro
@pytest.mark.parametrize("beta", [None, 0.0])
def test_a_beta_that_dro_refuses(beta: float | None) -> None:
    call = call_of("dro", normal(B, T), own={"dro_beta": beta})
    message = "dro_beta must be a positive"
    with pytest.raises(ValueError, match=message), verl.patched(("policy_loss",)):
        call()


def test_a_mean_over_nothing() -> None:
    """A micro-batch without a token: verl's metrics are 0."""
    x, mask = normal(B, T), torch.zeros(B, T)
    info = {"dp_size": 1, "batch_num_tokens": 7}
    assert_alike(
        "policy_loss",
        lambda: core_algos.compute_policy_loss_vanilla(x, x, x, mask, config=config(info)),
        size=1.0,
    )
    if COUNTS:  # a value loss without the batch's is a mean over nothing, NaN there
        assert_alike(
            "value_loss",
            lambda: core_algos.compute_value_loss(x, x, x, mask, 0.2, **info),
            size=1.0,
        )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", GLOBAL)
def test_value_loss(mode: str, batch: str) -> None:
    if GLOBAL[batch] and not COUNTS:
        pytest.skip(f"{VERSION}'s compute_value_loss takes no counts of the batch")
    values = normal(B, T).requires_grad_()
    old, returns = normal(B, T, seed=1), normal(B, T, seed=2)
    assert_alike(
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
    assert_alike(
        "kl", lambda: losses.kl_penalty(new, ref, kind + straight), new, size=200.0, terms=4
    )


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_gae(gamma: float) -> None:
    """Over the kept slots: verl leaves whitened numbers at the others, ppo_fast zeros."""
    rewards, values, mask = normal(B, T), normal(B, T, seed=1), mask_of("float")

    def call() -> tuple[Tensor, ...]:
        found = core_algos.get_adv_estimator_fn("gae")(rewards, values, mask, gamma, 0.95)
        return tuple(x[mask != 0] for x in found)

    assert_alike("gae", call, size=60.0)


@pytest.mark.parametrize("shape", [(7, 13), (2, 5, 13)])
def test_logprobs(shape: tuple[int, ...]) -> None:
    logits = normal(*shape).float().requires_grad_()
    labels = torch.randint(13, shape[:-1])
    assert_alike(
        "logprobs",
        lambda: torch_functional.logprobs_from_logits(logits, labels),
        logits,
        size=10.0,
        terms=13,
    )


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [("entropy_from_logits", {}), ("entropy_from_logits_with_chunking", {"chunk_size": 5})],
)
def test_entropy(name: str, options: dict[str, int], compiled: bool) -> None:
    """verl's engine compiles the function that it finds, patched or not."""
    logits = (3 * normal(7, 13)).float().requires_grad_()

    def call() -> Tensor:
        function = getattr(torch_functional, name)
        return (torch.compile(function, dynamic=True) if compiled else function)(logits, **options)

    assert_alike("entropy", call, logits, size=20.0, terms=13)


@pytest.mark.parametrize("shape", [(70, 16), (2, 5, 16)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_fused_head(shape: tuple[int, ...], temperature: float) -> None:
    hidden, weight = (normal(*s, seed=len(s)).float() for s in (shape, (101, 16)))
    hidden.requires_grad_(), weight.requires_grad_()
    ids = torch.randint(101, shape[:-1])
    head = FusedLinearForPPO()
    assert_alike(
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
        *(f"verl.trainer.ppo.core_algos.POLICY_LOSS_REGISTRY[{name!r}]" for name in REGISTERED),
        "verl.trainer.ppo.core_algos.compute_policy_loss_reinforce",
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


@pytest.mark.parametrize("mode", ["no-such-mode", *([] if SUMS else ["token-sum"])])
@pytest.mark.parametrize("op", ["value_loss", "policy_loss"])
def test_a_mode_that_verl_has_not(op: str, mode: str) -> None:
    """Also after another mode: the first call is not the only one that is refused."""
    x, mask = normal(B, T), mask_of("bool")

    def call(mode: str) -> Any:
        if op == "value_loss":
            return core_algos.compute_value_loss(x, x, x, mask, 0.2, loss_agg_mode=mode)
        return core_algos.compute_policy_loss_vanilla(x, x, x, mask, mode, config({}))

    with pytest.raises(ValueError, match="Invalid loss_agg_mode"):
        call(mode)
    with pytest.raises(ValueError, match="Invalid loss_agg_mode"), verl.patched((op,)):
        call("token-mean")
        with pytest.warns(RuntimeWarning, match=f"left to verl: loss_agg_mode '{mode}'"):
            call(mode)


def test_ranks_without_the_batchs_count() -> None:
    x, mask = normal(B, T), mask_of("bool")
    error, message = ValueError, "is required when dp_size > 1"
    if not COUNTS:
        error, message = TypeError, "unexpected keyword argument 'dp_size'"

    def call() -> Any:
        return core_algos.compute_value_loss(x, x, x, mask, 0.2, dp_size=2)

    with pytest.raises(error, match=message):
        call()
    with pytest.raises(error, match=message), verl.patched(("value_loss",)):
        call()
