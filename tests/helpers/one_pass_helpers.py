"""Comparison of a one-pass logits_ppo_loss with the three ops that it replaces."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppo_fast._boundary import calls
from ppo_fast._boundary.options import PolicyOptions, Scoring, TokenTensors
from ppo_fast._boundary.schema import ESTIMATORS, REDUCTIONS, VARIANTS
from ppo_fast.testing import same_bits

INF = math.inf
OPTIONS = PolicyOptions(
    variant=VARIANTS.index("clip"),
    estimator=ESTIMATORS.index("k3"),
    straight_through=0,
    reduction=REDUCTIONS.index("token-sum"),
    kl_weight=0,
    by_sequence=0,
    clip_low=0.2,
    clip_high=0.28,
    dual_clip=INF,
    log_ratio_min=-20.0,
    log_ratio_max=20.0,
    entropy_coef=0.01,
    kl_coef=0.1,
    kl_clamp=10.0,
    kl_ratio_clip=INF,
    denom=0.0,
    entropy_coef_tensor=None,
    kl_coef_tensor=None,
    denom_tensor=None,
)


class Args(NamedTuple):
    """The op's arguments; the tensors among coefficients and temperature replace the numbers."""

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
    ignore_index: int
    number: float  # temperature
    options: PolicyOptions

    def scoring(self) -> Scoring:
        return Scoring(self.tokens, self.mask, self.temperature, self.number, self.ignore_index)

    def per_token(self) -> TokenTensors:
        return TokenTensors(
            old_logprobs=self.old_logprobs,
            advantages=self.advantages,
            is_weights=self.is_weights,
            ref_logprobs=self.ref_logprobs,
            moments=self.moments,
        )

    def coefficients(self) -> PolicyOptions:
        return self.options._replace(
            entropy_coef_tensor=self.entropy_coef, kl_coef_tensor=self.kl_coef
        )


# The backend under test; a fixture sets it.
BACKEND = "triton"


def op(name: str) -> Any:
    """One of the three one-pass ops, on the fields of `Args`."""

    def call(*fields: Any) -> Any:
        a = Args(*fields)
        inputs = (a.logits, a.scoring(), a.per_token(), a.weights, a.coefficients())
        return getattr(calls, name)(BACKEND, *inputs)

    return call


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
    temperature: float = 1.0,
    **options: float,
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
        -100,
        temperature,
        OPTIONS._replace(
            variant=VARIANTS.index(variant),
            estimator=ESTIMATORS.index(estimator),
            straight_through=int(straight),
            **options,
        ),
    )
    return args._replace(**dict.fromkeys(without))


def composed(args: Args) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, entropy, dlogits) by the three ops and a product with the weights."""
    s, x = args.scoring(), args.per_token()
    softmax = calls.logprobs_fwd(BACKEND, args.logits, s)
    keep = s.tokens != s.ignore_index
    keep = keep if s.mask is None else keep & (s.mask != 0)
    flat = {k: None if v is None else v.reshape(-1) for k, v in x._asdict().items()}
    *_, grads = calls.ppo_loss(
        BACKEND,
        softmax.logprobs.reshape(-1),
        TokenTensors(**flat),
        args.coefficients(),
        2,
        mask=keep.reshape(-1),
        entropy=softmax.entropy.reshape(-1),
        cu_seqlens=None,
        sequence_weights=None,
    )
    slopes = grads.view(2, *s.tokens.shape) * args.weights
    grad = calls.logprobs_bwd(BACKEND, args.logits, s, softmax, *slopes)
    return softmax.logprobs, softmax.entropy, grad


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


def narrowed(args: Args) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, entropy, gradient) of fp32 logits, the last over the logits and in bf16."""
    logits = args.logits.clone()
    results = op("logits_ppo_loss_bf16_")(logits, *args[1:])
    return *results, half_width(logits)


def half_width(logits: Tensor) -> Tensor:
    """bf16 gradient in the memory of fp32 logits: each row starts where theirs does."""
    return logits.view(torch.bfloat16)[..., : logits.shape[-1]]


def assert_narrowed(args: Args) -> None:
    """A gradient of half the width is the wide one, rounded; the other results are the same."""
    logprobs, entropy, wide = op("logits_ppo_loss")(*args)
    for x, y in zip(narrowed(args), (logprobs, entropy, wide.bfloat16()), strict=True):
        assert same_bits(x, y)


def assert_same(args: Args) -> tuple[Tensor, Tensor, Tensor]:
    """The two agree to the bit; the results."""
    out = fused(args)
    for name, x, y in zip(("logprobs", "entropy", "gradient"), out, composed(args), strict=True):
        assert same_bits(x, y), f"{name}: off by {(x - y).abs().max()}"
    assert args.logits.shape[-1] == 1 or bool(out[2].any())
    return out
