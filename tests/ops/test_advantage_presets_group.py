"""The trainers' group baselines, by their own installed code: verl, OpenRLHF."""

from __future__ import annotations

import collections
import functools
import itertools
import logging
import types
from typing import Any

import numpy
import pytest
import torch
from conftest import ON_GPU
from installed import assert_near, assert_near_whitened, block, functions, source
from preset_inputs import Rollout, rollout
from torch import Tensor

import ppo_fast

TRL = "trl==1.16.0"
VERL, OPENRLHF = "verl==0.9.1", "openrlhf==0.11.2"
GROUP, ROWS, STEPS, KL_COEF = 4, 12, 9, 0.3
EPS = 1e-6


def verl() -> types.SimpleNamespace:
    helpers = functions(
        source(VERL, "utils/torch_functional.py"),
        "masked_sum",
        "masked_mean",
        "masked_var",
        "masked_whiten",
    )
    return functions(
        source(VERL, "trainer/ppo/core_algos.py"),
        "compute_grpo_outcome_advantage",
        "compute_reinforce_plus_plus_baseline_outcome_advantage",
        "compute_rloo_outcome_advantage",
        "compute_opo_outcome_advantage",
        "compute_grpo_passk_outcome_advantage",
        "compute_gdpo_outcome_advantage",
        verl_F=helpers,
        defaultdict=collections.defaultdict,
        np=numpy,
    )


def scores_and_groups() -> tuple[Tensor, Tensor]:
    """Groups of 4, 5 and 3 whose members are interleaved; the last one's scores are equal."""
    ids = torch.tensor([0, 1, 0, 2, 1, 0, 1, 2, 1, 0, 1, 2])
    scores = torch.randn(ROWS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return torch.where(ids == 2, 0.5, scores), ids


def outcome(theirs: Any, scores: Tensor, ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
    """verl's functions sum token-level rewards; the response's score is its whole reward."""
    rewards = torch.zeros(mask.shape, dtype=torch.float64)
    rewards[:, 0] = scores
    return theirs(rewards, mask.double(), ids.tolist(), **options)[0]


PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": ("compute_grpo_outcome_advantage", {}),
    "dr_grpo": ("compute_grpo_outcome_advantage", {"norm_adv_by_std_in_grpo": False}),
    "rloo": ("compute_rloo_outcome_advantage", {}),
}


@pytest.mark.parametrize("baseline", PRESETS)
def test_verl(baseline: str) -> None:
    """One number per response, spread over its kept tokens."""
    name, options = PRESETS[baseline]
    scores, ids = scores_and_groups()
    mask = rollout(torch.float64, "holes", ROWS, STEPS).mask
    theirs = outcome(getattr(verl(), name), scores, ids, mask, **options)
    ours = ppo_fast.group_advantages(scores, ids, baseline=baseline)[:, None] * mask
    # Sums over a group; grpo divides their rounding by σ + 1e-6, a group of equals by 1e-6.
    size = float(scores.abs().max()) / (EPS if baseline == "grpo" else 1)
    assert_near(ours[ids == 2], theirs[ids == 2], size, GROUP + 1)
    spread = min(float(scores[ids == i].std()) for i in (0, 1)) if baseline == "grpo" else 1.0
    assert_near(ours[ids < 2], theirs[ids < 2], float(scores.abs().max()) / spread, GROUP + 1)


def test_verl_opo_and_passk() -> None:
    """Lengths are verl's response masks; a group of equal scores teaches nothing here."""
    scores, ids = scores_and_groups()
    mask = rollout(torch.float64, "right", ROWS, STEPS).mask
    theirs = outcome(verl().compute_opo_outcome_advantage, scores, ids, mask)
    ours = ppo_fast.group_advantages(scores, ids, baseline="opo", lengths=mask.sum(1))
    assert_near((ours[:, None] * mask)[ids < 2], theirs[ids < 2], float(scores.abs().max()), GROUP)
    theirs = outcome(verl().compute_grpo_passk_outcome_advantage, scores, ids, mask, config={})
    ours = ppo_fast.group_advantages(scores, ids, baseline="grpo-passk")[:, None] * mask
    spread = min(float(scores[ids == i].std()) for i in (0, 1))
    assert_near(ours, theirs, float(scores.abs().max()) / spread, GROUP + 1)
    assert int((ours != 0).any(1).sum()) == 2


def test_verl_gdpo() -> None:
    """verl whitens over tokens: each score's grpo, their weighted sum, spread, whiten."""
    _, ids = scores_and_groups()
    mask = rollout(torch.float64, "right", ROWS, STEPS).mask
    rng = torch.Generator().manual_seed(8)
    parts = torch.randn(ROWS, 2, generator=rng, dtype=torch.float32).double()
    weights = [0.25, 2.0]  # exact in the fp32 in which verl keeps them
    rewards = {f"r{k}": parts[:, k].numpy() for k in range(2)}
    # It puts a score at the last kept token, from an attention mask behind a prompt of no token.
    batch = {"prompts": torch.zeros(ROWS, 0), "attention_mask": mask.long()}
    config = {"gdpo_reward_keys": list(rewards), "gdpo_reward_weights": weights}
    given = {"config": config, "non_tensor_batch": rewards, "batch": batch}
    theirs = verl().compute_gdpo_outcome_advantage(
        torch.zeros(mask.shape), mask.double(), ids.tolist(), **given
    )[0]
    total = sum(w * ppo_fast.group_advantages(parts[:, k], ids) for k, w in enumerate(weights))
    spread = total[:, None].expand(mask.shape)
    ours = ppo_fast.whiten(spread, mask, backend="reference")
    raw, size = spread[mask].double(), float(total.abs().max())
    # verl sums the scores and normalises them in fp32.
    assert_near_whitened(ours[mask].float(), theirs[mask].float(), raw, 8 * size, GROUP + 1)


def trl(scores: Tensor, weights: Tensor, **options: str) -> Tensor:
    """The advantages of TRL's GRPO trainer, from its own statements; groups are neighbours."""
    tree = source(TRL, "trainer/grpo_trainer.py")
    utils = functions(source(TRL, "trainer/utils.py"), "nanstd")
    me = types.SimpleNamespace(
        scale_rewards="group",
        multi_objective_aggregation="sum_then_normalize",
        reward_weights=weights,
        reward_funcs=[None] * scores.shape[1],
        accelerator=types.SimpleNamespace(process_index=0),
    )
    vars(me).update(options)
    known = {"self": me, "rewards_per_func": scores, "num_generations": GROUP}
    known |= {"device": "cpu", "prompts": [""] * len(scores)}
    scope = block(tree, "unscorable_mask", "advantages", nanstd=utils.nanstd, **known)
    out: Tensor = scope["advantages"]
    return out


@pytest.mark.parametrize("baseline", ["grpo", "grpo-batch-std", "dr_grpo", "gdpo"])
def test_trl(baseline: str) -> None:
    """Its `scale_rewards` and `multi_objective_aggregation`, with its own eps of 1e-4."""
    rng = torch.Generator().manual_seed(11)
    scores = torch.randn(ROWS, 3, generator=rng, dtype=torch.float64)
    weights = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    ids = torch.arange(ROWS) // GROUP
    scale = {"grpo": "group", "grpo-batch-std": "batch", "dr_grpo": "none"}.get(baseline, "group")
    if baseline == "gdpo":
        theirs = trl(scores, weights, multi_objective_aggregation="normalize_then_sum")
        ours = ppo_fast.group_advantages(scores, ids, baseline="gdpo", weights=weights, eps=1e-4)
    else:
        theirs = trl(scores, weights, scale_rewards=scale)
        ours = ppo_fast.group_advantages(scores @ weights, ids, baseline=baseline, eps=1e-4)
    spread = float((scores @ weights).view(-1, GROUP).std(1).min())
    size = float((scores.abs() @ weights).max()) / min(1.0, spread)
    # Its Bessel factor, n / (n − 1) of integers, is fp32, and with it every σ.
    wide = torch.float64 if baseline == "dr_grpo" else torch.float32
    assert_near(ours.to(wide), theirs.to(wide), size, ROWS)


@pytest.mark.parametrize("baseline", PRESETS)
def test_verl_lets_a_lone_response_teach(baseline: str) -> None:
    """A lone response has advantage 0 here; verl keeps its score."""
    name, options = PRESETS[baseline]
    scores, ids = torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64), torch.tensor([0, 1, 1])
    theirs = outcome(getattr(verl(), name), scores, ids, torch.ones(3, 1), **options)
    ours = ppo_fast.group_advantages(scores, ids, baseline=baseline)
    # Its σ of 1 for a lone response is fp32, whatever the scores are.
    kept = scores[:1].float() / (1 + EPS * (baseline == "grpo"))
    assert_near(theirs[:1, 0].float(), kept, 2.0, 1)
    assert float(ours[0]) == 0.0 and bool(ours[1:].abs().min() > 0.5)


@pytest.mark.parametrize("steps", [1, STEPS])
def test_verl_reinforce_plus_plus_baseline(backend: str, device: str, steps: int) -> None:
    """verl whitens over tokens, so a long response counts more: dr_grpo, spread, whiten.

    With one token each, that is "reinforce++", which whitens over responses.
    """
    scores, ids = scores_and_groups()
    mask = torch.ones(ROWS, 1, dtype=torch.bool)
    if steps > 1:
        mask = rollout(torch.float64, "right", ROWS, steps).mask
    theirs = outcome(
        verl().compute_reinforce_plus_plus_baseline_outcome_advantage, scores, ids, mask
    )
    centred = ppo_fast.group_advantages(scores, ids, baseline="dr_grpo")
    spread = centred.to(torch.float32 if backend in ON_GPU else torch.float64)
    spread = spread[:, None].expand(mask.shape)
    ours = ppo_fast.whiten(spread.to(device), mask.to(device), backend=backend).cpu()
    raw, size = centred[:, None].expand(mask.shape)[mask], float(2 * scores.abs().max())
    slack = 1e-8 / len(raw)  # verl adds 1e-8 to the count under every mean
    assert_near_whitened(ours, theirs, raw, size, GROUP + 1, slack=slack)
    if steps == 1:
        ours = ppo_fast.group_advantages(scores, ids, baseline="reinforce++")
        assert_near_whitened(ours[:, None], theirs, raw, size, GROUP + 1, slack=slack)


def openrlhf(x: Rollout, estimator: str) -> Any:
    """One batch, its responses to a prompt neighbours, through OpenRLHF's baselines."""
    shaping = functions(source(OPENRLHF, "models/utils.py"), "compute_reward")
    maker = functions(
        source(OPENRLHF, "trainer/ppo_utils/experience_maker.py"),
        "compute_advantages_and_returns",
        "get_cumulative_returns",
        itertools=itertools,
        apply_length_penalties=lambda *_: None,
        logger=logging.getLogger(__name__),
        compute_reward=shaping.compute_reward,
    )
    space = types.SimpleNamespace
    advantage = space(estimator=estimator, gamma=1.0, lambd=1.0, no_std_norm=False)
    args = space(
        algo=space(advantage=advantage),
        rollout=space(n_samples_per_prompt=GROUP),
        reward=space(clip_range=None),
    )
    me = space(
        strategy=space(args=args),
        advantage_estimator=estimator,
        kl_ctl=space(value=KL_COEF),
        get_cumulative_returns=functools.partial(maker.get_cumulative_returns, None),
    )
    batch = space(
        rewards=x.scores,
        index=list(range(len(x.scores))),
        action_mask=x.mask.long(),
        values=None,
        kl=x.logprobs - x.ref,
        info={},
    )
    maker.compute_advantages_and_returns(me, [batch])
    return batch


@pytest.mark.parametrize(
    "estimator, baseline",
    [
        ("rloo", "rloo"),
        ("dr_grpo", "dr_grpo"),
        ("group_norm", "grpo"),
        ("reinforce_baseline", "dr_grpo"),
    ],
)
def test_openrlhf(backend: str, device: str, estimator: str, baseline: str) -> None:
    """The group's advantage is the score; no critic, γ = λ = 1, the KL in the reward.

    "group_norm" adds 1e-9 to σ where DeepSeekMath's "grpo" here adds 1e-6.
    """
    dtype = torch.float32 if backend in ON_GPU else torch.float64
    x = rollout(dtype, "holes", ROWS, STEPS)
    wide, here, keep = x.wide(), x.on(device), x.mask
    batch = openrlhf(wide, estimator)
    ids = torch.arange(ROWS) // GROUP
    scores = ppo_fast.group_advantages(wide.scores, ids, baseline=baseline)
    spread = wide.scores.view(-1, GROUP).std(1).repeat_interleave(GROUP)
    if estimator == "group_norm":
        scores = scores * (spread + EPS) / (spread + 1e-9)
    out = ppo_fast.rlhf_advantages(
        scores.to(here.values),
        here.logprobs,
        here.ref,
        torch.zeros_like(here.values),
        here.mask,
        kl_coef=KL_COEF,
        gamma=1.0,
        lam=1.0,
        masked="zero",
        backend=backend,
    )
    size = float(scores.abs().max() + KL_COEF * (wide.logprobs - wide.ref).abs().sum(1).max())
    size /= min(1.0, float(spread.min()))
    assert_near(out.returns.cpu()[keep], batch.returns[keep], size, STEPS + GROUP)
    if estimator == "reinforce_baseline":  # whitened in fp32 by the population's variance
        ours = ppo_fast.whiten(
            out.advantages,
            here.mask,
            moments=out.moments,
            unbiased=False,
            eps=0.0,
            backend=backend,
        )
        theirs = batch.advantages[keep].float()
        assert_near_whitened(ours.cpu()[keep], theirs, batch.returns[keep], size, STEPS + GROUP)
    else:
        assert_near(out.advantages.cpu()[keep], batch.advantages[keep], size, STEPS + GROUP)
