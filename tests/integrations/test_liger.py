"""The eight losses of Liger 0.8.5's fused GRPO as options of `ppo_loss`; fp64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from trainers import needs_version

needs_version("liger-kernel", "0.8.5")

from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction

import ppo_fast
from ppo_fast import surrogates, testing

ROWS, LENGTH, LONGEST = 5, 9, 12
VESPO = {"vespo_k_pos": 1.5, "vespo_k_neg": 2.5, "vespo_lambda_pos": 2.0, "vespo_lambda_neg": 1.0}

# What Liger calls a loss is a policy term and a reduction; D counts empty rows too.
LOSSES: dict[str, dict[str, Any]] = {
    "grpo": {"reduction": "seq-mean-token-mean", "denom": float(ROWS)},
    "bnpo": {"reduction": "token-mean"},
    "dr_grpo": {"denom": float(ROWS * LONGEST)},
    "dapo": {"denom": 31.0},
    "luspo": {"reduction": "seq-mean-token-sum", "denom": float(ROWS)},
    "cispo": {"variant": "cispo", "denom": 31.0},
    "sapo": {
        "variant": surrogates.sapo(0.75, 1.25),
        "reduction": "seq-mean-token-mean",
        "denom": float(ROWS),
    },
    "vespo": {"variant": surrogates.vespo((1.5, 2.5), (2.0, 1.0)), "denom": 31.0},
}
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")


def drawn() -> tuple[dict[str, Tensor], Tensor]:
    """Log-probabilities of three policies, advantages (B,), and a mask with an empty row."""
    torch.manual_seed(0)
    new, old, ref = torch.randn(3, ROWS, LENGTH, dtype=torch.float64) - 3
    mask = torch.ones(ROWS, LENGTH, dtype=torch.int64)
    mask[0, 5:], mask[1, 3:6], mask[2, 1:], mask[3] = 0, 0, 0, 0
    advantages = torch.randn(ROWS, dtype=torch.float64)
    return {"new": new, "old": old, "ref": ref, "advantages": advantages}, mask


def ratios(mask: Tensor, columns: int) -> Tensor | None:
    """Importance ratios `(B, T)` or `(B, 1)`, some of them 0, and 1 where masked."""
    if columns == 0:
        return None
    torch.manual_seed(2)
    found = (torch.randn(ROWS, columns, dtype=torch.float64) / 4).exp()
    found[found > 1.2] = 0.0
    return torch.where(mask.bool() if columns > 1 else mask.any(1, keepdim=True), found, 1.0)


def of_liger(
    leaf: Tensor,
    x: dict[str, Tensor],
    mask: Tensor,
    weights: Tensor | None,
    loss_type: str,
    level: str,
    clip: dict[str, Any],
    kl: str,
) -> Tensor:
    loss, _ = LigerFusedLinearGRPOFunction.ppo_loss_fn(
        leaf,
        mask,
        x["advantages"],
        mask,
        ref_per_token_logps=x["ref"],
        old_per_token_logps=x["old"],
        beta=0.0 if kl == "none" else 0.3,
        use_bias_correction_kl=kl == "ratio",
        loss_type=loss_type,
        max_completion_length=LONGEST,
        importance_sampling_level=level,
        sapo_temperature_pos=0.75,
        sapo_temperature_neg=1.25,
        vllm_is_ratio=weights,
        num_items_in_batch=31.0,
        **clip,
        **VESPO,
    )
    return loss


def options_of(loss_type: str, clip: dict[str, Any], kl: str, ref: Tensor) -> dict[str, Any]:
    """`ppo_loss`'s options for a loss, clip bounds and KL term of Liger's."""
    options: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.3}
    if loss_type == "cispo":
        options = {"clip_low": 1.0, "clip_high": clip["epsilon_high"] - 1.0}
    elif "delta" in clip:  # the smaller of the bounds where A > 0, the larger where A < 0
        least, most = sorted((clip["delta"], 1.3))
        options |= {"clip_high": least - 1.0, "dual_clip": most}
    if kl != "none":
        weight = {"kl_weight": "ratio"} if kl == "ratio" else {}
        options |= {"ref_logprobs": ref, "kl_coef": 0.3, "kl_clamp": None, **weight}
    return {**options, **LOSSES[loss_type]}


def assert_liger(loss_type: str, level: str, clip: dict[str, Any], columns: int, kl: str) -> None:
    x, mask = drawn()
    weights = ratios(mask, columns)
    leaf = x["new"].requires_grad_()
    theirs = of_liger(leaf, x, mask, weights, loss_type, level, clip, kl)
    (slope,) = torch.autograd.grad(theirs, leaf)
    reach = max(1.0, float((leaf.detach() - x["old"]).exp().max()))
    k3 = float((x["ref"] - leaf.detach()).exp().max()) + 8.0
    size = reach * (float(x["advantages"].abs().max()) * 8.0 + k3)
    for backend in ("cpu", "reference"):
        ours = ppo_fast.ppo_loss(
            leaf,
            x["old"],
            x["advantages"][:, None],
            mask,
            ratio_level=level,
            is_weights=weights,
            log_ratio_clamp=None,
            backend=backend,
            **options_of(loss_type, clip, kl, x["ref"]),
        ).loss
        pairs = ((ours, theirs), (torch.autograd.grad(ours, leaf)[0], slope))
        for got, want in pairs:
            testing.assert_within_budget(
                got.detach(),
                want.detach(),
                condition=size,
                ops=40 * ROWS * LENGTH,
                name=f"{backend} {columns} {clip}",
            )


@pytest.mark.parametrize("kl", ["none", "plain", "ratio"])
@pytest.mark.parametrize("loss_type", [name for name in LOSSES if name != "luspo"])
def test_by_token(loss_type: str, kl: str) -> None:
    clips: list[dict[str, Any]] = [{"epsilon_low": 0.2, "epsilon_high": 0.3}]
    if loss_type == "cispo":
        clips = [{"epsilon_high": 2.0}]
    if loss_type in CLIPPED:
        clips += [{**clips[0], "delta": delta} for delta in (4.0, 1.1)]
    # vespo's weights are the tokens' own: TRL refuses a sequence's, which Liger counts once.
    given = (0, LENGTH) if loss_type == "vespo" else (0, LENGTH, 1)
    for clip, columns in itertools.product(clips, given):
        assert_liger(loss_type, "token", clip, columns, kl)


@pytest.mark.parametrize("kl", ["none", "plain", "ratio"])
@pytest.mark.parametrize("loss_type", [name for name in CLIPPED if name != "luspo"])
def test_by_sequence(loss_type: str, kl: str) -> None:
    """Liger has sequence ratios for these alone."""
    bounds = {"epsilon_low": 0.2, "epsilon_high": 0.3}
    for more, columns in itertools.product(({}, {"delta": 4.0}, {"delta": 1.1}), (0, LENGTH, 1)):
        assert_liger(loss_type, "sequence", {**bounds, **more}, columns, kl)


def test_luspo() -> None:
    """By sequence without per-token factors; with them Liger averages masked slots too."""
    bounds = {"epsilon_low": 0.2, "epsilon_high": 0.3}
    for more, columns in itertools.product(({}, {"delta": 4.0}, {"delta": 1.1}), (0, 1)):
        assert_liger("luspo", "sequence", {**bounds, **more}, columns, "none")
