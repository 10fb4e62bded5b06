"""SkyRL on ppo_fast: policy losses by their registry, critic loss, GAE, log-probabilities and
entropies.

`apply()`, `revert()` and `patched()` act on this process. SkyRL trains in Ray's worker processes,
and estimates advantages in its driver: docs/integrations/skyrl.md patches both.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ppo_fast
from ppo_fast import Surrogate, TokenTerms, compat, surrogates
from ppo_fast.integrations._errors import Uncovered
from ppo_fast.integrations._first_call import first_tokens
from ppo_fast.integrations._patch import Arguments, Integration, Swap

_CORE = "skyrl.backends.skyrl_train.utils.ppo_utils"
_TORCH = "skyrl.backends.skyrl_train.utils.torch_utils"
Options = dict[str, Any]


class _Call(NamedTuple):
    """Arguments of a policy loss."""

    new: Tensor
    old: Tensor | None
    rollout: Tensor | None
    mask: Tensor | None
    config: Any


Metrics = Callable[[_Call, Options, ppo_fast.Stats], dict[str, Tensor]]


def _policy(options: Callable[[_Call], Options], metrics: Metrics, corrects: bool = True) -> Any:
    """A policy loss from its options and its metrics; `corrects` by rollout log-probabilities.

    It is a sum over tokens: the advantages have the reduction in them.
    """

    def policy_loss(
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        config: Any,
        loss_mask: Tensor | None = None,
        rollout_logprobs: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        call = _Call(log_probs, old_log_probs, rollout_logprobs, loss_mask, config)
        given: Options = {"old_logprobs": old_log_probs} | options(call)
        weights, corrections = _weights(call) if corrects else (None, {})
        loss, stats = ppo_fast.ppo_loss(
            log_probs,
            advantages=advantages,
            mask=loss_mask,
            is_weights=weights,
            reduction="token-sum",
            **given,
        )
        found = metrics(call, given, stats)
        values = torch.stack([*found.values()]).tolist() if found else []
        return loss, dict(zip(found, values, strict=True)) | corrections

    return policy_loss


def _weights(call: _Call) -> tuple[Tensor | None, dict[str, float]]:
    """SkyRL's own weights for samples of another policy, 0 where it rejects, and its metrics."""
    one = call.new.detach().new_ones(1, 1)
    correct = sys.modules[_CORE].apply_off_policy_correction
    weights, mask, metrics = correct(
        one, call.old, call.rollout, call.mask, call.config.off_policy_correction
    )
    if mask is not call.mask:
        weights = torch.where(mask != 0, weights, 0.0)
    return None if weights is one else weights, metrics


def _bounds(low: float, high: float) -> Options:
    """A lower bound of the ratio below 0 is none."""
    return {"clip_low": min(low, 1.0), "clip_high": high}


def _clip(variant: str, **more: Any) -> Callable[[_Call], Options]:
    def options(call: _Call) -> Options:
        low, high = call.config.eps_clip_low, call.config.eps_clip_high
        return {"variant": variant} | _bounds(low, high) | more

    return options


def _regular(call: _Call) -> Options:
    kind, cap = call.config.policy_loss_type, None
    if kind not in ("regular", "dual_clip"):
        raise Uncovered(f"policy_loss_type {kind!r}")
    if kind == "dual_clip":
        cap = call.config.clip_ratio_c
        if cap <= 1:
            raise Uncovered(f"clip_ratio_c {cap}")
    return _clip("clip", dual_clip=cap)(call)


def _cispo(call: _Call) -> Options:
    own = call.config.cispo
    options = {"variant": "cispo"} | _bounds(own.cispo_eps_clip_low, own.cispo_eps_clip_high)
    if own.cispo_anchor != "rollout":
        return options
    if call.config.off_policy_correction.tis_ratio_type is not None:
        raise Uncovered("cispo_anchor 'rollout' with a tis_ratio_type")
    return options | {"old_logprobs": _rollout(call)}


def _rollout(call: _Call) -> Tensor:
    if call.rollout is None:
        raise Uncovered("no rollout_logprobs")
    return call.rollout


def _rollout_is(call: _Call) -> Options:
    low, high = call.config.eps_clip_low, call.config.eps_clip_high
    surrogate = Surrogate(partial(_within, 1.0 - low, 1.0 + high))
    return {"variant": surrogate, "old_logprobs": _rollout(call)}


def _within(low: float, high: float, t: TokenTerms) -> tuple[Tensor, Tensor]:
    """−sg(ρ)·A·logprobs where low < ρ < high, else 0 (GLM-5 2026, section 4.1.2)."""
    ratio = t.ratio.detach()
    inside = (ratio > low) & (ratio < high)
    return -torch.where(inside, ratio, 0.0) * t.advantages * t.logprobs, ~inside


def _dppo(call: _Call) -> Options:
    own = call.config.dppo
    kind = own.dppo_type.removeprefix("binary_")
    if kind not in ("tv", "kl"):
        raise Uncovered(f"dppo_type {own.dppo_type!r}")
    term = surrogates.dppo(kind, own.delta_low, own.delta_high).fn
    behavior = call.old if call.rollout is None else call.rollout
    return {"variant": Surrogate(partial(_idle_kept, term)), "old_logprobs": behavior}


def _idle_kept(term: Callable[[TokenTerms], Any], t: TokenTerms) -> tuple[Tensor, Tensor]:
    """A term that is 0 with its advantage drops nothing."""
    value, dropped = term(t)
    return value, dropped & (t.advantages != 0)


def _sapo(call: _Call) -> Options:
    return {"variant": surrogates.sapo(call.config.sapo.tau_pos, call.config.sapo.tau_neg)}


def _importance_sampling(call: _Call) -> Options:
    return {"variant": surrogates.reinforce(), "log_ratio_clamp": None}


def _clip_cov(call: _Call) -> Options:
    own, config = call.config.clip_cov, call.config
    _masked(call)
    surrogate = surrogates.clip_cov(
        own.clip_ratio,
        (own.clip_cov_lb, own.clip_cov_ub),
        torch.randint(2**62, (), device=call.new.device),
        config.eps_clip_low,
        config.eps_clip_high,
    )
    return {"variant": surrogate, "log_ratio_clamp": None}


def _kl_cov(call: _Call) -> Options:
    own = call.config.kl_cov
    _masked(call)
    surrogate = surrogates.kl_cov(own.kl_cov_frac, own.ppo_kl_coef)
    return {"variant": surrogate, "log_ratio_clamp": None}


def _masked(call: _Call) -> None:
    if call.mask is None:
        raise Uncovered("no loss_mask")


def _every_eligible(arguments: Arguments) -> Arguments:
    """clip_cov with every eligible token chosen; of fewer, each makes its own random choice."""
    config = arguments["config"]
    own = SimpleNamespace(**vars(config.clip_cov) | {"clip_ratio": 1.0})
    bounds = {name: getattr(config, name) for name in ("eps_clip_low", "eps_clip_high")}
    return arguments | {"config": SimpleNamespace(**bounds, clip_cov=own)}


def _share(stats: ppo_fast.Stats, *fields: str) -> Tensor:
    """The sum of these statistics per token; of no token, 0."""
    total = torch.stack([stats.field(name) for name in fields]).sum()
    return total / stats.field("n_tokens").clamp(min=1)


def _clipped(call: _Call, options: Options, stats: ppo_fast.Stats) -> dict[str, Tensor]:
    return {"clip_ratio": _share(stats, "clip_low", "clip_high")}


def _none_clipped(call: _Call, options: Options, stats: ppo_fast.Stats) -> dict[str, Tensor]:
    return {"clip_ratio": torch.zeros_like(stats.field("n_tokens"))}


@torch.no_grad()
def _ratios(call: _Call, options: Options, stats: ppo_fast.Stats) -> dict[str, Tensor]:
    """CISPO's metrics; the extremes are over all slots where no token is kept."""
    low, high = 1.0 - options["clip_low"], 1.0 + options["clip_high"]
    ratio = (call.new - options["old_logprobs"]).float().clamp(-20.0, 20.0).exp()
    keep = torch.ones_like(ratio, dtype=torch.bool) if call.mask is None else call.mask != 0
    shown = keep | ~keep.any()
    held = torch.where(keep, ratio.clamp(low, high), 0.0)
    return {
        "clip_ratio": _share(stats, "clip_eps"),
        "cispo/ratio_mean": _share(stats, "ratio"),
        "cispo/ratio_clamped_mean": held.double().sum() / keep.sum().clamp(min=1),
        "cispo/ratio_max": torch.where(shown, ratio, -math.inf).amax().double(),
        "cispo/ratio_min": torch.where(shown, ratio, math.inf).amin().double(),
    }


def _mean_ratio(call: _Call, options: Options, stats: ppo_fast.Stats) -> dict[str, Tensor]:
    return {"importance_ratio": stats.field("ratio") / stats.field("n_tokens")}


def _value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    config: Any,
    loss_mask: Tensor | None = None,
) -> tuple[Tensor, float | None]:
    """The mean over all rows of each one's mean, also of those without a token."""
    clip = config.value_clip
    loss, stats = ppo_fast.value_loss(
        values,
        None if clip is None else old_values,
        returns,
        loss_mask,
        clip=clip,
        reduction="seq-mean-token-mean",
        denom=float(len(values)),
    )
    if clip is None:
        return loss, None
    clipped = stats.field("vf_clip") / stats.field("vf_n_tokens").clamp(min=1)
    return loss, clipped.item()


def _gae(
    token_level_rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    gamma: float,
    lambd: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """The mask is the whitening's alone: the recursion runs through every slot."""
    out = ppo_fast.gae(token_level_rewards, values, gamma=gamma, lam=lambd)
    return ppo_fast.whiten(out.advantages, response_mask), out.returns


def _kept(arguments: Arguments, result: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """SkyRL leaves whitened numbers at masked slots, ppo_fast zeros."""
    advantages, returns = result
    return torch.where(arguments["response_mask"] != 0, advantages, 0.0), returns


def _logprobs(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Never in place: the entropies' backward reads the logits that SkyRL lets it overwrite."""
    return compat.logprobs_from_logits(logits, labels)


def _entropy(
    logits: Tensor,
    requires_grad: bool = False,
    attention_mask: Tensor | None = None,
    chunk_size: int = 1024,
) -> Tensor:
    if attention_mask is not None and attention_mask.shape != logits.shape[:2]:
        raise Uncovered(f"attention_mask of shape {tuple(attention_mask.shape)}")
    with nullcontext() if requires_grad else torch.no_grad():
        entropy = compat.entropy_from_logits(logits, chunk_size)
        return (
            entropy if attention_mask is None else torch.where(attention_mask != 0, entropy, 0.0)
        )


_REDUCING = ("reduce_loss", "masked_mean", "safe_exp_delta", "apply_off_policy_correction")


def _policy_swap(name: str, fused: Any, **options: Any) -> Swap:
    return Swap("policy_loss", f"{_CORE}:{name}", fused, helpers=_REDUCING, **options)


_PPO = _policy(_regular, _clipped)
integration = Integration(
    name="skyrl",
    package="skyrl",
    extra="skyrl",
    swaps=(
        _policy_swap("ppo_policy_loss", _PPO),  # "regular"
        _policy_swap("ppo_policy_loss.__wrapped__", _PPO),  # "dual_clip", registered first
        _policy_swap("sapo_policy_loss", _policy(_sapo, _none_clipped)),
        _policy_swap(
            "gspo_policy_loss",
            _policy(_clip("gspo", log_ratio_clamp=(-math.inf, 10.0)), _clipped),
        ),
        _policy_swap("compute_policy_loss_cispo", _policy(_cispo, _ratios)),
        _policy_swap("rollout_is_policy_loss", _policy(_rollout_is, _clipped)),
        _policy_swap("dppo_policy_loss", _policy(_dppo, _clipped)),
        _policy_swap(
            "compute_policy_loss_clip_cov",
            _policy(_clip_cov, _clipped, corrects=False),
            sample=_every_eligible,
        ),
        _policy_swap(
            "compute_policy_loss_kl_cov", _policy(_kl_cov, _none_clipped, corrects=False)
        ),
        _policy_swap(
            "importance_sampling_loss",
            _policy(_importance_sampling, _mean_ratio, corrects=False),
        ),
        Swap("value_loss", f"{_CORE}:ppo_critic_loss", _value_loss, helpers=("masked_mean",)),
        Swap(
            "gae",
            f"{_CORE}:compute_gae_advantage_return",
            _gae,
            view=_kept,
            helpers=("masked_whiten", "masked_mean", "masked_var"),
        ),
        Swap(
            "logprobs",
            f"{_TORCH}:logprobs_from_logits",
            _logprobs,
            sample=first_tokens("logits", "labels"),
            helpers=("logprobs_from_logits_flash_attn", "logprobs_from_logits_v2"),
        ),
        Swap(
            "entropy",
            f"{_TORCH}:chunked_entropy_from_logits",
            _entropy,
            sample=first_tokens("logits", "attention_mask"),
        ),
    ),
)
apply, revert, patched = integration.apply, integration.revert, integration.patched
