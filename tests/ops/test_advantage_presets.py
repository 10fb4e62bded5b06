"""The trainers' GAE, by their own installed code: verl, OpenRLHF, TRL.

They compute in fp64 on the numbers that ppo_fast gets, so what may differ is rounding.
"""

from __future__ import annotations

import functools
import itertools
import logging
import types
from typing import Any

import pytest
import torch
from conftest import ON_GPU
from installed import assert_near, assert_near_whitened, block, functions, reach, source
from preset_inputs import Rollout, rollout
from torch import Tensor

import ppo_fast

VERL, OPENRLHF, TRL = "verl==0.9.1", "openrlhf==0.11.2", "trl==1.12.0"
GAMMA, LAM, KL_COEF, CLIP = 0.97, 0.9, 0.3, (-0.8, 0.9)
# TRL divides an integer count by another: its Bessel correction is fp32.
BESSEL = torch.finfo(torch.float32).eps
KL = {"k1": None, "k2": None, "k3": 10.0}
STEPS = 21


@pytest.fixture
def dtype(backend: str) -> torch.dtype:
    return torch.float32 if backend in ON_GPU else torch.float64


def verl() -> types.SimpleNamespace:
    helpers = functions(
        source(VERL, "utils/torch_functional.py"),
        "masked_sum",
        "masked_mean",
        "masked_var",
        "masked_whiten",
    )
    core = functions(
        source(VERL, "trainer/ppo/core_algos.py"),
        "compute_gae_advantage_return",
        "kl_penalty",
        "compute_reinforce_plus_plus_outcome_advantage",
        "kl_penalty_forward",
        verl_F=helpers,
    )
    trainer = functions(
        source(VERL, "trainer/ppo/ray_trainer.py"),
        "apply_kl_penalty",
        core_algos=core,
        masked_mean=helpers.masked_mean,
    )
    return types.SimpleNamespace(**vars(core), **vars(trainer))


@pytest.mark.parametrize("mask", ["holes", "right"])
def test_verl_gae(backend: str, device: str, dtype: torch.dtype, mask: str) -> None:
    """masked="carry", then whiten's defaults; verl adds 1e-8 to the count under every mean."""
    theirs, x = verl().compute_gae_advantage_return, rollout(dtype, mask)
    wide, here, keep = x.wide(), x.on(device), x.mask
    white, returns = theirs(wide.rewards, wide.values, keep.double(), GAMMA, LAM)
    out = ppo_fast.gae(
        here.rewards, here.values, gamma=GAMMA, lam=LAM, mask=here.mask, backend=backend
    )
    ours = ppo_fast.whiten(out.advantages, here.mask, moments=out.moments, backend=backend).cpu()
    size, raw = reach(wide.rewards, wide.values, GAMMA, LAM), (returns - wide.values)[keep]
    assert_near(out.returns.cpu()[keep], returns[keep], size, STEPS)
    assert_near_whitened(ours[keep], white[keep], raw, size, STEPS, slack=1e-8 / len(raw))
    # verl leaves what the recurrence held at masked tokens; here they are 0.
    assert not bool(ours[~keep].any() or out.returns.cpu()[~keep].any())
    assert bool(white[~keep].any())


def verl_rewards(x: Rollout, estimator: str) -> Tensor:
    """verl's reward manager (the score on the last valid token) and its KL penalty."""
    last = torch.where(x.mask, torch.arange(x.mask.shape[1]), -1).amax(1)
    scores = torch.zeros_like(x.rewards)
    scores[torch.arange(len(last)), last] = x.scores

    class Batch(dict[str, Tensor]):
        batch_size = scores.shape

    data = types.SimpleNamespace(
        batch=Batch(
            response_mask=x.mask.double(),
            token_level_scores=scores,
            old_log_probs=x.logprobs,
            ref_log_prob=x.ref,
        )
    )
    controller = types.SimpleNamespace(value=KL_COEF, update=lambda **_: None)
    verl().apply_kl_penalty(data, controller, kl_penalty=estimator)
    return data.batch["token_level_rewards"]


@pytest.mark.parametrize("estimator", KL)
def test_verl_kl_in_reward(backend: str, device: str, dtype: torch.dtype, estimator: str) -> None:
    """score_at="last-token", masked="carry"; verl holds k3 within ±10."""
    x = rollout(dtype, "holes")
    wide, here, keep = x.wide(), x.on(device), x.mask
    rewards = verl_rewards(wide, estimator)
    _, returns = verl().compute_gae_advantage_return(
        rewards, wide.values, keep.double(), GAMMA, LAM
    )
    out = ppo_fast.rlhf_advantages(
        here.scores,
        here.logprobs,
        here.ref,
        here.values,
        here.mask,
        kl_coef=KL_COEF,
        kl_estimator=estimator,
        kl_clamp=KL[estimator],
        gamma=GAMMA,
        lam=LAM,
        backend=backend,
    )
    size = reach(rewards, wide.values, GAMMA, LAM)
    assert_near(out.rewards.cpu()[keep], rewards[keep], size, STEPS)
    assert_near(out.returns.cpu()[keep], returns[keep], size, STEPS)
    assert_near(out.advantages.cpu()[keep], (returns - wide.values)[keep], size, STEPS)


def test_verl_reinforce_plus_plus(backend: str, device: str, dtype: torch.dtype) -> None:
    """No critic: with values of 0 and λ = 1, the discounted return over the kept tokens."""
    theirs, x = verl().compute_reinforce_plus_plus_outcome_advantage, rollout(dtype, "holes")
    wide, here, keep = x.wide(), x.on(device), x.mask
    white, returns = theirs(wide.rewards, keep.double(), types.SimpleNamespace(gamma=GAMMA))
    zero = torch.zeros_like(here.values)
    out = ppo_fast.gae(here.rewards, zero, gamma=GAMMA, lam=1.0, mask=here.mask, backend=backend)
    ours = ppo_fast.whiten(out.advantages, here.mask, moments=out.moments, backend=backend)
    size, raw = reach(wide.rewards, zero, GAMMA, 1.0), returns[keep]
    assert_near(out.returns.cpu(), returns, size, STEPS)
    assert_near_whitened(ours.cpu(), white, raw, size, STEPS, slack=1e-8 / len(raw))


@pytest.mark.parametrize("mask", ["holes", "right"])
def test_openrlhf_gae(backend: str, device: str, dtype: torch.dtype, mask: str) -> None:
    """masked="zero": rewards and values are 0 at masked tokens, the recursion goes on."""
    tree = source(OPENRLHF, "trainer/ppo_utils/experience_maker.py")
    theirs, x = functions(tree, "get_advantages_and_returns"), rollout(dtype, mask)
    wide, here, keep = x.wide(), x.on(device), x.mask
    advantages, returns = theirs.get_advantages_and_returns(
        None, wide.values, wide.rewards, keep.long(), GAMMA, LAM
    )
    out = ppo_fast.gae(
        here.rewards,
        here.values,
        gamma=GAMMA,
        lam=LAM,
        mask=here.mask,
        masked="zero",
        backend=backend,
    )
    size = reach(wide.rewards, wide.values, GAMMA, LAM)
    assert_near(out.advantages.cpu()[keep], advantages[keep], size, STEPS)
    assert_near(out.returns.cpu()[keep], returns[keep], size, STEPS)


def openrlhf(x: Rollout, estimator: str) -> tuple[Any, Tensor]:
    """One batch through OpenRLHF's shaping, GAE and whitening; and its shaped rewards."""
    shaping = functions(source(OPENRLHF, "models/utils.py"), "compute_approx_kl", "compute_reward")
    maker = functions(
        source(OPENRLHF, "trainer/ppo_utils/experience_maker.py"),
        "compute_advantages_and_returns",
        "get_advantages_and_returns",
        itertools=itertools,
        apply_length_penalties=lambda *_: None,
        logger=logging.getLogger(__name__),
        compute_reward=shaping.compute_reward,
        List=list,
        Experience=Any,
    )
    space = types.SimpleNamespace
    advantage = space(estimator="gae", gamma=GAMMA, lambd=LAM, no_std_norm=False)
    args = space(
        algo=space(advantage=advantage),
        rollout=space(n_samples_per_prompt=1),
        reward=space(clip_range=CLIP),
    )
    me = space(
        strategy=space(args=args),
        advantage_estimator="gae",
        kl_ctl=space(value=KL_COEF),
        get_advantages_and_returns=functools.partial(maker.get_advantages_and_returns, None),
    )
    kl = shaping.compute_approx_kl(x.logprobs, x.ref, kl_estimator=estimator)
    mask, index = x.mask.long(), list(range(len(x.scores)))
    rewards = shaping.compute_reward(
        x.scores, KL_COEF, kl, action_mask=mask, reward_clip_range=CLIP
    )
    batch = space(rewards=x.scores, index=index, action_mask=mask, values=x.values, kl=kl, info={})
    maker.compute_advantages_and_returns(me, [batch])
    return batch, rewards


@pytest.mark.parametrize("estimator", KL)
def test_openrlhf_rewards_and_whitening(backend: str, device: str, estimator: str) -> None:
    """kl_clamp=10 for every estimator, reward_clip; whitened by the population's variance.

    OpenRLHF takes the KL, the shaped reward and the whitening in fp32, whatever it is given.
    """
    x = rollout(torch.float32, "holes")
    here, keep = x.on(device), x.mask
    batch, rewards = openrlhf(x, estimator)
    out = ppo_fast.rlhf_advantages(
        here.scores,
        here.logprobs,
        here.ref,
        here.values,
        here.mask,
        kl_coef=KL_COEF,
        kl_estimator=estimator,
        kl_clamp=10.0,
        gamma=GAMMA,
        lam=LAM,
        masked="zero",
        reward_clip=CLIP,
        backend=backend,
    )
    ours = ppo_fast.whiten(
        out.advantages, here.mask, moments=out.moments, unbiased=False, eps=0.0, backend=backend
    )
    size, raw = reach(rewards, x.values, GAMMA, LAM), (batch.returns - x.values)[keep].double()
    assert_near(out.rewards.cpu()[keep], rewards[keep], size, STEPS)
    assert_near(out.returns.cpu()[keep], batch.returns[keep], size, STEPS)
    assert_near_whitened(ours.cpu()[keep], batch.advantages[keep], raw, size, STEPS)


def trl(x: Rollout, **options: Any) -> dict[str, Any]:
    """TRL's inline statements, from the padding masks to the whitened advantages."""
    tree = source(TRL, "experimental/ppo/ppo_trainer.py")
    args = types.SimpleNamespace(
        kl_coef=KL_COEF, gamma=GAMMA, lam=LAM, whiten_rewards=False, kl_estimator="k1"
    )
    vars(args).update(options)
    helpers = functions(tree, "masked_mean", "masked_var", "masked_whiten")
    return block(
        tree,
        "response_idxs",
        "advantages",
        args=args,
        responses=x.mask,
        values=x.values,
        logprobs=x.logprobs,
        ref_logprobs=x.ref,
        scores=x.scores,
        INVALID_LOGPROB=1.0,
        sequence_lengths=x.mask.sum(1) - 1,
        **vars(helpers),
    )


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_trl(backend: str, device: str, dtype: torch.dtype, estimator: str) -> None:
    """score_at="first-pad": the slot after the last token, with its value; whiten's defaults."""
    x = rollout(dtype, "right")
    wide, here, keep = x.wide(), x.on(device), x.mask
    theirs = trl(wide, kl_estimator=estimator)
    out = ppo_fast.rlhf_advantages(
        here.scores,
        here.logprobs,
        here.ref,
        here.values,
        here.mask,
        kl_coef=KL_COEF,
        kl_estimator=estimator,
        gamma=GAMMA,
        lam=LAM,
        masked="zero",
        score_at="first-pad",
        backend=backend,
    )
    ours = ppo_fast.whiten(out.advantages, here.mask, moments=out.moments, backend=backend)
    size, returns = reach(theirs["rewards"], theirs["values"], GAMMA, LAM), theirs["returns"]
    assert_near(out.rewards.cpu(), theirs["rewards"], size, STEPS)
    assert_near(out.returns.cpu(), returns, size, STEPS)
    raw = (returns - theirs["values"])[keep]
    assert_near(out.advantages.cpu()[keep], raw, size, STEPS)
    assert_near_whitened(ours.cpu(), theirs["advantages"], raw, size, STEPS, slack=BESSEL)


def test_trl_whitened_rewards(backend: str, device: str, dtype: torch.dtype) -> None:
    """`whiten_rewards`: the op's rewards, whitened without a shift, through gae again."""
    x = rollout(dtype, "right")
    wide, here = x.wide(), x.on(device)
    theirs, plain = trl(wide, whiten_rewards=True), trl(wide)
    slots = ~plain["padding_mask_p1"]
    shaped = ppo_fast.rlhf_advantages(
        here.scores,
        here.logprobs,
        here.ref,
        here.values,
        here.mask,
        kl_coef=KL_COEF,
        score_at="first-pad",
        backend=backend,
    )
    rewards = ppo_fast.whiten(shaped.rewards, slots.to(device), shift_mean=False, backend=backend)
    out = ppo_fast.gae(
        rewards, here.values, gamma=GAMMA, lam=LAM, mask=slots.to(device), backend=backend
    )
    raw = plain["rewards"][slots]
    size, top = reach(theirs["rewards"], theirs["values"], GAMMA, LAM), float(raw.abs().max())
    assert_near_whitened(rewards.cpu(), theirs["rewards"], raw, top, STEPS, slack=BESSEL)
    # fp32, as its rewards are: their error reaches the sum with the gain of reach().
    gain = size * float((2 + theirs["rewards"].abs().max()) / raw.std())
    assert_near(out.returns.cpu().float(), theirs["returns"].float(), gain, STEPS + len(raw))
