"""TRL's GRPOTrainer: twelve steps on ppo_fast against twelve of its own; every loss."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pages
import pytest
import tiny
import torch
from edited import edit
from torch import Tensor
from trainers import needs

needs("trl_grpo")

import trl_grpo_run
from trainer_sides_helpers import prepared, updates
from transformers import GPT2LMHeadModel
from trl.trainer import grpo_trainer, utils

import ppo_fast
from benchmarks.loop.equal_work import Work, differences
from ppo_fast import integrations, testing
from ppo_fast.integrations import trl_grpo
from ppo_fast.integrations._grpo import two_sided

TIMES = ("step_time", "epoch")
ROWS, LENGTH = 5, 9
FUSED_HEAD = "linear_logprobs" in {
    one.swap.op for one in trl_grpo.integration.present(("linear_logprobs",))
}
from_1_15 = pytest.mark.skipif(not FUSED_HEAD, reason="TRL forms no logits from 1.15")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.0},
        {"loss_type": "bnpo", "delta": 1.1},
        {"loss_type": "dr_grpo", "use_bias_correction_kl": False},
        {"loss_type": "luspo", "importance_sampling_level": "sequence"},
        {"loss_type": "cispo", "epsilon_high": 2.0},
        {"loss_type": "sapo"},
        {"loss_type": "vespo", "off_policy_mask_threshold": 0.5},
    ],
    ids=["dapo", "grpo", "bnpo", "dr_grpo", "luspo", "cispo", "sapo", "vespo"],
)
def test_a_run_is_the_same(options: dict[str, Any]) -> None:
    theirs = trl_grpo_run.run(**options)
    with trl_grpo.patched() as calls:
        ours = trl_grpo_run.run(**options)
    tiny.assert_same_run(ours, theirs, 12, TIMES)
    assert calls["loss"].fused == 24  # 12 steps of 2 micro-batches
    assert calls["linear_logprobs" if FUSED_HEAD else "logprobs"].fused >= 24
    assert not any(n.left for n in calls.values())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A real trainer, whose options the tests below set."""
    trainer = trl_grpo_run.trainer(str(tmp_path_factory.mktemp("grpo")))
    trainer.current_gradient_accumulation_steps = 2
    trainer.accelerator.gradient_state._set_sync_gradients(True)
    trainer.args.sapo_temperature_neg = 1.25  # TRL rounds it to fp32, whatever its tensors are
    yield trainer


def batch(per_token: bool = False) -> dict[str, Any]:
    """Rows padded, with a tool's answer in the middle, of one token and of none."""
    torch.manual_seed(0)
    mask, tools = torch.ones(2, ROWS, LENGTH, dtype=torch.int64)
    mask[0, 5:], mask[2, 1:], mask[3] = 0, 0, 0
    tools[1, 3:6] = 0
    shape = (ROWS, LENGTH) if per_token else (ROWS,)
    return {
        "prompt_ids": torch.ones(ROWS, 2, dtype=torch.int64),
        "prompt_mask": torch.ones(ROWS, 2, dtype=torch.int64),
        "completion_ids": torch.ones(ROWS, LENGTH, dtype=torch.int64),
        "completion_mask": mask,
        "tool_mask": tools,
        "advantages": torch.randn(shape, dtype=torch.float64),
        "old_per_token_logps": torch.randn(ROWS, LENGTH, dtype=torch.float64) - 3,
        "ref_per_token_logps": torch.randn(ROWS, LENGTH, dtype=torch.float64) - 3,
        "num_items_in_batch": torch.tensor(31.0),
    }


def ratios(columns: int) -> Tensor:
    """Importance ratios as TRL makes them: some 0 ("mask"), 1 where masked."""
    torch.manual_seed(2)
    found = (torch.randn(ROWS, columns, dtype=torch.float64) / 4).exp()
    found[found > 1.2] = 0.0
    inputs = batch()
    live = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
    return torch.where(live if columns > 1 else live.any(1, keepdim=True), found, 1.0)


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


def set_options(made: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Options of the trainer, which has some of them itself and the others in its arguments."""
    for name, value in options.items():
        monkeypatch.setattr(made if hasattr(made, name) else made.args, name, value)


def condition(inputs: dict[str, Any]) -> float:
    """The largest a token's term can be: ratios, weights, advantages and estimates multiplied."""
    old, ref = inputs.get("old_per_token_logps"), inputs["ref_per_token_logps"]
    torch.manual_seed(1)
    logps = torch.randn(ROWS, LENGTH, dtype=torch.float64) - 3  # loss_of's
    ratio = 1.0 if old is None else float((logps - old).exp().max())
    k3 = float((ref - logps).exp().max()) + float((ref - logps).abs().max())
    weights = inputs.get("importance_sampling_ratio", torch.ones(()))
    size = float(inputs["advantages"].abs().max()) * max(1.0, float(weights.max()))
    return max(1.0, ratio) * (size * float(logps.abs().max()) + k3)


def assert_same_losses(made: Any, monkeypatch: pytest.MonkeyPatch, cases: list[Any]) -> None:
    """Loss, gradient and log of every (options, inputs), patched, against TRL's own; fp64."""
    theirs = []
    for options, inputs in cases:
        set_options(made, monkeypatch, **options)
        theirs.append(loss_of(made, inputs))
    with trl_grpo.patched(("loss",)) as calls:
        for (options, inputs), want in zip(cases, theirs, strict=True):
            set_options(made, monkeypatch, **options)
            got = loss_of(made, inputs)
            for a, b in zip(got[:2], want[:2], strict=True):
                testing.assert_within_budget(
                    a.double(),
                    b,
                    condition=condition(inputs),
                    ops=40 * ROWS * LENGTH,
                    name=str(options),
                )
            assert got[2].keys() == want[2].keys()
            for name, value in want[2].items():
                same = pytest.approx(value, rel=1e-6, abs=1e-9, nan_ok=True)
                assert got[2][name] == same, (name, options)
    assert (calls["loss"].fused, calls["loss"].left) == (len(cases), 0)


CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
LOSSES = (*CLIPPED, "cispo", "sapo", "vespo")
CLIPS = [{"epsilon_high": 0.3, "delta": delta} for delta in (None, 4.0, 1.1, 0.7)]
# cispo's epsilon_high is the bound itself; delta and it are nothing to the last two.
OTHER_CLIPS = [{"epsilon_high": high, "delta": 1.1} for high in (2.0, 0.8)]
KL = {
    "no KL": {"beta": 0.0},
    "KL": {"beta": 0.3, "use_bias_correction_kl": False},
    "corrected KL": {"beta": 0.3, "use_bias_correction_kl": True},
}


@pytest.mark.parametrize("kl", KL)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss(
    made: Any, monkeypatch: pytest.MonkeyPatch, loss_type: str, level: str, kl: str
) -> None:
    """Two-sided clip, off-policy mask and vLLM's ratios; advantages per sequence and per token."""
    fixed = {
        "loss_type": loss_type,
        "importance_sampling_level": level,
        "vllm_importance_sampling_correction": True,
        **KL[kl],
    }
    cases = []
    clips = CLIPS if loss_type in CLIPPED else OTHER_CLIPS
    for clip, threshold, columns in itertools.product(clips, (None, 0.1), (0, LENGTH, 1)):
        inputs = batch(per_token=len(cases) % 2 == 1)
        if columns:
            inputs["importance_sampling_ratio"] = ratios(columns)
        options = {"off_policy_mask_threshold": threshold, "use_vllm": columns > 0}
        cases.append(({**fixed, **clip, **options}, inputs))
    assert_same_losses(made, monkeypatch, cases)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_entropy_mask(
    made: Any, monkeypatch: pytest.MonkeyPatch, loss_type: str, level: str
) -> None:
    """With the off-policy mask and vLLM's ratios, which vespo has in its sequence's weight."""
    options = {
        "loss_type": loss_type,
        "importance_sampling_level": level,
        "top_entropy_quantile": 0.4,
        "use_vllm": True,
        "vllm_importance_sampling_correction": True,
        "off_policy_mask_threshold": 0.1,
    }
    inputs = {**batch(), "importance_sampling_ratio": ratios(LENGTH)}
    assert_same_losses(made, monkeypatch, [(options, inputs)])


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_ratio_one(made: Any, monkeypatch: pytest.MonkeyPatch, loss_type: str, level: str) -> None:
    """No log-probabilities of the old policy: every ratio is on the bounds of some options."""
    fixed = {"loss_type": loss_type, "importance_sampling_level": level}
    inputs = batch()
    del inputs["old_per_token_logps"]
    highs = (1.0, 0.9) if loss_type == "cispo" else (0.3, 0.0)
    clips: list[dict[str, Any]] = [
        {"epsilon_high": high, "delta": delta}
        for high, delta in itertools.product(highs, (None, 2.0, 1.0, 0.9))
    ]
    clips += [{"epsilon_high": 0.3, "epsilon_low": 1.5, "delta": None}]
    assert_same_losses(made, monkeypatch, [({**fixed, **clip}, inputs) for clip in clips])


def test_two_sided_clip_beside_a_ratio_that_overflows() -> None:
    """δ below 1, by hand: the bound and no slope, where inf·0 would be NaN."""
    gaps, adv = [400.0, 800.0, 800.0, -800.0, 0.1, 0.1], [1.0, 1.0, -1.0, 1.0, -2.0, 0.0]
    logprobs = torch.full((1, 6), -1.0, dtype=torch.float64, requires_grad=True)
    old = logprobs.detach() - torch.tensor([gaps], dtype=torch.float64)
    held = partial(two_sided, (0.8, 0.7, 1.3))
    for backend in ("cpu", "reference"):
        loss = ppo_fast.ppo_loss(
            logprobs,
            old,
            torch.tensor([adv], dtype=torch.float64),
            variant=ppo_fast.Surrogate(held),
            log_ratio_clamp=None,
            reduction="token-sum",
            backend=backend,
        ).loss
        (slope,) = torch.autograd.grad(loss, logprobs)
        want = [0.0, 0.0, 0.0, 0.0, 2.0 * math.exp(0.1), 0.0]
        testing.assert_within_budget(
            slope, torch.tensor([want], dtype=torch.float64), condition=3.0, ops=10
        )
        exact = -0.7 - 0.7 + 1.3 + 2.0 * math.exp(0.1)
        testing.assert_within_budget(
            loss.detach(), torch.tensor(exact, dtype=torch.float64), condition=6.0, ops=20
        )


def test_vespo_is_the_surrogate_of_that_name(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`surrogates.vespo`, with vLLM's ratios as weights, has TRL's loss and gradient."""
    shapes = {"vespo_k_pos": 1.5, "vespo_lambda_pos": 2.0, "vespo_k_neg": 2.5}
    set_options(made, monkeypatch, loss_type="vespo", beta=0.0, vespo_lambda_neg=1.0, **shapes)
    inputs = {**batch(), "importance_sampling_ratio": ratios(LENGTH)}
    set_options(made, monkeypatch, entropy_coef=0.0)
    want = loss_of(made, inputs)
    torch.manual_seed(1)
    logps = (torch.randn(ROWS, LENGTH, dtype=torch.float64) - 3).requires_grad_()
    items = 31.0 * made.current_gradient_accumulation_steps / made.args.steps_per_generation
    for backend in ("cpu", "reference"):
        loss = ppo_fast.ppo_loss(
            logps,
            inputs["old_per_token_logps"],
            inputs["advantages"][:, None],
            inputs["completion_mask"] * inputs["tool_mask"],
            variant=ppo_fast.surrogates.vespo((1.5, 2.5), (2.0, 1.0)),
            is_weights=inputs["importance_sampling_ratio"],
            log_ratio_clamp=None,
            denom=items,
            backend=backend,
        ).loss
        found = (loss.detach(), *torch.autograd.grad(loss, logps))
        for a, b in zip(found, want[:2], strict=True):
            testing.assert_within_budget(a, b, condition=condition(inputs), ops=40 * ROWS * LENGTH)


@pytest.mark.parametrize("name", ["loss_type", "importance_sampling_level"])
def test_what_trl_does_not_know(made: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """TRL's own error, also where the first call was of a known one."""
    with (
        pytest.raises(ValueError, match=r"Unknown .*: other"),
        pytest.warns(RuntimeWarning, match=f"{name} 'other'"),
        trl_grpo.patched(("loss",)),
    ):
        loss_of(made, batch())
        monkeypatch.setattr(made, name, "other")
        loss_of(made, batch())


HEADS = {
    "plain": {"scale": 1.0, "cap": None, "bias": False},
    "scaled": {"scale": 0.25, "cap": None, "bias": True},
    "capped": {"scale": 2.0, "cap": 5.0, "bias": True},
}


@from_1_15
@pytest.mark.parametrize("head", HEADS)
def test_the_head(head: str) -> None:
    """logit_scale, softcap, bias and temperature; entropy or none. fp32, TRL's own precision."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

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
    """The functions that TRL's experimental trainers call by name, and GRPO before 1.15."""
    torch.manual_seed(0)
    logits, index = torch.randn(3, 5, 11), torch.randint(11, (3, 5))
    mask = torch.tensor([1, 0, 1, 1, 0]).expand(3, 5)
    calls_of = [lambda: [utils.entropy_from_logits(logits)]]
    if hasattr(utils, "selective_log_softmax_and_entropy"):  # from 1.14, with a temperature
        calls_of += [
            lambda: [utils.selective_log_softmax(logits, index, 0.7, mask)],
            lambda: utils.selective_log_softmax_and_entropy(logits, index, temperature=0.7),
        ]
    else:
        calls_of += [lambda: [utils.selective_log_softmax(logits, index)]]
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
    loss = grpo_trainer.GRPOTrainer._compute_loss
    with pytest.raises(integrations.ForeignPatchError, match=r"own any more.*liger_kernel"):
        trl_grpo.apply(("loss", "logprobs"))
    assert grpo_trainer.GRPOTrainer._compute_loss is loss and not trl_grpo.integration.calls


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("log_ratio = per_token", "# of the sampled token\n    log_ratio = per_token"),
        ("Unknown loss type: ", "There is no loss "),
        ("# Two-sided clipping", "logger.info('two-sided clipping')"),
        (
            "self.off_policy_mask_threshold is not None:",
            "(self.off_policy_mask_threshold is not None):",
        ),
    ],
)
def test_a_harmless_change_of_trl_is_known(
    monkeypatch: pytest.MonkeyPatch, made: Any, old: str, new: str
) -> None:
    edit(monkeypatch, grpo_trainer.GRPOTrainer, "_compute_loss", old, new)
    with trl_grpo.patched(("loss",)) as calls:
        loss_of(made, batch())
    assert calls["loss"].fused == 1


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("1 - self.epsilon_low", "1 / (1 + self.epsilon_low)", r"`coef_2 = torch.clamp\("),
        (") - 1\n        )", "))", r"`per_token_kl = "),
        ("per_token_loss = per_token_loss * off_policy_mask", "pass", r": `pass`"),
        (
            "coef_1 = torch.exp(log",
            "log_ratio = log_ratio * 1\n    coef_1 = torch.exp(log",
            r"`log_ratio = log_ratio \* 1`",
        ),
        ("log_ratio = per_token_logps -", "log_ratio = entropies -", r"it takes `entropies`"),
    ],
)
def test_a_changed_statement_of_trl_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, old: str, new: str, what: str
) -> None:
    edit(monkeypatch, grpo_trainer.GRPOTrainer, "_compute_loss", old, new)
    before = grpo_trainer.GRPOTrainer._compute_loss
    with pytest.raises(integrations.UnknownSourceError, match=rf"_compute_loss: .*{what}"):
        trl_grpo.apply(("loss",))
    assert grpo_trainer.GRPOTrainer._compute_loss is before


def test_it_does_the_work_of_the_loop_in_the_benchmark(tmp_path: Path) -> None:
    work = Work("grpo", 4, 3, group=2, epochs=2, minibatches=2, micro_batch=2, kl_coef=0.04)
    folder = prepared(tmp_path)
    theirs, ours = (updates(side, work, folder, 3) for side in ("trl-grpo", "ppo_fast"))
    for own, other in zip(ours, theirs, strict=True):
        assert differences(own.counts, other.counts) == []
        assert other.counts.trained_tokens == 2 * 8 * 3 and other.counts.value_tokens == 0
        assert other.counts.logprobs == 2 * 8 * 3 and other.counts.optimizer_steps == 4
        assert min(other.phases.values()) > 0 and 0.0 <= other.reward <= 1.0


def test_the_quick_start_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script of docs/quickstart/trainers.md, with a small model in the place of the hub's."""
    GPT2LMHeadModel(tiny.config(tiny.WORDS)).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    code = pages.block("quickstart/trainers.md", "GRPOTrainer(")
    hub, scope = "HuggingFaceTB/SmolLM2-135M-Instruct", {}
    assert code.count(hub) == 1
    exec(code.replace(hub, str(tmp_path)), scope)
    assert scope["calls"]["loss"].fused == 2
    assert not any(n.left for n in scope["calls"].values())
