"""Calls of the public ops out of a fuzzer's bytes, one function an op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from draw import HALVES, Draw

from ppo_fast import Moments
from ppo_fast._boundary.schema import ESTIMATORS, MASKED, REDUCTIONS, SCORE_AT, VARIANTS
from ppo_fast.testing import Call
from ppo_fast.testing.calls import DIFFERENTIABLE

KL = (*ESTIMATORS, *(f"{name}+" for name in ESTIMATORS))


def _dtype(d: Draw) -> torch.dtype:
    return torch.float64 if d.one_in(5) else d.one_of(HALVES)


def _layout(d: Draw) -> tuple[tuple[int, ...], Any, int]:
    """(shape, cu_seqlens or None, number of sequences) of a padded or packed call."""
    if d.one_in(2):
        shape = (d.upto(5) if d.one_in(2) else d.size(), d.size())
        return shape, None, shape[0]
    n = d.size()
    ends = d.offsets(n)
    return (n,), ends, max(0, ends.numel() - 1) if isinstance(ends, torch.Tensor) else 0


def _finish(d: Draw, op: str, tensors: dict[str, Any], options: dict[str, Any]) -> Call:
    """Cotangents of every differentiable output; what is None is not given, or given as None."""
    main = next(iter(tensors.values()))
    kept = {k: v for k, v in tensors.items() if v is not None}
    none = {k: None for k in ("old_logprobs", "old_values") if k in tensors and k not in kept}
    leaves = [kept[k] for k in DIFFERENTIABLE.get(op, ((), ()))[0] if k in kept]
    if not all(isinstance(x, torch.Tensor) and x.is_floating_point() for x in leaves):
        return Call(op, kept, options | none, {})
    wide = torch.float64 if getattr(main, "dtype", None) == torch.float64 else torch.float32
    shape = tuple(main.shape) if isinstance(main, torch.Tensor) else ()
    grads: dict[str, torch.Tensor] = {}
    if op in ("token_logprobs", "linear_token_logprobs", "linear_logprobs_at"):
        lead = shape[:-1]
        grads = {k: torch.randn(lead, generator=d.rng).to(wide) for k in ("logprobs", "entropy")}
        if isinstance(kept.get("ids"), torch.Tensor):
            grads["logprobs"] = torch.randn(kept["ids"].shape, generator=d.rng).to(wide)
    elif op.endswith("_loss"):
        grads = {"loss": torch.tensor(1.5, dtype=wide)}
    return Call(op, kept, options | none, grads)


def gae(d: Draw) -> Call:
    shape, ends, count = _layout(d)
    dtype, time_major = _dtype(d), len(shape) == 2 and d.one_in(2)
    rows = (shape[1],) if time_major else (count,)
    t: dict[str, Any] = {"rewards": d.floats(shape, dtype), "values": d.floats(shape, dtype)}
    t |= {"mask": d.maybe(d.mask, shape), "cu_seqlens": ends}
    if d.one_in(2):
        t["next_values"] = d.floats(shape, dtype)
        t["truncated"] = d.maybe(d.mask, shape)
    else:
        t["bootstrap"] = d.maybe(d.floats, rows, dtype)
    t["terminated"] = d.maybe(d.mask, shape)
    for name in ("rho", "c"):
        t[name] = d.maybe(d.floats, shape, dtype, 0.2)
    o = {"gamma": d.number(0.0, 0.5, 0.99, 1.0), "time_major": time_major}
    for name in ("lam", "lam_returns"):
        if d.one_in(3):
            t[name] = d.floats(d.one_of((shape, rows)), dtype, 0.2)
        else:
            o[name] = d.number(0.0, 0.5, 0.95, 1.0)
    return _finish(d, "gae", t, o | {"masked": d.name(MASKED)})


def rlhf_advantages(d: Draw) -> Call:
    shape, ends, count = _layout(d)
    dtype, place = _dtype(d), d.name(SCORE_AT)
    t = {
        "logprobs": d.floats(shape, dtype),
        "scores": d.floats(shape if place == "per-token" else (count,), dtype),
        "ref_logprobs": d.floats(shape, dtype),
        "values": d.floats(shape, dtype),
        "mask": d.mask(shape),
        "bootstrap": d.maybe(d.floats, (count,), dtype),
        "cu_seqlens": ends,
    }
    o = {
        "kl_coef": d.number(0.0, 0.1, -0.5),
        "kl_estimator": d.name(KL),
        "score_at": place,
        "kl_clamp": d.number(None, 0.0, 10.0),
        "gamma": d.number(0.0, 0.99, 1.0),
        "lam": d.number(0.0, 0.95, 1.0),
        "masked": d.name(MASKED),
        "reward_clip": d.one_of((None, (-1.0, 1.0), (0.0, 0.0))),
    }
    return _finish(d, "rlhf_advantages", t, o)


def _policy(d: Draw, shape: tuple[int, ...], ends: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """Tensors and options that the policy losses share."""
    variant = d.name(VARIANTS)
    by_row = len(shape) == 2 and d.one_in(6)
    t = {
        "old_logprobs": d.floats(shape, dtype) if d.tame else d.maybe(d.floats, shape, dtype),
        "advantages": d.floats((shape[0], 1) if by_row else shape, dtype),
        "mask": d.maybe(d.mask, shape),
        "is_weights": d.maybe(d.floats, (shape[0], 1) if by_row else shape, dtype),
        "ref_logprobs": d.maybe(d.floats, shape, dtype) if variant != "penalty" else None,
        "cu_seqlens": ends,
    }
    if len(shape) == 2 or ends is not None:
        count = shape[0] if ends is None else ends.numel() - 1
        t["sequence_weights"] = d.maybe(d.floats, (count,), dtype)
    o = {
        "variant": variant,
        "clip_low": d.number(0.2, 1.0),
        "clip_high": d.number(0.28, 1.0),
        "dual_clip": d.number(None, 3.0) if variant in ("clip", "gspo") else None,
        "log_ratio_clamp": d.number(20.0, 1.0, None, (-5.0, 2.0)),
        "kl_coef": d.number(0.1, 0.0) if t["ref_logprobs"] is not None else 0.0,
        "kl_estimator": d.name(KL),
        "kl_clamp": d.number(10.0, None, 0.0),
        "reduction": d.name(REDUCTIONS),
        "denom": d.number(None, None, 7.0),
    }
    if d.one_in(3) and o["kl_estimator"][-1] != "+" and variant not in ("penalty", "linear"):
        o["kl_weight"] = d.name(("ratio", "score"))
    if d.one_in(4):
        moments = torch.tensor([97.0, 0.4, 390.0], dtype=torch.float64)
        if not d.tame:
            moments[d.upto(2)] = d.data.ConsumeFloat()
        o["advantage_moments"] = Moments(moments)
    return t, o


def ppo_loss(d: Draw) -> Call:
    shape, ends, _ = _layout(d)
    dtype = _dtype(d)
    t = {"logprobs": d.floats(shape, dtype)}
    more, o = _policy(d, shape, ends, dtype)
    t |= more
    if d.one_in(2):
        t["entropy"] = d.floats(shape, dtype)
        o["entropy_coef"] = d.number(0.01, 0.0)
    return _finish(d, "ppo_loss", t, o)


def value_loss(d: Draw) -> Call:
    shape, ends, _ = _layout(d)
    dtype, clip = _dtype(d), d.number(0.2, 0.0, None)
    t = {
        "values": d.floats(shape, dtype),
        "old_values": None if clip is None else d.floats(shape, dtype),
        "returns": d.floats(shape, dtype),
        "mask": d.maybe(d.mask, shape),
        "cu_seqlens": ends,
    }
    o = {
        "clip": clip,
        "form": d.name(("max", "clipped")),
        "scale": d.number(0.5, 1.0),
        "reduction": d.name(REDUCTIONS),
        "denom": d.number(None, None, 7.0),
    }
    return _finish(d, "value_loss", t, o)


def _rows(d: Draw) -> tuple[int, ...]:
    return tuple(d.upto(4) for _ in range(d.upto(3)))


def _logits(d: Draw, shape: tuple[int, ...], vocab: int, dtype: torch.dtype) -> Any:
    """Its last dimension contiguous, as most callers' is; the others are told to change it."""
    x = d.floats((*shape, vocab), dtype, 3.0)
    if isinstance(x, torch.Tensor) and x.dim() and not d.wild(8):
        x = x.clone(memory_format=torch.contiguous_format) if x.stride(-1) != 1 else x
    return x


def _head(d: Draw, shape: tuple[int, ...], vocab: int, dtype: torch.dtype) -> tuple[Any, Any]:
    t, o = {"tokens": d.tokens(shape, vocab)}, {"ignore_index": d.one_of((-100, 0, vocab))}
    if d.one_in(3):
        t["temperature"] = d.floats(shape, dtype).abs() + 0.5 if d.tame else d.floats(shape, dtype)
    else:
        o["temperature"] = d.number(1.0, 0.5)
    return t, o


def token_logprobs(d: Draw) -> Call:
    shape, vocab, dtype = _rows(d), d.size() + 1, _dtype(d)
    t = {"logits": _logits(d, shape, vocab, dtype)}
    more, o = _head(d, shape, vocab, dtype)
    return _finish(d, "token_logprobs", t | more | {"mask": d.maybe(d.mask, shape)}, o)


def _loss_rows(d: Draw) -> tuple[tuple[int, ...], Any]:
    if d.one_in(2):
        return (d.upto(4), d.upto(5)), None
    n = d.upto(9)
    return (n,), d.offsets(n)


def logits_ppo_loss(d: Draw) -> Call:
    (shape, ends), vocab, dtype = _loss_rows(d), d.size() + 1, _dtype(d)
    t = {"logits": _logits(d, shape, vocab, dtype)}
    more, o = _head(d, shape, vocab, dtype)
    of_loss, options = _policy(d, shape, ends, dtype)
    options["entropy_coef"] = d.number(0.01, 0.0)
    return _finish(d, "logits_ppo_loss", t | more | of_loss, o | options)


def _linear(d: Draw, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, Any]:
    vocab, width = d.upto(40) + 1, d.upto(9) + 1
    t = {
        "hidden": _logits(d, shape, width, dtype),
        "weight": d.floats((vocab, width), dtype),
        "bias": d.maybe(d.floats, (vocab,), dtype),
    }
    more, o = _head(d, shape, vocab, dtype)
    return t | more, o | {"softcap": d.number(None, 30.0)}


def linear_token_logprobs(d: Draw) -> Call:
    shape, dtype = _rows(d), _dtype(d)
    t, o = _linear(d, shape, dtype)
    return _finish(d, "linear_token_logprobs", t | {"mask": d.maybe(d.mask, shape)}, o)


def linear_logprobs_at(d: Draw) -> Call:
    shape, dtype = _rows(d), _dtype(d)
    t, o = _linear(d, shape, dtype)
    del t["tokens"], o["ignore_index"]
    t["ids"] = d.tokens((*shape, d.upto(5)), getattr(t["weight"], "shape", (9,))[0])
    return _finish(d, "linear_logprobs_at", t | {"mask": d.maybe(d.mask, shape)}, o)


def linear_token_stats(d: Draw) -> Call:
    call = linear_token_logprobs(d)
    return call._replace(op="linear_token_stats", cotangents={})


def linear_ppo_loss(d: Draw) -> Call:
    (shape, ends), dtype = _loss_rows(d), _dtype(d)
    t, o = _linear(d, shape, dtype)
    of_loss, options = _policy(d, shape, ends, dtype)
    options["entropy_coef"] = d.number(0.01, 0.0)
    return _finish(d, "linear_ppo_loss", t | of_loss, o | options)


def whiten(d: Draw) -> Call:
    shape, _, _ = _layout(d)
    t = {"x": d.floats(shape, _dtype(d)), "mask": d.maybe(d.mask, shape)}
    o = {
        "shift_mean": d.one_in(2),
        "unbiased": d.one_in(2),
        "eps": d.number(1e-8, 0.0, 1e-5),
        "eps_at": d.name(("var", "std")),
    }
    return _finish(d, "whiten", t, o)


CALLS: dict[str, Callable[[Draw], Call]] = {
    f.__name__: f
    for f in (
        gae,
        rlhf_advantages,
        ppo_loss,
        value_loss,
        token_logprobs,
        logits_ppo_loss,
        linear_token_logprobs,
        linear_logprobs_at,
        linear_token_stats,
        linear_ppo_loss,
        whiten,
    )
}
