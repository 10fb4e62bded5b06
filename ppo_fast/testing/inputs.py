"""Input factories: random but realistic, rounded to their dtype, away from the losses' kinks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ppo_fast import Moments, Support
from ppo_fast.testing.calls import Call

Shape = tuple[int, ...]


class Source:
    """Reproducible tensors: drawn in fp64 on the CPU, rounded once, then moved."""

    def __init__(self, dtype: torch.dtype, device: torch.device | str, seed: int) -> None:
        self.dtype, self.device = dtype, device
        self.rng = torch.Generator().manual_seed(seed)

    def normal(self, shape: Shape, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        x = torch.randn(shape, generator=self.rng, dtype=torch.float64) * scale + mean
        return x.to(self.dtype).to(self.device)

    def uniform(self, shape: Shape, low: float, high: float) -> Tensor:
        x = torch.rand(shape, generator=self.rng, dtype=torch.float64) * (high - low) + low
        return x.to(self.dtype).to(self.device)

    def chance(self, shape: Shape, p: float) -> Tensor:
        return (torch.rand(shape, generator=self.rng) < p).to(self.device)

    def integers(self, shape: Shape, high: int) -> Tensor:
        return torch.randint(0, high, shape, generator=self.rng).to(self.device)

    def cotangent(self, shape: Shape) -> Tensor:
        """Gradients arrive in the outputs' precision."""
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        return torch.randn(shape, generator=self.rng, dtype=dtype).to(self.device)


def make_mask(
    shape: Shape, kind: str, seed: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """A boolean mask: all, empty, random, row (the first one empty), right or left padded."""
    if kind == "all":
        return torch.ones(shape, dtype=torch.bool, device=device)
    if kind == "empty":
        return torch.zeros(shape, dtype=torch.bool, device=device)
    rng = torch.Generator().manual_seed(seed)
    if kind in ("right", "left"):
        lengths = torch.randint(0, shape[-1] + 1, shape[:-1], generator=rng)
        keep = torch.arange(shape[-1]) < lengths[..., None]
        return (keep if kind == "right" else keep.flip(-1)).to(device)
    keep = torch.rand(shape, generator=rng) < 0.7
    if kind == "row" and shape[0]:
        keep[0] = False
    return keep.to(device)


def finish(
    op: str, tensors: dict[str, Any], options: dict[str, Any], **cotangents: Tensor
) -> Call:
    """The call, without the tensors that are None."""
    return Call(op, {k: v for k, v in tensors.items() if v is not None}, options, cotangents)


def offsets(n: int, device: torch.device | str) -> Tensor:
    """Four sequences of uneven length, one of them empty."""
    return torch.tensor([0, n // 3, n // 3, n // 3 + n // 4, n], device=device)


def make_support(
    tokens: Tensor, vocab: int, kept: int, seed: int = 0, sparse: bool | None = None
) -> Support:
    """Up to `kept` different ids a row, in any order: some have none, some lack their token."""
    rng = torch.Generator().manual_seed(seed)
    rows = []
    for token in tokens.flatten().tolist():
        count = int(torch.randint(0, kept + 1, (), generator=rng))
        ids = torch.randperm(vocab, generator=rng)[:count]
        if count and 0 <= token < vocab and torch.rand((), generator=rng) < 0.7:
            ids = torch.cat([ids[ids != token][: count - 1], torch.tensor([token])])
        rows.append(ids)
    ends = torch.tensor([0, *map(len, rows)]).cumsum(0)
    ids = torch.cat(rows) if rows else ends[:0]
    return Support(ids.to(tokens.device), ends.to(tokens.device), sparse=sparse)


def logprobs_call(
    shape: Shape = (3, 5),
    vocab: int = 37,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    mask: str | None = "random",
    scale: float = 3.0,
    temperature: str | float = "token",
    kept: int | None = None,
    **options: Any,
) -> Call:
    """`token_logprobs`; temperature "token" draws one per token from [0.5, 2].

    `kept`: over a support of up to so many ids a row.
    """
    source = Source(dtype, device, seed)
    tensors: dict[str, Any] = {
        "logits": source.normal((*shape, vocab), scale),
        "tokens": source.integers(shape, vocab),
        "mask": None if mask is None else make_mask(shape, mask, seed, device),
    }
    if temperature == "token":
        tensors["temperature"] = source.uniform(shape, 0.5, 2.0)
    else:
        options["temperature"] = temperature
    if kept is not None:
        options["support"] = make_support(tensors["tokens"], vocab, kept, seed)
    grads = {name: source.cotangent(shape) for name in ("logprobs", "entropy")}
    return finish("token_logprobs", tensors, options, **grads)


def ppo_call(
    shape: Shape = (4, 9),
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    mask: str | None = "random",
    packed: bool = False,
    extras: tuple[str, ...] = ("entropy", "ref_logprobs", "is_weights", "advantage_moments"),
    logprobs: Tensor | None = None,
    **options: Any,
) -> Call:
    """`ppo_loss` with ratios on both sides of the clip and of `log_ratio_clamp`.

    extras: entropy, ref_logprobs, is_weights, advantage_moments, sequence_weights.
    Given `logprobs` may be wider than the dtype of the rest.
    """
    source = Source(dtype, device, seed)
    drawn = -source.normal(shape).abs()
    logprobs = drawn if logprobs is None else logprobs
    gap = source.normal(shape, 0.3) + source.normal(shape, 25.0) * source.chance(shape, 0.05)
    options = {"clip_low": 0.2, "clip_high": 0.28, "reduction": "token-mean", **options}
    variant = options.get("variant", "clip")
    if variant == "penalty":
        extras = tuple(name for name in extras if name != "ref_logprobs")
    if "ref_logprobs" in extras or variant == "penalty":
        options.setdefault("kl_coef", 0.3)
    if "entropy" in extras:
        options.setdefault("entropy_coef", 0.01)
    tensors: dict[str, Any] = {
        "logprobs": logprobs,
        "old_logprobs": (logprobs - gap).to(dtype),
        "advantages": source.normal(shape, 2.0, 0.5),
        "mask": None if mask is None else make_mask(shape, mask, seed, device),
        "is_weights": source.uniform(shape, 0.5, 2.0),
        "entropy": source.uniform(shape, 0.0, 3.0),
        "ref_logprobs": (logprobs - source.normal(shape, 0.7)).to(dtype),
        "cu_seqlens": offsets(shape[0], device) if packed else None,
        "sequence_weights": source.uniform((4,) if packed else shape[:1], 0.5, 2.0),
    }
    optional = ("entropy", "ref_logprobs", "is_weights", "sequence_weights")
    tensors = {k: v for k, v in tensors.items() if k not in optional or k in extras}
    if "advantage_moments" in extras:
        moments = torch.tensor([97.0, 0.4, 390.0], dtype=torch.float64, device=device)
        options["advantage_moments"] = Moments(moments)
    loss = torch.tensor(1.7, dtype=source.cotangent(()).dtype, device=device)
    return _clear_of_kinks(finish("ppo_loss", tensors, options, loss=loss))


def _clear_of_kinks(call: Call, margin: float = 1e-4) -> Call:
    """The call, with ratios of 1 for tokens that rounding could put on either side of a clip."""
    t, o = call.tensors, call.options
    new, old = t["logprobs"].double(), t["old_logprobs"].double()
    d = new - old
    keep = t["mask"] if "mask" in t else torch.ones_like(d, dtype=torch.bool)
    low, high = 1 - o["clip_low"], 1 + o["clip_high"]
    near = (d.abs() - 20).abs() < margin
    if o.get("variant") == "gspo" and d.dim() == 2:
        mean = (d * keep).sum(-1, keepdim=True) / keep.sum(-1, keepdim=True).clamp(min=1)
        d = mean.expand_as(d)
        near |= (d.abs() - 20).abs() < margin
    ratio = d.clamp(-20, 20).exp()
    for kink in (low, high, o.get("dual_clip") or 3.0):
        near |= (ratio / kink - 1).abs() < margin
    same = t["logprobs"].to(t["old_logprobs"].dtype)
    out = call.replace(old_logprobs=torch.where(near, same, t["old_logprobs"]))
    ref = t.get("ref_logprobs")
    if ref is not None:
        x = new - ref.double()
        value = {"k1": x, "k2": x * x / 2, "abs": x}.get(
            o.get("kl_estimator", "k3").rstrip("+"), torch.expm1(-x) + x
        )
        near = (value.abs() - (o.get("kl_clamp") or 10.0)).abs() < margin
        out = out.replace(ref_logprobs=torch.where(near, same, ref))
    return out


def value_call(
    shape: Shape = (4, 9),
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    mask: str | None = "random",
    packed: bool = False,
    **options: Any,
) -> Call:
    """`value_loss` with values on both sides of the clip."""
    source = Source(dtype, device, seed)
    values = source.normal(shape)
    clipped = options.setdefault("clip", 0.2) is not None
    old = (values - source.normal(shape, 0.25)).to(dtype)
    width = options["clip"] or 0.0
    gap = (values.double() - old.double()).abs()
    old = torch.where((gap - width).abs() < 1e-4, values, old)
    tensors: dict[str, Any] = {
        "values": values,
        "old_values": old if clipped else None,
        "returns": source.normal(shape, 1.0, 0.2),
        "mask": None if mask is None else make_mask(shape, mask, seed, device),
        "cu_seqlens": offsets(shape[0], device) if packed else None,
    }
    if not clipped:
        options["old_values"] = None
    loss = torch.tensor(0.6, dtype=source.cotangent(()).dtype, device=device)
    return finish("value_loss", tensors, options, loss=loss)


def gae_call(
    shape: Shape = (4, 9),
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    mask: str | None = "random",
    packed: bool = False,
    extras: tuple[str, ...] = ("bootstrap", "terminated"),
    **options: Any,
) -> Call:
    """`gae`; extras: bootstrap, next_values, terminated, truncated, rho, c, lam, lam_returns.

    "lam" and "lam_returns" are tensors of one value per step, "row_lam" one per sequence.
    """
    source = Source(dtype, device, seed)
    ends = offsets(shape[0], device) if packed else None
    rows = (4,) if packed else shape[1:] if options.get("time_major") else shape[:1]
    every = {
        "bootstrap": source.normal(rows),
        "next_values": source.normal(shape),
        "terminated": source.chance(shape, 0.1),
        "truncated": source.chance(shape, 0.1),
        "rho": source.uniform(shape, 0.2, 1.0),
        "c": source.uniform(shape, 0.2, 1.0),
        "lam": source.uniform(shape, 0.8, 1.0),
        "lam_returns": source.uniform(shape, 0.8, 1.0),
        "row_lam": source.uniform(rows, 0.8, 1.0),
    }
    tensors: dict[str, Any] = {
        "rewards": source.normal(shape),
        "values": source.normal(shape),
        "mask": None if mask is None else make_mask(shape, mask, seed, device),
        "cu_seqlens": ends,
    }
    tensors |= {name.removeprefix("row_"): x for name, x in every.items() if name in extras}
    return finish("gae", tensors, {"gamma": 0.99, **options})


def rlhf_call(
    shape: Shape = (4, 9),
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    mask: str = "right",
    packed: bool = False,
    bootstrap: bool = True,
    **options: Any,
) -> Call:
    """`rlhf_advantages`, scores per sequence unless `score_at` is "per-token"."""
    source = Source(dtype, device, seed)
    rows = (4,) if packed else shape[:1]
    logprobs = -source.normal(shape).abs()
    per_token = options.get("score_at") == "per-token"
    tensors = {
        "scores": source.normal(shape if per_token else rows),
        "logprobs": logprobs,
        "ref_logprobs": (logprobs - source.normal(shape, 0.5)).to(dtype),
        "values": source.normal(shape),
        "mask": make_mask(shape, mask, seed, device),
        "bootstrap": source.normal(rows) if bootstrap else None,
        "cu_seqlens": offsets(shape[0], device) if packed else None,
    }
    options = {"kl_coef": 0.2, "gamma": 0.99, **options}
    return finish("rlhf_advantages", tensors, options)


def whiten_call(
    shape: Shape = (4, 9),
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    mask: str | None = "random",
    mean: float = 0.5,
    **options: Any,
) -> Call:
    """`whiten`."""
    source = Source(dtype, device, seed)
    tensors = {
        "x": source.normal(shape, 2.0, mean),
        "mask": None if mask is None else make_mask(shape, mask, seed, device),
    }
    return finish("whiten", tensors, options)


FACTORIES: dict[str, Callable[..., Call]] = {
    "token_logprobs": logprobs_call,
    "ppo_loss": ppo_call,
    "value_loss": value_call,
    "gae": gae_call,
    "rlhf_advantages": rlhf_call,
    "whiten": whiten_call,
}
