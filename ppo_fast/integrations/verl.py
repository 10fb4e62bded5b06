"""verl on ppo_fast: policy losses by their registry, value loss, KL, GAE, log-probabilities
and the fused head.

`apply()`, `revert()` and `patched()` act on this process. verl's workers are processes of their
own: `ppo_fast.integrations.verl_plugin` patches each of them as it imports verl.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ppo_fast
from ppo_fast import compat, surrogates
from ppo_fast.integrations._errors import Uncovered
from ppo_fast.integrations._first_call import first_of_head, first_tokens
from ppo_fast.integrations._patch import Arguments, Integration, Swap
from ppo_fast.integrations._verl_support import (
    model_outputs,
    of_copied_logits,
    packed,
    without_support,
)

_CORE = "verl.trainer.ppo.core_algos"
_TORCH = "verl.utils.torch_functional"
_OUTPUTS = "verl.workers.engine.fsdp.transformer_impl:FSDPEngineWithLMHead.prepare_model_outputs"
_FUSED = "verl.utils.experimental.torch_functional:FusedLinearForPPO.forward"
Options = dict[str, Any]
_MODES = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
_SUM = "token-sum"  # from 0.9.0


def _divisor(
    mode: str,
    mask: Tensor,
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
    loss_scale_factor: float | None = None,
) -> tuple[str, float | Tensor | None, float]:
    """`agg_loss`'s mode and batch as (reduction, denom, what the loss is then multiplied by)."""
    if mode == _SUM and _SUM in sys.modules[_CORE].agg_loss.__code__.co_consts:
        return mode, None, float(dp_size)
    if mode not in _MODES:
        raise Uncovered(f"loss_agg_mode {mode!r}")
    total = batch_num_tokens if mode == "token-mean" else global_batch_size
    if total is None and dp_size > 1:
        raise Uncovered(f"dp_size {dp_size} without the whole batch's count")
    if not isinstance(total, Tensor) and total is not None and total <= 0:
        raise Uncovered(f"an empty batch, {total}")
    width = 1.0
    if mode == "seq-mean-token-sum-norm":
        width = mask.shape[-1] if loss_scale_factor is None else float(loss_scale_factor)
        mode = "seq-mean-token-sum"
    return mode, total, dp_size / width


class _Call(NamedTuple):
    """A call of one of verl's policy losses: its arguments, its options here, its statistics."""

    old: Tensor
    new: Tensor
    advantages: Tensor
    keep: Tensor
    config: Any
    options: Options
    stats: ppo_fast.Stats

    @property
    def log_ratio(self) -> Tensor:
        """new − old, without the clamp that the loss may have."""
        return (self.new - self.old).detach()

    def share(self, *fields: str) -> Tensor:
        """The sum of these statistics per token."""
        return self._per_token(torch.stack([self.stats.field(name) for name in fields]))

    def mean(self, x: Tensor) -> Tensor:
        """The mean of `x` over unmasked tokens."""
        return self._per_token(torch.where(self.keep, x, 0.0).double())

    def _per_token(self, x: Tensor) -> Tensor:
        # A mean over no token is 0 there.
        return x.sum() / self.stats.field("n_tokens").clamp(min=1)


def _policy(
    options: Callable[[Any, Tensor], Options],
    metrics: Callable[[_Call], dict[str, Tensor]],
    mode: str = "token-mean",
    forced: str | None = None,
) -> Any:
    """A policy loss from its options, by verl's configuration, and its metrics.

    `mode` is its default aggregation, `forced` one that it takes whatever is given.
    """

    def policy_loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = mode,
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        given, factor = options(config, log_prob), 1.0
        if "reduction" not in given:
            how = forced or loss_agg_mode
            reduction, denom, factor = _divisor(how, response_mask, **config.global_batch_info)
            given = given | {"reduction": reduction, "denom": denom}
        mine: Options = {"old_logprobs": old_log_prob, "is_weights": rollout_is_weights} | given
        loss, stats = ppo_fast.ppo_loss(
            log_prob, advantages=advantages, mask=response_mask, **mine
        )
        keep = response_mask != 0
        found = metrics(_Call(old_log_prob, log_prob, advantages, keep, config, given, stats))
        values = torch.stack([*found.values()]).tolist() if found else []
        return loss * factor, {f"actor/{k}": x for k, x in zip(found, values, strict=True)}

    return policy_loss


def _bounds(config: Any) -> tuple[float, float]:
    low, high, both = config.clip_ratio_low, config.clip_ratio_high, config.clip_ratio
    return both if low is None else low, both if high is None else high


def _own(config: Any, name: str, default: float) -> float:
    """An option of `config.policy_loss`, verl's default where it is None."""
    value = getattr(config.policy_loss, name)
    return default if value is None else value


def _clip(variant: str, **more: Any) -> Callable[[Any, Tensor], Options]:
    """The options of a clipped variant."""

    def options(config: Any, like: Tensor) -> Options:
        low, high = _bounds(config)
        return {"variant": variant, "clip_low": low, "clip_high": high} | more

    return options


def _vanilla(config: Any, like: Tensor) -> Options:
    return _clip("clip", dual_clip=config.get("clip_ratio_c", 3.0))(config, like)


def _dppo(kind: str) -> Callable[[Any, Tensor], Options]:
    def options(config: Any, like: Tensor) -> Options:
        return {"variant": surrogates.dppo(kind, *_bounds(config), _cap(config))}

    return options


def _cap(config: Any) -> float:
    return config.get("clip_ratio_c", 20.0)


def _sapo(config: Any, like: Tensor) -> Options:
    return {"variant": surrogates.sapo(config.tau_pos, config.tau_neg)}


def _gpg(config: Any, like: Tensor) -> Options:
    """−A·logprobs: without old log-probabilities the ratio is 1."""
    return {"variant": surrogates.reinforce(ratio_cap=1.0), "old_logprobs": None}


def _clip_cov(config: Any, like: Tensor) -> Options:
    fraction = _own(config, "clip_cov_ratio", 2e-4)
    bounds = _own(config, "clip_cov_lb", 1.0), _own(config, "clip_cov_ub", 5.0)
    seed = torch.randint(2**62, (), device=like.device)
    surrogate = surrogates.clip_cov(fraction, bounds, seed, *_bounds(config))
    return {"variant": surrogate, "log_ratio_clamp": None}


def _every_eligible(arguments: Arguments) -> Arguments:
    """clip_cov with every eligible token chosen; of fewer, each makes its own random choice."""
    config = arguments["config"]
    names = ("clip_ratio", "clip_ratio_low", "clip_ratio_high", "global_batch_info")
    bounds = {k: getattr(config.policy_loss, k) for k in ("clip_cov_lb", "clip_cov_ub")}
    every = SimpleNamespace(
        **{name: getattr(config, name) for name in names},
        policy_loss=SimpleNamespace(clip_cov_ratio=1.0, **bounds),
    )
    return arguments | {"config": every}


def _kl_cov(config: Any, like: Tensor) -> Options:
    fraction, coef = _own(config, "kl_cov_ratio", 2e-4), _own(config, "ppo_kl_coef", 1.0)
    return {"variant": surrogates.kl_cov(fraction, coef), "log_ratio_clamp": None}


def _geo_mean(config: Any, like: Tensor) -> Options:
    """The mean over all rows, also those without a token."""
    surrogate, rows = surrogates.gmpo(*_bounds(config)), float(like.shape[0])
    reduction = {"reduction": "seq-mean-token-mean", "denom": rows}
    return {"variant": surrogate, "log_ratio_clamp": None} | reduction


def _dro(config: Any, like: Tensor) -> Options:
    beta = config.policy_loss.dro_beta
    if beta is None or beta <= 0:
        raise Uncovered(f"dro_beta {beta!r}")
    return {"variant": surrogates.dro(beta), "log_ratio_clamp": None}


def _clip_metrics(call: _Call) -> dict[str, Tensor]:
    return {
        "pg_clipfrac": call.share("clip_low", "clip_high"),
        "ppo_kl": call.share("kl_k1"),
        "pg_clipfrac_lower": call.share("clip_dual"),
    }


def _cispo_metrics(call: _Call) -> dict[str, Tensor]:
    return _clip_metrics(call) | {"pg_clipfrac": call.share("clip_eps")}


def _gspo_metrics(call: _Call) -> dict[str, Tensor]:
    return _clip_metrics(call) | _kl_metrics(call)


def _dppo_metrics(call: _Call) -> dict[str, Tensor]:
    """The lower fraction is that of the kept tokens whose ratio is capped."""
    log_ratio = call.log_ratio.clamp(-20.0, 20.0)
    ratio = log_ratio.exp()
    one = torch.ones_like(ratio)
    terms = ppo_fast.TokenTerms(
        call.new.detach(), log_ratio, ratio, call.old, call.advantages, one, call.keep
    )
    _, dropped = call.options["variant"].fn(terms)
    capped = (ratio > _cap(call.config)) & ~dropped
    return _clip_metrics(call) | {"pg_clipfrac_lower": call.mean(capped)}


def _sapo_metrics(call: _Call) -> dict[str, Tensor]:
    zero = torch.zeros_like(call.share("kl_k1"))
    return {"pg_clipfrac": zero, "ppo_kl": call.share("kl_k1"), "pg_clipfrac_lower": zero}


def _kl_metrics(call: _Call) -> dict[str, Tensor]:
    return {"ppo_kl": call.mean(-call.log_ratio)}


def _clip_cov_metrics(call: _Call) -> dict[str, Tensor]:
    return {"pg_clipfrac": call.share("clip_low", "clip_high")} | _kl_metrics(call)


def _kl_cov_metrics(call: _Call) -> dict[str, Tensor]:
    return {"ppo_kl": call.mean(call.log_ratio.abs())}


def _geo_mean_metrics(call: _Call) -> dict[str, Tensor]:
    """The tokens outside of both bounds, by the sign of their advantage."""
    low, high = _bounds(call.config)
    outside = (call.log_ratio < -low) | (call.log_ratio > high)
    return {
        "pg_clipfrac": call.mean(outside & (call.advantages > 0)),
        "pg_clipfrac_lower": call.mean(outside & (call.advantages < 0)),
    } | _kl_metrics(call)


_BY_SEQUENCE = "seq-mean-token-mean"
_GSPO = _clip("gspo", log_ratio_clamp=(-math.inf, 10.0)), _gspo_metrics, _BY_SEQUENCE
_POLICIES = {
    "vanilla": _policy(_vanilla, _clip_metrics),
    "dppo_tv": _policy(_dppo("tv"), _dppo_metrics),
    "dppo_kl": _policy(_dppo("kl"), _dppo_metrics),
    "sapo": _policy(_sapo, _sapo_metrics, forced=_BY_SEQUENCE),
    "gpg": _policy(_gpg, lambda call: {}),
    "kl_cov": _policy(_kl_cov, _kl_cov_metrics),
    "geo_mean": _policy(_geo_mean, _geo_mean_metrics),
    "cispo": _policy(_clip("cispo"), _cispo_metrics),
}
_gpg_with_kl = _policy(_gpg, _kl_metrics)


def _reinforce(
    rollout_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-sum",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """bypass_mode's other loss; `rollout_log_prob` is in its metrics alone."""
    rest = advantages, response_mask, loss_agg_mode, config, rollout_is_weights
    return _gpg_with_kl(rollout_log_prob, log_prob, *rest)


def _value_loss(
    vpreds: Tensor,
    returns: Tensor,
    values: Tensor,
    response_mask: Tensor,
    cliprange_value: float,
    loss_agg_mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
    loss_scale_factor: float | None = None,
) -> tuple[Tensor, Tensor]:
    reduction, denom, factor = _divisor(
        loss_agg_mode,
        response_mask,
        dp_size,
        batch_num_tokens,
        global_batch_size,
        loss_scale_factor,
    )
    loss, stats = ppo_fast.value_loss(
        vpreds,
        values,
        returns,
        response_mask,
        clip=cliprange_value,
        reduction=reduction,
        denom=denom,
    )
    clipped = stats.field("vf_clip") / stats.field("vf_n_tokens").clamp(min=1)
    return loss * factor, clipped.float()


def _gae(
    token_level_rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    out = ppo_fast.gae(token_level_rewards, values, gamma=gamma, lam=lam, mask=response_mask)
    return ppo_fast.whiten(out.advantages, response_mask, moments=out.moments), out.returns


def _kept(arguments: Arguments, result: Any) -> Any:
    """verl leaves numbers at masked slots, ppo_fast zeros."""
    keep = arguments["response_mask"] != 0
    return tuple(torch.where(keep, x, 0.0) for x in result)


def _logprobs(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    # In place where verl's own is, with flash-attn: elsewhere its callers may keep the logits.
    overwrite = inplace_backward and logits.is_cuda and not logits.is_leaf
    return compat.logprobs_from_logits(logits, labels, inplace_backward=overwrite)


def _linear(
    self: Any,
    hidden_states: Tensor,
    vocab_weights: Tensor,
    input_ids: Tensor,
    temperature: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor]:
    """`chunk_size` and `impl_backend` choose how verl computes it, not what."""
    if hidden_states.dtype != vocab_weights.dtype:
        raise Uncovered(
            f"hidden states {hidden_states.dtype} beside a weight {vocab_weights.dtype}"
        )
    logprobs, entropy = ppo_fast.linear_token_logprobs(
        hidden_states, vocab_weights, input_ids, temperature=temperature
    )
    return logprobs, entropy.to(hidden_states.dtype)


_REDUCING = ("agg_loss", "verl_F.masked_mean", "verl_F.masked_sum")
# How the loss of gspo ends in 0.9.1; before, its mode was `_BY_SEQUENCE` whatever was given.
_GSPO_BY_MODE = (
    "pg_loss = agg_loss(loss_mat=pg_losses, loss_mask=response_mask, loss_agg_mode=loss_agg_mode"
)


def _policy_swap(name: str, fused: Any, **options: Any) -> Swap:
    place = f"{_CORE}:compute_policy_loss_{name}"
    return Swap("policy_loss", place, fused, helpers=_REDUCING, **options)


integration = Integration(
    name="verl",
    package="verl",
    extra="verl",
    on_request=("support",),
    swaps=(
        *(_policy_swap(name, fused) for name, fused in _POLICIES.items()),
        _policy_swap("clip_cov", _policy(_clip_cov, _clip_cov_metrics), sample=_every_eligible),
        _policy_swap("dro", _policy(_dro, _kl_metrics), optional=True),  # from 0.9.0
        (
            _policy_swap("gspo", _policy(*_GSPO), having=_GSPO_BY_MODE),
            _policy_swap("gspo", _policy(*_GSPO, forced=_BY_SEQUENCE)),  # to 0.9.0
        ),
        # bypass_mode calls this or vanilla, with weights and a mask that verl has formed.
        _policy_swap("reinforce", _reinforce),
        Swap(
            "value_loss",
            f"{_CORE}:compute_value_loss",
            _value_loss,
            helpers=(*_REDUCING, "verl_F.clip_by_value"),
        ),
        Swap("kl", f"{_CORE}:kl_penalty", compat.kl_penalty, helpers=("kl_penalty_forward",)),
        Swap(
            "gae",
            f"{_CORE}:compute_gae_advantage_return",
            _gae,
            view=_kept,
            helpers=("verl_F.masked_whiten", "verl_F.masked_mean", "verl_F.masked_var"),
        ),
        Swap(
            "logprobs",
            f"{_TORCH}:logprobs_from_logits",
            _logprobs,
            sample=first_tokens("logits", "labels"),
            helpers=("logprobs_from_logits_flash_attn", "logprobs_from_logits_v2"),
        ),
        *(
            Swap(
                "entropy",
                f"{_TORCH}:{name}",
                compat.entropy_from_logits,
                sample=first_tokens("logits"),
            )
            for name in ("entropy_from_logits", "entropy_from_logits_with_chunking")
        ),
        Swap(
            "linear_logprobs",
            _FUSED,
            _linear,
            sample=first_of_head("hidden_states", "vocab_weights", "input_ids"),
            helpers=(
                "FusedLinearForPPOFunction.apply",
                "_fused_linear_for_ppo_fwd",
                "_fused_linear_for_ppo_bwd",
            ),
        ),
        (
            Swap(
                "support",
                _OUTPUTS,
                model_outputs,
                sample=of_copied_logits,
                view=packed,
                having="logits_rmpad.div_(",  # 0.8.0
            ),
            Swap("support", _OUTPUTS, model_outputs, sample=without_support, view=packed),
        ),
    ),
)
apply, revert, patched = integration.apply, integration.revert, integration.patched
