"""Tests of the lines on docs/integrations/slime.md against slime's formulas in fp64."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from by_path import CLOSE, compared, lines, normal
from torch import Tensor

SLIME = {
    "use_opsm": False,
    "use_rollout_logprobs": False,
    "rollout_temperature": 1.0,
    "advantage_estimator": "grpo",
    "eps_clip": 0.2,
    "eps_clip_high": 0.28,
    "eps_clip_c": None,
    "entropy_coef": 0.0,
    "use_kl_loss": False,
    "kl_loss_coef": 0.0,
    "kl_loss_type": "k3",
    "use_unbiased_kl": False,
    "use_tis": False,
    "tis_clip_low": 0.0,
    "tis_clip": 2.0,
    "calculate_per_token_loss": False,
}
LENGTHS, RESPONSES, VOCAB = [7, 5, 9], [4, 2, 6], 13


def mpu(**sizes: int) -> dict[str, Any]:
    return {
        "mpu": SimpleNamespace(
            get_context_parallel_world_size=lambda: sizes.get("context", 1),
            get_tensor_model_parallel_world_size=lambda: 1,
        )
    }


def slime_batch() -> dict[str, Any]:
    g = torch.Generator().manual_seed(6)

    def parts(seed: int, scale: float = 1.0) -> list[Tensor]:
        return list(normal(seed, sum(RESPONSES), scale=scale).split(RESPONSES))

    masks = [torch.ones(k, dtype=torch.float64) for k in RESPONSES]
    masks[0][1], masks[2][:2] = 0, 0
    old = [-x.abs() - 1 for x in parts(7)]
    near = parts(8, 0.3)
    return {
        "unconcat_tokens": [torch.randint(VOCAB, (n,), generator=g) for n in LENGTHS],
        "total_lengths": LENGTHS,
        "response_lengths": RESPONSES,
        "loss_masks": masks,
        "advantages": parts(9),
        "log_probs": old,
        "ref_log_probs": [a + b for a, b in zip(old, near, strict=True)],
        "rollout_log_probs": [a - b for a, b in zip(old, near, strict=True)],
        # Two samples of one rollout share its count.
        "rollout_mask_sums": [torch.tensor(5.0), torch.tensor(5.0), torch.tensor(4.0)],
    }


def slime_sum(args: Any, batch: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    def reduce(x: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        every = zip(
            x.split(RESPONSES), batch["loss_masks"], batch["rollout_mask_sums"], strict=True
        )
        for part, mask, count in every:
            d = 1.0 if args.calculate_per_token_loss else count.clamp(min=1)
            total = total + (part * mask).sum() / d
        return total

    return reduce


def slime_kl(args: Any, new: Tensor, old: Tensor, ref: Tensor) -> Tensor:
    d = new - ref
    kl = {"k1": d, "k2": d**2 / 2}.get(args.kl_loss_type, (-d).exp() - 1 + d)
    if args.use_unbiased_kl:
        kl = (new - old).exp() * kl
    return kl.clamp(-10, 10) if args.kl_loss_type == "low_var_kl" else kl


def slime_loss(args: Any, batch: dict[str, Any], logits: Tensor) -> Tensor:
    """slime's policy_loss, its tensors one after another."""
    z = logits[0] / args.rollout_temperature
    rows, end = [], 0
    for n, k in zip(LENGTHS, RESPONSES, strict=True):
        end += n
        rows += range(end - k - 1, end - 1)
    tokens = torch.cat([t[-k:] for t, k in zip(batch["unconcat_tokens"], RESPONSES, strict=True)])
    p = z[rows].log_softmax(-1)
    new, entropy = p.gather(-1, tokens[:, None])[:, 0], -(p.exp() * p).sum(-1)
    old, adv = torch.cat(batch["log_probs"]), torch.cat(batch["advantages"])
    d = new - old
    if args.advantage_estimator == "gspo":
        every = zip(d.split(RESPONSES), batch["loss_masks"], strict=True)
        d = torch.cat([((x * m).sum() / m.sum().clamp(min=1)).expand_as(x) for x, m in every])
    rho = d.exp()
    near = rho.clamp(1 - args.eps_clip, 1 + args.eps_clip_high)
    if args.advantage_estimator == "cispo":
        terms = -near.detach() * adv * new
    else:
        terms = torch.maximum(-rho * adv, -near * adv)
        if args.eps_clip_c is not None:
            terms = torch.where(adv < 0, torch.minimum(-args.eps_clip_c * adv, terms), terms)
    if args.use_tis:
        tis = (old - torch.cat(batch["rollout_log_probs"])).exp()
        terms = terms * tis.clamp(args.tis_clip_low, args.tis_clip)
    reduce = slime_sum(args, batch)
    loss = reduce(terms) - args.entropy_coef * reduce(entropy)
    if args.use_kl_loss:
        loss = loss + args.kl_loss_coef * reduce(
            slime_kl(args, new, old, torch.cat(batch["ref_log_probs"]))
        )
    return loss


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"calculate_per_token_loss": True, "rollout_temperature": 0.7},
        {"eps_clip_c": 1.1, "entropy_coef": 0.01},
        {"advantage_estimator": "gspo", "eps_clip": 0.02, "eps_clip_high": 0.03},
        {"advantage_estimator": "cispo", "eps_clip": 1.0},
        {"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": "k1"},
        {"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": "k2"},
        {"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": "low_var_kl"},
        {"use_kl_loss": True, "kl_loss_coef": 0.1, "use_unbiased_kl": True},
        {"use_tis": True, "tis_clip_low": 0.8, "tis_clip": 1.2},
    ],
    ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()) or "defaults",
)
def test_slime(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    policy_loss = lines(monkeypatch, "slime", "def policy_loss", megatron__core=mpu())[
        "policy_loss"
    ]
    args, batch = SimpleNamespace(**SLIME | options), slime_batch()
    # Three rows of padding after the last sample.
    logits = normal(10, 1, sum(LENGTHS) + 3, VOCAB)
    reduce = slime_sum(args, batch)

    def ours(z: Tensor) -> Tensor:
        loss, log = policy_loss(args, batch, z, reduce)
        assert set(log) == {"loss", "entropy_loss", "ppo_kl"}
        torch.testing.assert_close(log["loss"].double(), loss.detach().double(), **CLOSE)
        return loss

    compared(ours, lambda z: slime_loss(args, batch, z), logits)


@pytest.mark.parametrize(
    ("options", "sizes", "key"),
    [
        ({"use_opsm": True}, {}, "log_probs"),
        ({"use_rollout_logprobs": True}, {}, "log_probs"),
        ({}, {"context": 2}, "log_probs"),
        ({}, {}, "none"),
    ],
    ids=["opsm", "rollout", "context", "no-logprobs"],
)
def test_slime_refuses(
    options: dict[str, Any], sizes: dict[str, int], key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = lines(monkeypatch, "slime", "def policy_loss", megatron__core=mpu(**sizes))
    batch = slime_batch()
    if key == "none":
        batch["log_probs"] = []
    with pytest.raises(ValueError, match="policy_loss: "):
        found["policy_loss"](
            SimpleNamespace(**SLIME | options), batch, normal(10, 1, 21, VOCAB), sum
        )
