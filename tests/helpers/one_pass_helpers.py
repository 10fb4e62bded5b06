"""A one-pass logits_ppo_loss beside the three ops that it stands for."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppo_fast._schema import ESTIMATORS, HANDLES, VARIANTS
from ppo_fast.testing import same_bits

INF = math.inf
PARAMS = {
    "temperature": 1.0,
    "clip_low": 0.2,
    "clip_high": 0.28,
    "dual_clip": INF,
    "log_min": -20.0,
    "log_max": 20.0,
    "entropy_coef": 0.01,
    "kl_coef": 0.1,
    "kl_clamp": 10.0,
    "kl_ratio_clip": INF,
}


class Args(NamedTuple):
    """The op's arguments, in the order of the schema."""

    logits: Tensor
    tokens: Tensor
    mask: Tensor | None
    temperature: Tensor | None
    old_logprobs: Tensor | None
    advantages: Tensor
    is_weights: Tensor | None
    moments: Tensor | None
    ref_logprobs: Tensor | None
    weights: Tensor
    entropy_coef: Tensor | None
    kl_coef: Tensor | None
    codes: list[int]
    params: list[float]


# The backend under test; a fixture sets it.
BACKEND = "triton"


def op(name: str) -> Any:
    return HANDLES[name][BACKEND]


def make(
    device: str,
    shape: tuple[int, ...] = (2, 2),
    vocab: int = 37,
    *,
    dtype: torch.dtype = torch.float32,
    variant: str = "clip",
    estimator: str = "k3",
    straight: bool = False,
    without: tuple[str, ...] = (),
    seed: int = 0,
    **params: float,
) -> Args:
    """All arguments but those in `without`; the second token is masked."""
    source = torch.Generator().manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size or shape, generator=source) * scale).to(device)

    logits = normal(*shape, vocab, scale=3.0).to(dtype)
    tokens = torch.randint(vocab, shape, generator=source).to(device)
    likely = logits.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    mask = torch.ones(shape, dtype=torch.bool, device=device)
    mask.view(-1)[1:2] = False
    args = Args(
        logits,
        tokens,
        mask,
        normal().abs() + 0.5,
        likely + normal(scale=0.3),
        normal(),
        normal().abs(),
        torch.tensor([9.0, 0.3, 8.0], device=device).double(),
        likely + normal(scale=0.5),
        normal().abs(),
        None,
        None,
        [-100, VARIANTS.index(variant), ESTIMATORS.index(estimator), int(straight)],
        list((PARAMS | params).values()),
    )
    return args._replace(**dict.fromkeys(without))


def composed(args: Args) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, entropy, dlogits) by the three ops and a product with the weights."""
    a, (ignore, *codes), (heat, *params) = args, args.codes, args.params
    scoring = (a.logits, a.tokens, a.mask, a.temperature)
    logprobs, entropy, *rest = op("logprobs_fwd")(*scoring, [ignore], [heat])
    keep = a.tokens != ignore if a.mask is None else (a.tokens != ignore) & (a.mask != 0)
    flat = [
        None if x is None else x.reshape(-1)
        for x in (
            logprobs,
            a.old_logprobs,
            a.advantages,
            keep,
            a.is_weights,
            a.moments,
            entropy,
            a.ref_logprobs,
        )
    ]
    *_, grads = op("ppo_loss")(
        *flat, None, a.entropy_coef, a.kl_coef, None, [*codes, 1, 2], [*params, 0.0]
    )
    slopes = grads.view(2, *a.tokens.shape) * a.weights
    grad = op("logprobs_bwd")(*slopes, *scoring, entropy, *rest, [ignore], [heat])
    return logprobs, entropy, grad


def fused(args: Args) -> tuple[Tensor, Tensor, Tensor]:
    """The same by the op, which must not depend on where it writes."""
    before = args.logits.clone()
    out = op("logits_ppo_loss")(*args)
    assert same_bits(args.logits, before), "the logits are not written"
    over = torch.empty_strided(
        before.shape, args.logits.stride(), dtype=before.dtype, device=before.device
    ).copy_(before)
    results = op("logits_ppo_loss_")(over, *args[1:])
    for name, x, y in zip(("logprobs", "entropy", "gradient"), (*results, over), out, strict=True):
        assert same_bits(x, y), f"{name} in place"
    return out


def assert_same(args: Args) -> tuple[Tensor, Tensor, Tensor]:
    """The two agree to the bit; the results."""
    out = fused(args)
    for name, x, y in zip(("logprobs", "entropy", "gradient"), out, composed(args), strict=True):
        assert same_bits(x, y), f"{name}: off by {(x - y).abs().max()}"
    assert args.logits.shape[-1] == 1 or bool(out[2].any())
    return out
