"""Policy losses and corrections of a run: every variant learns, and what the options become."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

pytest.importorskip("tyro", reason="the loop's command line needs tyro")

from loop_helpers import batch_of, trainer

import ppo_fast
from ppo_fast import Correction, Surrogate
from ppo_fast.loop import TrainConfig
from ppo_fast.loop.cli import arguments, parse
from ppo_fast.loop.config import Variant
from ppo_fast.loop.data.experience import corrected
from ppo_fast.loop.losses import correction_of, loss_options
from ppo_fast.loop.update import accumulate


@pytest.mark.parametrize("head", ["linear", "logits"])
@pytest.mark.parametrize("variant", get_args(Variant))
def test_every_variant_trains(tmp_path: Path, variant: str, head: str) -> None:
    """Two epochs: the first ratios are 1, the loss and the gradient are finite, a step is made."""
    t = trainer(tmp_path, dtype=torch.float64, variant=variant, head=head)
    record = t.step()
    assert record["steps"] > 0 and record["grad_norm"] > 0 and math.isfinite(record["loss"])
    assert record["ratio_max"] > 1 - 1e-12


@pytest.mark.parametrize("level", ["sequence", "sequence-token"])
@pytest.mark.parametrize("variant", ["clip", "cispo", "sapo"])
def test_a_ratio_of_the_completion(tmp_path: Path, variant: str, level: str) -> None:
    record = trainer(tmp_path, dtype=torch.float64, variant=variant, ratio_level=level).step()
    assert record["steps"] > 0 and 0 < record["ratio_min"] <= record["ratio_max"] < 2


def test_options_become_those_of_the_ops() -> None:
    tokens = torch.arange(4)

    def of(**options: Any) -> dict[str, Any]:
        return loss_options(TrainConfig(**options), tokens)

    assert of(clip=0.3) == {
        "variant": "clip",
        "ratio_level": "token",
        "clip_low": 0.3,
        "clip_high": 0.3,
        "dual_clip": None,
        "ratio_cap": None,
    }
    assert of(variant="sapo", ratio_level="sequence")["ratio_level"] == "sequence"
    capped = of(variant="dppo-tv", clip_low=0.1, ratio_cap=3.0)
    assert (capped["clip_low"], capped["clip_high"], capped["ratio_cap"]) == (0.1, 0.2, 3.0)
    wide = of(variant="gmpo")["variant"]
    assert isinstance(wide, Surrogate) and wide.fn.args == (0.4, 0.4)  # type: ignore[attr-defined]
    seeds = [
        loss_options(TrainConfig(variant="clip-cov"), x)["variant"].fn.args[2]
        for x in (tokens, tokens + 1)
    ]
    assert [int(seed) for seed in seeds] == [6, 10]


CORRECTIONS: list[tuple[dict[str, Any], bool, Correction | None]] = [
    ({}, False, None),
    ({}, True, Correction("token", high=2.0)),
    ({"correction": "off"}, True, None),
    # A rejection takes no weights off samples that have them.
    ({"reject": ("token-k3=0.1",)}, True, Correction("token", high=2.0, reject={"token-k3": 0.1})),
    ({"reject": ("token-k3=0.1",)}, False, Correction(None, reject={"token-k3": 0.1})),
    ({"correction_high": 1.5}, False, Correction("token", high=1.5)),
    ({"correction": "sequence"}, False, Correction("sequence", high=2.0)),
    (
        {"correction_form": "mask", "correction_low": 0.5, "correction_high": 5.0},
        False,
        Correction("token", "mask", 0.5, 5.0),
    ),
    (
        {
            "reject": ("seq-mean-k1=0.999:1.001", "token-k3=0.1"),
            "correction_drops": "all",
            "correction_count": "kept",
        },
        False,
        Correction(
            None,
            reject={"seq-mean-k1": (0.999, 1.001), "token-k3": 0.1},
            drops="all",
            count="kept",
        ),
    ),
    (
        {"correction": "geometric", "reject": ("token-k2=1",), "correction_ratio": "current"},
        False,
        Correction("geometric", high=2.0, reject={"token-k2": 1.0}, ratio="current"),
    ),
]


@pytest.mark.parametrize(("options", "rounds", "want"), CORRECTIONS, ids=str)
def test_the_correction_of_a_run(
    options: dict[str, Any], rounds: bool, want: Correction | None
) -> None:
    assert correction_of(TrainConfig(**options), rounds) == want


@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean-token-sum"])
def test_a_minibatch_divides_by_what_is_counted(tmp_path: Path, reduction: str) -> None:
    """The sum of a minibatch in two micro-batches, written out, at ratio 1; its gradient divides
    it by the tokens, or sequences, of the mask or of what is kept."""
    t = trainer(tmp_path, dtype=torch.float64, reduction=reduction, micro_batch=2, vf_coef=0.0)
    rollout, batch, plan = batch_of(t)
    g = torch.Generator().manual_seed(0)
    noise = 0.3 * torch.randn(batch.scored.old.shape, generator=g, dtype=torch.float64)
    noise[plan[0][0][0]] = 3.0  # a sequence that is rejected whole
    rows, grads, divisors = torch.cat(plan[0]), [], []
    for count in ("all", "kept"):
        c = Correction(
            "token", high=1.2, reject={"token-ratio": (0.8, 1.3)}, drops="all", count=count
        )
        sampled = rollout._replace(logprobs=batch.scored.old + noise)
        made, told = corrected(batch, sampled, c, "auto")
        assert 0 < told["is_rejected"] < 1
        t.agent.discard()
        done = accumulate(t.agent, made, plan[0], 0.0, t.backend, unchanged=True)
        assert done is not None
        mask, ratio = batch.seqs.mask[rows], (-noise).exp()[rows]
        kept = mask & (ratio >= 0.8) & (ratio <= 1.3)
        advantages = ppo_fast.whiten(batch.advantages, moments=batch.moments)[rows]
        total = torch.where(kept, -advantages * ratio.clamp(max=1.2), 0.0).sum()
        entropy = t.config.entropy_coef * float(done.field("entropy"))
        assert float(done.field("loss")) == pytest.approx(float(total) - entropy, rel=1e-12)
        counted = mask if count == "all" else kept
        d = counted.sum() if reduction == "token-mean" else counted.any(1).sum()
        divisors.append(float(d))
        policy = [p for p in t.agent.modules["policy"].parameters() if p.grad is not None]
        grads.append(torch.cat([p.grad.flatten() for p in policy]))  # type: ignore[union-attr]
    assert divisors[0] > divisors[1]
    one, other = (grad * d for grad, d in zip(grads, divisors, strict=True))
    assert float((one - other).abs().max()) <= 1e-5 * float(one.abs().max())  # fp32 weights


def test_rejections_are_logged(tmp_path: Path) -> None:
    record = trainer(
        tmp_path, dtype=torch.float64, correction="sequence", reject=("seq-max-k2=9",)
    ).step()
    assert record["is_mean"] == pytest.approx(1.0, abs=1e-5) and record["is_rejected"] == 0.0
    assert "rollout_weight_mean" not in record


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"variant": "penalty", "ratio_level": "sequence"}, "ratio_level must be token with"),
        ({"ratio_cap": 2.0}, "ratio_cap must be absent with variant clip, got 2.0"),
        ({"variant": "sapo", "dual_clip": 3.0}, "dual_clip must be absent with variant sapo"),
        ({"reject": ("token-k9=1",)}, "reject must be as seq-mean-k1=.*got 'token-k9'"),
        ({"reject": ("token-k3",)}, "reject must be as seq-mean-k1=0.999:1.001"),
        ({"correction": "off", "correction_high": 2.0}, "correction must be on where a bound"),
        ({"correction": "none"}, "reject must be given with correction none"),
        (
            {
                "correction_ratio": "current",
                "correction_count": "kept",
                "reject": ("token-k3=1",),
            },
            "correction_count must be all with correction_ratio current, got kept",
        ),
        (
            {"correction": "none", "reject": ("token-k3=1",), "correction_high": 2.0},
            "correction_high must be absent with correction none, got 2.0",
        ),
        (
            {"correction_low": 3.0, "correction_high": 2.0},
            "correction_low must be at most correction_high, got 3.0",
        ),
    ],
    ids=str,
)
def test_options_that_do_not_go_together(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        TrainConfig(**options)


def test_a_former_name_goes_on_working(tmp_path: Path) -> None:
    """`--is-truncation`, and a former run's config.json."""
    for args in (
        ["--is-truncation", "1.5"],
        ["--is-truncation=1.5"],
        ["--correction-high", "1.5"],
    ):
        assert parse(args).correction_high == 1.5
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"is_truncation": 1.5, "reject": ["token-k3=1"], "stop": []}))
    assert arguments(path) == ["--correction-high=1.5", "--reject", "token-k3=1"]
    config = parse(["--config", str(path)])
    assert (config.correction_high, config.reject) == (1.5, ("token-k3=1",))
