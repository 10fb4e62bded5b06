"""Policy loss, correction and distillation of a run, from its options.

These are a `TrainConfig`, which imports this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ppo_fast import Correction, Surrogate, surrogates

# Bound of the importance weights where none is given, of samples whose sampler rounds otherwise
# than the trainer: stored transitions, and own samples in bf16 (by about 0.01 nats).
_CAP = 2.0
# Variants with a half-width of their own where none is given, in log space.
_WIDE = {"gmpo": 0.4}
_CAPPED = ("dppo-tv", "dppo-kl", "reinforce")


def loss_options(config: Any, tokens: Tensor) -> dict[str, Any]:
    """The variant and its options, as the ops take them; `tokens` seed a random choice."""
    width = _WIDE.get(config.variant, config.clip)
    low = width if config.clip_low is None else config.clip_low
    high = width if config.clip_high is None else config.clip_high
    return {
        "variant": _variant(config, tokens, low, high),
        "ratio_level": config.ratio_level,
        "clip_low": min(low, 1.0),
        "clip_high": high,
        "dual_clip": config.dual_clip,
        "ratio_cap": config.ratio_cap,
    }


def _variant(config: Any, tokens: Tensor, low: float, high: float) -> str | Surrogate:
    if config.variant == "dro":
        return surrogates.dro(config.dro_beta)
    if config.variant == "gmpo":
        return surrogates.gmpo(low, high)
    if config.variant == "vespo":
        return surrogates.vespo()
    if config.variant == "clip-cov":
        # Another choice for every micro-batch, the same in a run that is resumed.
        return surrogates.clip_cov(seed=tokens.sum(), clip_low=low, clip_high=high)
    if config.variant == "kl-cov":
        return surrogates.kl_cov()
    return config.variant


def correction_of(config: Any, rounds: bool) -> Correction | None:
    """The correction of a run's samples, whose sampler `rounds` otherwise than the trainer."""
    low, high, reject = config.correction_low, config.correction_high, _rejections(config)
    level = config.correction
    if level == "auto":
        given = low is not None or high is not None
        if not (given or reject or rounds):
            return None
        level = "token" if given or rounds else "none"
    if level == "off":
        return None
    if level != "none" and low is None and high is None:
        high = _CAP
    return Correction(
        None if level == "none" else level,
        config.correction_form,
        low,
        high,
        ratio=config.correction_ratio,
        reject=reject,
        drops=config.correction_drops,
        count=config.correction_count,
    )


def _rejections(config: Any) -> dict[str, float | tuple[float, float]]:
    """`reject` as the mapping that `Correction` takes."""
    found: dict[str, float | tuple[float, float]] = {}
    for text in config.reject:
        key, _, value = text.partition("=")
        low, colon, high = value.partition(":")
        found[key] = (float(low), float(high)) if colon else float(low)
    return found


def check_losses(config: Any, require: Callable[..., None]) -> None:
    """Raise OptionError for options of loss and correction that do not go together."""
    bounded = config.dual_clip is None or config.variant in ("clip", "gspo")
    require(config, "dual_clip", bounded, f"absent with variant {config.variant}")
    capped = config.ratio_cap is None or config.variant in _CAPPED
    require(config, "ratio_cap", capped, f"absent with variant {config.variant}")
    whole = {"gspo": ("token", "sequence-token"), "penalty": ("token",), "linear": ("token",)}
    levels = whole.get(config.variant, (config.ratio_level,))
    fits = config.ratio_level in levels
    require(config, "ratio_level", fits, f"{' or '.join(levels)} with variant {config.variant}")
    low, high = config.correction_low or 0.0, config.correction_high
    require(config, "correction_low", high is None or low <= high, "at most correction_high")
    bounds = (config.correction_low, config.correction_high) != (None, None)
    off = config.correction == "off" and (bounds or config.reject)
    require(config, "correction", not off, "on where a bound or a rejection is given")
    none = config.correction == "none"
    require(config, "correction_high", not (none and bounds), "absent with correction none")
    require(config, "reject", config.reject or not none, "given with correction none")
    # What the loss rejects by its own log-probs is not known when a minibatch is divided.
    late = config.correction_count == "kept" and config.correction_ratio == "current"
    require(config, "correction_count", not late, "all with correction_ratio current")
    try:
        Correction("token", high=_CAP, reject=_rejections(config))
    except ValueError as error:
        text = str(error).removeprefix("Correction: ")
        require(config, "reject", False, f"as seq-mean-k1=0.999:1.001 ({text})")


def check_distillation(config: Any, require: Callable[..., None]) -> None:
    """Raise OptionError for options of a teacher that do not go together, or lack one."""
    kind = config.distill
    for name in ("distill_coef", "distill_beta", "reward_coef"):
        value, default = getattr(config, name), type(config).__dataclass_fields__[name].default
        require(config, name, kind or value == default, f"{default} without distill")
    for name in ("teacher", "distill_temperature"):
        require(config, name, kind or getattr(config, name) is None, "absent without distill")
    require(config, "distill_coef", config.distill_coef > 0, "positive")
    require(config, "reward_coef", config.reward_coef >= 0, "at least 0")
    beta = config.distill_beta
    weighs = kind in ("jsd", "mixed") or beta == 0.5
    require(config, "distill_beta", weighs, f"0.5, which does not count, with distill {kind}")
    require(config, "distill_beta", 0 <= beta <= 1, "in [0, 1]")
    require(config, "distill_beta", kind != "jsd" or 0 < beta < 1, "in (0, 1) with distill jsd")
    alone = config.reward_coef == 0
    for name in ("kl_target", "critic_lr"):
        unused = not alone or getattr(config, name) is None
        require(config, name, unused, "absent with reward_coef 0")
    require(config, "kl_coef", not alone or config.kl_coef == 0, "0 with reward_coef 0")
    # Only the head's own loss forms these.
    heads = config.head == "linear"
    require(config, "distill", heads or kind in (None, "pg"), "pg with head logits")
    require(config, "z_loss_coef", heads or config.z_loss_coef == 0, "0 with head logits")
