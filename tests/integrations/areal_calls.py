"""Calls of AReaL's losses on AReaL and on ppo_fast, compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import both_sides
import torch
from areal.utils.functional import functional
from both_sides import B, T, mask_of
from torch import Tensor

from ppo_fast import testing
from ppo_fast.integrations import areal

# Slots of the packed sequences, one of them empty of kept tokens and one of one token.
CU_SEQLENS = torch.tensor([0, 11, 18, 29, 30, B * T], dtype=torch.int32)
SEQUENCES = {"level": "sequence", "metric": "ratio"}
REJECTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "tokens": {"upper": 1.25, "lower": 0.8},
    "clamped tokens": {"action": "clamp", "upper": 1.1, "lower": 0.9},
    "sequences": SEQUENCES | {"upper": 1.05, "lower": 0.95},
    "clamped sequences": SEQUENCES | {"action": "clamp", "upper": 1.02},
    "largest k2": {"level": "sequence", "metric": "kl_k2", "agg": "max", "upper": 0.04},
    "k3": {"metric": "kl_k3", "upper": 0.02},
}


class Rows(NamedTuple):
    """Arguments of a policy loss, of fp32's values."""

    new: Tensor
    old: Tensor
    rollout: Tensor
    advantages: Tensor
    mask: Tensor
    cu_seqlens: Tensor | None

    def to(self, dtype: torch.dtype) -> Rows:
        new = self.new.detach().to(dtype).requires_grad_()
        others = (x.to(dtype) for x in (self.old, self.rollout, self.advantages))
        return Rows(new, *others, self.mask, self.cu_seqlens)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return both_sides.normal(*shape, seed=seed).float()


def rows(packed: bool) -> Rows:
    """`(B, T)`, or packed in one row of unequal sequences; an advantage is 0.

    Sequences have ratios and advantages that meet each bound, too.
    """
    new = 0.3 * normal(B, T) - 2
    old = 0.3 * normal(B, T, seed=1) - 2 - torch.tensor([[0.6], [-0.3], [0.5], [0.0], [0.5]])
    advantages = normal(B, T, seed=2) + torch.tensor([[-0.8], [0.8], [0.8], [0.0], [-1.5]])
    advantages[2, 3] = 0.0
    given = [new, old, old + 0.2 * normal(B, T, seed=3), advantages, mask_of("bool")]
    return Rows(*(x.flatten() for x in given), CU_SEQLENS) if packed else Rows(*given, None)


Loss = Callable[[Rows], tuple[Tensor, dict[str, Any]]]


def actor(rejection: dict[str, Any], **options: Any) -> Loss:
    from areal.api.cli_args import RejectionSamplingConfig

    own = RejectionSamplingConfig(**rejection) if rejection else None

    def call(x: Rows) -> tuple[Tensor, dict[str, Any]]:
        return functional.ppo_actor_loss_fn(
            logprobs=x.new,
            proximal_logprobs=x.old,
            old_logprobs=x.rollout,
            advantages=x.advantages,
            loss_mask=x.mask,
            rejection_sampling=own,
            cu_seqlens=x.cu_seqlens,
            **options,
        )

    return call


def results(call: Loss, x: Rows) -> dict[str, Tensor]:
    """Loss, gradient, and the statistics of the kept tokens, which AReaL logs."""
    loss, found = call(x)
    (gradient,) = torch.autograd.grad(loss, x.new)
    logged = {
        k: torch.where(x.mask, v, 0) if isinstance(v, Tensor) else torch.tensor(v)
        for k, v in found.items()
    }
    return {"loss of all": loss.detach(), "gradient": gradient} | logged


def size_of(x: Rows) -> float:
    """The largest that a token's loss or slope can be: ratio, advantage and a weight below 2."""
    ratio = (x.new - x.old).detach().exp().max()
    return 2.0 * float(x.advantages.abs().max() * ratio)


def assert_alike(call: Loss, *cases: Rows) -> None:
    """AReaL's own in fp64 is exact: ours in fp64, and ours in fp32, within the budget of each.

    AReaL forms the rollout's weights in fp32 whatever the inputs are.
    """
    exact = [results(call, x.to(torch.float64)) for x in cases]
    given = [
        (x.to(dtype), i) for dtype in (torch.float64, torch.float32) for i, x in enumerate(cases)
    ]
    with areal.patched(("policy_loss",)) as counts:
        got = [(results(call, x), x, exact[i]) for x, i in given]
    assert (counts["policy_loss"].fused, counts["policy_loss"].left) == (len(given), 0)
    for ours, x, theirs in got:
        assert ours.keys() == theirs.keys()
        for name, a in ours.items():
            b = theirs[name]
            if a.dtype == torch.bool or name == "filtered_fraction":
                assert torch.equal(a, b), name
                continue
            # Sums over tokens in any order, after some twenty roundings in each.
            testing.assert_within_budget(
                a, b, condition=size_of(x), ops=20 + B * T, compute=x.new.dtype, name=name
            )
