"""TRL 1.16's GRPOTrainer: twelve steps on ppo_fast against twelve of its own; every loss."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from trainers import needs

needs("trl", "1.16")

import trl_grpo_run
from trainer_sides_helpers import prepared, updates
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer import utils

from benchmarks.loop.equal_work import Work, differences
from ppo_fast import integrations, testing
from ppo_fast.integrations import trl_grpo

TIMES = ("step_time", "epoch")
ROWS, LENGTH = 4, 9


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.0},
        {"loss_type": "cispo", "epsilon_high": 2.0},
    ],
    ids=["defaults", "sequence", "cispo"],
)
def test_a_run_is_the_same(options: dict[str, Any]) -> None:
    theirs = trl_grpo_run.run(**options)
    with trl_grpo.patched() as calls:
        ours = trl_grpo_run.run(**options)
    tiny.assert_same_run(ours, theirs, 12, TIMES)
    assert calls["loss"].fused == 24  # 12 steps of 2 micro-batches
    assert calls["linear_logprobs"].fused >= 24
    assert not any(n.left for n in calls.values())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A real trainer, whose options the tests below set."""
    trainer = trl_grpo_run.trainer(str(tmp_path_factory.mktemp("grpo")))
    trainer.current_gradient_accumulation_steps = 2
    trainer.accelerator.gradient_state._set_sync_gradients(True)
    yield trainer


def batch(per_token: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    mask = torch.ones(ROWS, LENGTH, dtype=torch.int64)
    mask[0, 5:], mask[2, 1:] = 0, 0
    shape = (ROWS, LENGTH) if per_token else (ROWS,)
    return {
        "prompt_ids": torch.ones(ROWS, 2, dtype=torch.int64),
        "prompt_mask": torch.ones(ROWS, 2, dtype=torch.int64),
        "completion_ids": torch.ones(ROWS, LENGTH, dtype=torch.int64),
        "completion_mask": mask,
        "advantages": torch.randn(shape, dtype=torch.float64),
        "old_per_token_logps": torch.randn(ROWS, LENGTH, dtype=torch.float64) - 3,
        "ref_per_token_logps": torch.randn(ROWS, LENGTH, dtype=torch.float64) - 3,
        "num_items_in_batch": torch.tensor(31.0),
    }


def loss_of(trainer: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The loss, its gradient and what the trainer logged, for log-probs made up here."""
    torch.manual_seed(1)
    logps = (torch.randn(ROWS, LENGTH, dtype=torch.float64) - 3).requires_grad_()
    entropy = torch.rand(ROWS, LENGTH, dtype=torch.float64).requires_grad_()
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logps, entropy, None)
    trainer._metrics["train"].clear()
    trainer.model.train()
    loss = trainer._compute_loss(trainer.model, dict(inputs))
    del trainer._get_per_token_logps_and_entropies
    (gradient,) = torch.autograd.grad(loss, logps)
    return loss.detach(), gradient, {k: v[-1] for k, v in trainer._metrics["train"].items()}


LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo")


# By sequence neither cispo nor a corrected KL is covered: test_what_is_left_to_trl has them.
COVERED = [
    (loss, level, kl)
    for loss, level, kl in itertools.product(
        LOSSES, ("token", "sequence"), ((0.0, False), (0.3, False), (0.3, True))
    )
    if level == "token" or (loss != "cispo" and not kl[1])
]


@pytest.mark.parametrize(("loss_type", "level", "kl"), COVERED)
def test_every_loss(
    made: Any,
    monkeypatch: pytest.MonkeyPatch,
    loss_type: str,
    level: str,
    kl: tuple[float, bool],
) -> None:
    """All reductions, both ratios, with and without KL and the two-sided clip; fp64."""
    beta, corrected = kl
    monkeypatch.setattr(made.args, "use_bias_correction_kl", corrected)
    for delta, per_token in itertools.product((None, 4.0), (False, level == "token")):
        monkeypatch.setattr(made, "loss_type", loss_type)
        monkeypatch.setattr(made, "importance_sampling_level", level)
        monkeypatch.setattr(made, "beta", beta)
        monkeypatch.setattr(made, "epsilon_high", 2.0 if loss_type == "cispo" else 0.3)
        monkeypatch.setattr(made.args, "delta", delta)
        inputs = batch(per_token)
        theirs = loss_of(made, inputs)
        with trl_grpo.patched(("loss",)) as calls:
            ours = loss_of(made, inputs)
        assert (calls["loss"].fused, calls["loss"].left) == (1, 0)
        size = float(inputs["advantages"].abs().max()) * 400 + 400  # e^6, a ratio's most
        for a, b in zip(ours[:2], theirs[:2], strict=True):
            testing.assert_within_budget(a.double(), b, condition=size, ops=40 * ROWS * LENGTH)
        assert ours[2].keys() == theirs[2].keys()
        for name, value in theirs[2].items():
            assert ours[2][name] == pytest.approx(value, rel=1e-6, abs=1e-9, nan_ok=True), name


def test_entropy_mask_and_off_policy_mask(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(made, "top_entropy_quantile", 0.4)
    monkeypatch.setattr(made, "off_policy_mask_threshold", 0.1)
    inputs = batch(False)
    theirs = loss_of(made, inputs)
    with trl_grpo.patched(("loss",)) as calls:
        ours = loss_of(made, inputs)
    assert (calls["loss"].fused, calls["loss"].left) == (1, 0)
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        testing.assert_within_budget(a.double(), b, condition=800.0, ops=40 * ROWS * LENGTH)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"loss_type": "sapo"}, "loss_type 'sapo'"),
        ({"loss_type": "vespo"}, "loss_type 'vespo'"),
        ({"loss_type": "cispo", "importance_sampling_level": "sequence"}, "cispo with"),
        ({"importance_sampling_level": "sequence", "top_entropy_quantile": 0.4}, "per token"),
        ({"delta": 1.1}, "delta 1.1 within epsilon_high"),
        ({"importance_sampling_level": "sequence"}, "use_bias_correction_kl beside"),
    ],
)
def test_what_is_left_to_trl(
    made: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], why: str
) -> None:
    for name, value in options.items():
        monkeypatch.setattr(made if hasattr(made, name) else made.args, name, value)
    inputs = batch(False)
    theirs = loss_of(made, inputs)
    with pytest.warns(RuntimeWarning, match=why), trl_grpo.patched(("loss",)) as calls:
        ours = loss_of(made, inputs)
    assert (calls["loss"].fused, calls["loss"].left) == (0, 1)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


HEADS = {
    "plain": {"scale": 1.0, "cap": None, "bias": False},
    "scaled": {"scale": 0.25, "cap": None, "bias": True},
    "capped": {"scale": 2.0, "cap": 5.0, "bias": True},
}


@pytest.mark.parametrize("head", HEADS)
def test_the_head(head: str) -> None:
    """logit_scale, softcap, bias and temperature; entropy or none. fp32, TRL's own precision."""
    torch.manual_seed(0)
    options, (n, h, v) = HEADS[head], (50, 16, 101)
    hidden, weight = torch.randn(n, h, requires_grad=True), torch.randn(v, h, requires_grad=True)
    bias = torch.randn(v, requires_grad=True) if options["bias"] else None
    targets = torch.randint(v, (n,))
    leaves = [x for x in (hidden, weight, bias) if x is not None]

    def both(outputs: tuple[str, ...]) -> list[Tensor]:
        found = ChunkedLogProbFunction.apply(
            hidden, weight, bias, targets, 0.7, 40, options["cap"], options["scale"], outputs
        )
        given = [x for x in found if x is not None]
        total = sum((x * torch.arange(1.0, n + 1)).sum() for x in given)
        return [*given, *torch.autograd.grad(total, leaves)]

    for outputs in (("log_probs",), ("log_probs", "entropy")):
        theirs = both(outputs)
        with trl_grpo.patched(("linear_logprobs",)) as calls:
            ours = both(outputs)
        assert calls["linear_logprobs"].fused == 1 and len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            # A logit is a sum of H products up to |x||w|; its error goes through the weights n.
            size = float(b.detach().abs().max()) + 60.0
            testing.assert_within_budget(a.detach(), b.detach(), condition=size, ops=8 * (h + n))
    with (
        pytest.warns(RuntimeWarning, match="outputs .'is_top1'"),
        trl_grpo.patched(("linear_logprobs",)) as calls,
    ):
        top = ChunkedLogProbFunction.apply(
            hidden, weight, bias, targets, 0.7, 40, None, 1.0, ("log_probs", "is_top1")
        )
    assert calls["linear_logprobs"].left == 1 and top[4] is not None


def test_logits_on_request() -> None:
    """The functions that TRL's experimental trainers call by name."""
    torch.manual_seed(0)
    logits, index = torch.randn(3, 5, 11), torch.randint(11, (3, 5))
    mask = torch.tensor([1, 0, 1, 1, 0]).expand(3, 5)
    calls_of = [
        lambda: [utils.selective_log_softmax(logits, index, 0.7, mask)],
        lambda: utils.selective_log_softmax_and_entropy(logits, index, temperature=0.7),
        lambda: [utils.entropy_from_logits(logits)],
    ]
    for call in calls_of:
        theirs = call()
        with trl_grpo.patched(("logprobs",)):
            ours = call()
        for a, b in zip(ours, theirs, strict=True):
            testing.assert_within_budget(a, b, condition=12.0, ops=4 * 11)


def test_another_librarys_patch_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    liger = pytest.importorskip("liger_kernel.ops.grpo_loss")
    monkeypatch.setattr(utils, "selective_log_softmax", liger.fused_selective_log_softmax)
    apply = ChunkedLogProbFunction.apply
    with pytest.raises(integrations.ForeignPatchError, match=r"own any more.*liger_kernel"):
        trl_grpo.apply(("linear_logprobs", "logprobs"))
    assert ChunkedLogProbFunction.apply == apply and not trl_grpo.integration.calls


def test_it_does_the_work_of_the_loop_in_the_benchmark(tmp_path: Path) -> None:
    work = Work("grpo", 4, 3, group=2, epochs=2, minibatches=2, micro_batch=2, kl_coef=0.04)
    folder = prepared(tmp_path)
    theirs, ours = (updates(side, work, folder, 3) for side in ("trl-grpo", "ppo_fast"))
    for own, other in zip(ours, theirs, strict=True):
        assert differences(own.counts, other.counts) == []
        assert other.counts.trained_tokens == 2 * 8 * 3 and other.counts.value_tokens == 0
        assert other.counts.logprobs == 2 * 8 * 3 and other.counts.optimizer_steps == 4
        assert min(other.phases.values()) > 0 and 0.0 <= other.reward <= 1.0
