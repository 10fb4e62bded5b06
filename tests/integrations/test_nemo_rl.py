"""Tests of the lines on docs/integrations/nemo_rl.md against NeMo-RL's formulas in fp64."""

from __future__ import annotations

from enum import Enum
from typing import Any

import pytest
import torch
from by_path import compared, lines, normal
from torch import Tensor


class LossType(Enum):
    """NeMo-RL's, by its names."""

    TOKEN_LEVEL = "token_level"
    SEQUENCE_LEVEL = "sequence_level"


class ClippedPGLossFn:
    """NeMo-RL's loss as far as a subclass sees it: its options as attributes."""

    def __init__(self, **options: Any) -> None:
        defaults = {
            "disable_ppo_ratio": False,
            "force_on_policy_ratio": False,
            "use_on_policy_kl_approximation": False,
            "positive_example_nll_weight": 0.0,
            "use_cispo": False,
            "sequence_level_importance_ratios": False,
            "ratio_clip_min": 0.2,
            "ratio_clip_max": 0.28,
            "ratio_clip_c": None,
            "reference_policy_kl_penalty": 0.0,
            "reference_policy_kl_type": "k3",
            "kl_output_clamp_value": 10.0,
            "use_importance_sampling_correction": False,
            "truncated_importance_sampling_type": None,
            "truncated_importance_sampling_ratio": None,
            "truncated_importance_sampling_ratio_min": None,
            "loss_type": LossType.TOKEN_LEVEL,
        }
        assert options.keys() <= defaults.keys()
        vars(self).update(defaults | options)


def nemo_data() -> dict[str, Tensor]:
    b, t = 4, 9
    old = -normal(11, b, t).abs() - 1
    token = (normal(12, b, t) > -1).double()
    token[:, 3] = 1
    return {
        "token_mask": token,
        "sample_mask": torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64),
        "advantages": normal(13, b, t),
        "prev_logprobs": old,
        "generation_logprobs": old + normal(14, b, t, scale=0.3),
        "reference_policy_logprobs": old + normal(15, b, t, scale=0.5),
    }


def nemo_weights(o: Any, x: dict[str, Tensor], mask: Tensor) -> Tensor:
    """The sampler's weight of every token, (B, T) or (B, 1)."""
    gap = (x["prev_logprobs"] - x["generation_logprobs"])[:, 1:]
    token = x["token_mask"][:, 1:]
    if not o.use_importance_sampling_correction:
        return torch.ones_like(gap)
    w = gap.exp()
    if o.sequence_level_importance_ratios:
        w = (gap * mask).sum(-1).exp()[:, None]
    low = o.truncated_importance_sampling_ratio_min or 0.0
    high = o.truncated_importance_sampling_ratio
    kind = o.truncated_importance_sampling_type
    if kind == "tis":
        return w.clamp(low, high)
    if kind == "icepop":
        return torch.where((w >= low) & (w <= high), w, 0.0)
    if kind == "seq-mask-tis":
        mean = ((gap * token).sum(-1) / token.sum(-1)).exp()
        return w * ((mean >= low) & (mean <= high))[:, None]
    return w


def nemo_loss(o: Any, x: dict[str, Tensor], new: Tensor, seqs: Tensor, toks: Tensor) -> Tensor:
    token, sample = x["token_mask"][:, 1:], x["sample_mask"]
    mask, adv = token * sample[:, None], x["advantages"][:, 1:]
    by_sequence = o.loss_type == LossType.SEQUENCE_LEVEL

    def reduce(terms: Tensor) -> Tensor:
        if not by_sequence:
            return (terms * mask).sum() / toks
        return (((terms * token).sum(-1) / token.sum(-1)) * sample).sum() / seqs

    d = new - x["prev_logprobs"][:, 1:]
    if o.sequence_level_importance_ratios:
        d = ((d * token).sum(-1) / token.sum(-1))[:, None].expand_as(new)
    rho = d.exp()
    near = rho.clamp(1 - o.ratio_clip_min, 1 + o.ratio_clip_max)
    terms = -adv * near.detach() * new if o.use_cispo else torch.maximum(-adv * rho, -adv * near)
    if o.ratio_clip_c is not None:
        terms = torch.where(adv < 0, torch.minimum(terms, -adv * o.ratio_clip_c), terms)
    loss = reduce(nemo_weights(o, x, mask) * terms)
    if o.reference_policy_kl_penalty:
        r = x["reference_policy_logprobs"][:, 1:] - new
        kl = {"k1": -r, "k2": r**2 / 2, "k3": r.exp() - 1 - r}[o.reference_policy_kl_type]
        kl = (new - new.detach()).exp() * kl
        loss = loss + o.reference_policy_kl_penalty * reduce(kl)
    return loss


SEQUENCE = {"loss_type": LossType.SEQUENCE_LEVEL}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ratio_clip_c": 1.1},
        SEQUENCE,
        {**SEQUENCE, "sequence_level_importance_ratios": True, "ratio_clip_min": 0.02},
        {
            **SEQUENCE,
            "sequence_level_importance_ratios": True,
            "use_importance_sampling_correction": True,
        },
        {"use_cispo": True},
        {"reference_policy_kl_penalty": 0.1, "reference_policy_kl_type": "k1"},
        {"reference_policy_kl_penalty": 0.1, "reference_policy_kl_type": "k2"},
        {"reference_policy_kl_penalty": 0.1, **SEQUENCE},
        {"use_importance_sampling_correction": True},
        *(
            {
                "use_importance_sampling_correction": True,
                "truncated_importance_sampling_type": kind,
                "truncated_importance_sampling_ratio": high,
                "truncated_importance_sampling_ratio_min": low,
            }
            for kind, low, high in (
                ("tis", None, 1.2),
                ("icepop", 0.7, 1.3),
                ("seq-mask-tis", 0.9, 1.1),
            )
        ),
    ],
    ids=lambda o: "-".join(f"{k}={getattr(v, 'name', v)}" for k, v in o.items()) or "defaults",
)
def test_nemo_rl(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    module = {"ClippedPGLossFn": ClippedPGLossFn}
    found = lines(
        monkeypatch,
        "nemo_rl",
        "class FusedPGLoss",
        nemo_rl__algorithms__grpo=module,
        nemo_rl__algorithms__loss__interfaces={"LossType": LossType},
    )
    assert found["grpo"].ClippedPGLossFn is found["FusedPGLoss"]
    o, x = found["FusedPGLoss"](**options), nemo_data()
    old, rollout = x["prev_logprobs"][:, 1:], x["generation_logprobs"][:, 1:]
    seqs, toks = torch.tensor(5.0), torch.tensor(40.0)
    mask = x["token_mask"][:, 1:] * x["sample_mask"][:, None]
    new = old + normal(16, *old.shape, scale=0.3)

    def ours(leaf: Tensor) -> Tensor:
        loss, metrics = o(leaf, x, seqs, toks)
        gap = (rollout - old) * mask
        rho = (leaf.detach() - old).exp()
        expected = {
            "token_mult_prob_error": (gap.abs().exp() * mask).sum() / 40,
            "gen_kl_error": ((gap.neg().exp() - 1 + gap) * mask).sum() / 40,
            "num_valid_samples": torch.tensor(3.0),
        }
        if not o.sequence_level_importance_ratios:
            expected["probs_ratio"] = (rho * mask).sum() / 40
            expected["probs_ratio_min"] = rho[mask.bool()].min()
            expected["probs_ratio_max"] = rho[mask.bool()].max()
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(float(value), rel=1e-9), name
        return loss

    compared(ours, lambda leaf: nemo_loss(o, x, leaf, seqs, toks), new)


@pytest.mark.parametrize(
    "name", ["disable_ppo_ratio", "force_on_policy_ratio", "use_on_policy_kl_approximation"]
)
def test_nemo_rl_refuses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = lines(
        monkeypatch,
        "nemo_rl",
        "class FusedPGLoss",
        nemo_rl__algorithms__grpo={"ClippedPGLossFn": ClippedPGLossFn},
        nemo_rl__algorithms__loss__interfaces={"LossType": LossType},
    )
    x = nemo_data()
    with pytest.raises(ValueError, match=name):
        found["FusedPGLoss"](**{name: True})(
            x["prev_logprobs"][:, 1:], x, torch.tensor(5.0), torch.tensor(40.0)
        )
