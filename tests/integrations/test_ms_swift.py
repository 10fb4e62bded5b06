"""ms-swift's GRPOTrainer: real runs on ppo_fast against its own; every loss and option."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from trainers import needs

needs("ms_swift")

import ms_swift_run
from swift.rl_core.data import GRPOBatch
from swift.rlhf_trainers import grpo_trainer

from ppo_fast import integrations, testing
from ppo_fast.integrations import ms_swift

TIMES = ("step_time", "epoch", "elapsed_time", "remaining_time", "train_speed(s/it)")
ROWS, LENGTH = 6, 9


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_type": "bnpo", "importance_sampling_level": "sequence_token", "delta": 1.1},
        {"loss_type": "dapo", "top_entropy_quantile": 0.5},
        {"loss_type": "cispo", "epsilon_high": 2.0, "beta": 0.0},
        {"loss_type": "sapo", "importance_sampling_level": "sequence"},
        {"loss_type": "dr_grpo", "epsilon_high": 0.3, "scale_rewards": "batch"},
    ],
    ids=["grpo", "bnpo", "dapo", "cispo", "sapo", "dr_grpo"],
)
def test_a_run_is_the_same(options: dict[str, Any]) -> None:
    theirs = ms_swift_run.run(**options)
    with ms_swift.patched() as calls:
        ours = ms_swift_run.run(**options)
    tiny.assert_same_run(ours, theirs, 4, TIMES)
    assert calls["loss"].fused == 8  # 4 steps of 2 micro-batches
    assert calls["logprobs"].fused >= 8
    assert not any(n.left for n in calls.values())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A real trainer, whose options the tests below set."""
    trainer = ms_swift_run.trainer(str(tmp_path_factory.mktemp("grpo")))
    trainer.current_gradient_accumulation_steps = 2
    # True without a teacher too in 4.6.0, which then refuses real, FIPO and the off-policy mask.
    trainer._has_teacher = False
    trainer.model.train()
    yield trainer


def batch(**more: Any) -> GRPOBatch:
    """Rows padded, with a tool's answer in the middle, of one token and of none."""
    torch.manual_seed(0)
    mask = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    mask[0, 5:], mask[1, 3:6], mask[2, 1:], mask[3] = False, False, False, False
    old, ref, rollout = torch.randn(3, ROWS, LENGTH, dtype=torch.float64) - 3
    per_token = torch.randn(ROWS, LENGTH, dtype=torch.float64) / 4
    given = {
        "completion_mask": mask,
        "truncated_mask": torch.tensor([False] * (ROWS - 1) + [True]),
        "seq_lengths": mask.sum(-1),
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
        "rollout_per_token_logps": rollout,
        "advantages": torch.randn(ROWS, 1, dtype=torch.float64) + per_token,
        "num_items_in_batch": torch.tensor(31.0),
        "logits_to_keep": LENGTH,
    }
    return GRPOBatch(**{**given, **more})


def logps_and_entropies() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    logps = (torch.randn(ROWS, LENGTH, dtype=torch.float64) - 3).requires_grad_()
    return logps, torch.rand(ROWS, LENGTH, dtype=torch.float64).requires_grad_()


def loss_of(trainer: Any, given: GRPOBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The loss, its gradient and what is logged, for log-probs made up here."""
    logps, entropies = logps_and_entropies()
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logps, entropies)
    loss, logged = trainer._compute_loss_and_metrics(trainer.model, {}, given)
    del trainer._get_per_token_logps_and_entropies
    (gradient,) = torch.autograd.grad(loss, logps)
    return loss.detach(), gradient, dict(flat(logged))


def flat(x: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every number in nested dicts, with its path."""
    if isinstance(x, dict):
        for key, item in x.items():
            yield from flat(item, f"{path}/{key}")
    elif not isinstance(x, str):
        yield path, torch.as_tensor(x, dtype=torch.float64)


def set_options(made: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Options of the trainer, which has some of them itself, and of its arguments."""
    for name, value in options.items():
        for holder in (made, made.args):
            if hasattr(holder, name):
                monkeypatch.setattr(holder, name, value)


def condition(given: GRPOBatch) -> float:
    """The largest a token's term can be: ratios, weights, advantages and estimates multiplied."""
    logps = logps_and_entropies()[0].detach()
    old = given.old_per_token_logps
    ratio = 1.0 if old is None else float((logps - old).exp().max())
    k3 = float((given.ref_per_token_logps - logps).exp().max())
    k3 += float((given.ref_per_token_logps - logps).abs().max())
    rollout = given.rollout_per_token_logps
    corrected = old is not None and rollout is not None
    weight = float((old - rollout).exp().max()) if corrected else 1.0
    size = float(given.advantages.abs().max()) * float(logps.abs().max())
    # FIPO's influence is e to at most the sum of the log-ratios, unless it is clipped to 1.2.
    return max(1.0, weight) * max(1.0, ratio) * 1.2 * (size + k3)


Cases = list[tuple[dict[str, Any], GRPOBatch]]


def assert_same_losses(made: Any, monkeypatch: pytest.MonkeyPatch, cases: Cases) -> None:
    """Loss, gradient and log of every case, patched, against ms-swift's own; fp64."""
    theirs = []
    for options, given in cases:
        set_options(made, monkeypatch, **options)
        theirs.append(loss_of(made, given))
    with ms_swift.patched(("loss",)) as calls:
        for (options, given), want in zip(cases, theirs, strict=True):
            set_options(made, monkeypatch, **options)
            got = loss_of(made, given)
            for a, b in zip(got[:2], want[:2], strict=True):
                testing.assert_within_budget(
                    a.double(),
                    b,
                    condition=condition(given),
                    ops=40 * ROWS * LENGTH,
                    name=str(options),
                )
            assert got[2].keys() == want[2].keys()
            for name, value in want[2].items():
                close = torch.allclose(got[2][name], value, rtol=1e-6, atol=1e-9, equal_nan=True)
                assert close, (name, options, got[2][name], value)
    assert (calls["loss"].fused, calls["loss"].left) == (len(cases), 0)


CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "fipo")
LOSSES = (*CLIPPED, "cispo", "sapo")
LEVELS = ("token", "sequence", "sequence_token")
CLIPS = [{"epsilon_high": 0.3, "delta": delta} for delta in (None, 4.0, 1.1, 0.7)]
# cispo's epsilon_high is the bound itself; delta and it are nothing to sapo.
OTHER_CLIPS = [{"epsilon_high": high, "delta": 1.1} for high in (2.0, 0.8)]
MODES = (None, "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss(
    made: Any, monkeypatch: pytest.MonkeyPatch, loss_type: str, level: str, beta: float
) -> None:
    """Two-sided clip, off-policy mask and every rollout correction; the ratio exactly 1 too."""
    fixed = {
        "loss_type": loss_type,
        "importance_sampling_level": level,
        "beta": beta,
        "rollout_importance_sampling_threshold": 1.3,
        "fipo_clip_range": 0.2,
    }
    cases = []
    clips = CLIPS if loss_type in CLIPPED else OTHER_CLIPS
    for clip, mode, threshold in itertools.product(clips, MODES, (None, 0.1)):
        chosen = {
            "rollout_importance_sampling_mode": mode,
            "off_policy_sequence_mask_delta": threshold,
        }
        cases.append(({**fixed, **clip, **chosen}, batch()))
    cases += [({**fixed, **clip}, batch(old_per_token_logps=None)) for clip in clips]
    assert_same_losses(made, monkeypatch, cases)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_masks(made: Any, monkeypatch: pytest.MonkeyPatch, loss_type: str, level: str) -> None:
    """Of entropy, of overlong completions, and both with a rollout correction's."""
    fixed = {
        "loss_type": loss_type,
        "importance_sampling_level": level,
        "beta": 0.3,
        "compute_entropy": True,
        "fipo_clip_range": 0.2,
        "rollout_importance_sampling_threshold": 1.3,
    }
    named = ("rollout_importance_sampling_mode", "log_rollout_offpolicy_metrics", "kl_in_reward")
    ways = (("token_mask", False, False), (None, True, False), (None, False, True))
    cases = [
        (
            {
                **fixed,
                "top_entropy_quantile": quantile,
                "overlong_filter": overlong,
                **dict(zip(named, way, strict=True)),
            },
            given,
        )
        for quantile, overlong in itertools.product((1.0, 0.4), (False, True))
        for way in ways
        for given in (batch(), batch(rollout_per_token_logps=None))
    ]
    assert_same_losses(made, monkeypatch, cases)


def test_fipo_without_a_clip(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = {"loss_type": "fipo", "beta": 0.0, "fipo_clip_range": None}
    near = batch(old_per_token_logps=logps_and_entropies()[0].detach() - 0.05)
    cases = [({**fixed, "fipo_safety_threshold": x}, near) for x in (None, 1.02)]
    assert_same_losses(made, monkeypatch, cases)


def test_what_is_left_to_ms_swift(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss "real", and ms-swift's own errors, with one warning each."""
    real = {"loss_type": "real", "num_generations": 3, "beta": 0.3}
    set_options(made, monkeypatch, **real)
    theirs = loss_of(made, batch())
    with (
        pytest.warns(RuntimeWarning, match="left to ms-swift: loss_type 'real'") as warned,
        ms_swift.patched(("loss",)) as calls,
    ):
        ours = [loss_of(made, batch()) for _ in range(2)][1]
    assert len([w for w in warned if "left to" in str(w.message)]) == 1
    assert (calls["loss"].fused, calls["loss"].left) == (0, 2)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize(
    ("options", "error", "what"),
    [
        ({"loss_type": "other"}, UnboundLocalError, "per_token_loss"),
        ({"importance_sampling_level": "other"}, ValueError, "Unknown .* level: other"),
        ({"_has_teacher": True, "loss_type": "fipo"}, ValueError, "not support loss_type='fipo'"),
    ],
)
def test_errors_are_ms_swifts_own(
    made: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], error: Any, what: str
) -> None:
    """Also where the first call was of a known option."""
    with (
        pytest.raises(error, match=what),
        pytest.warns(RuntimeWarning, match="left to ms-swift"),
        ms_swift.patched(("loss",)),
    ):
        loss_of(made, batch())
        set_options(made, monkeypatch, **options)
        loss_of(made, batch())


@pytest.mark.parametrize("compute_entropy", [False, True])
@pytest.mark.parametrize("padding_free", [False, True])
def test_logprobs(
    made: Any, monkeypatch: pytest.MonkeyPatch, padding_free: bool, compute_entropy: bool
) -> None:
    """Of logits that a model gives, padded or in one row; more tokens than are compared first."""
    rows, kept, words = (1 if padding_free else 3), 70, 11
    monkeypatch.setattr(made.template, "padding_free", padding_free)
    monkeypatch.setattr(made, "temperature", 0.7)
    torch.manual_seed(0)
    given = torch.randn(rows, kept + 4, words, requires_grad=True)
    ids = torch.randint(words, (rows, kept + 4))

    def both() -> list[Tensor]:
        def model(**_: Any) -> Any:
            return SimpleNamespace(logits=given * 1.0)

        found = made._get_logps_via_local_forward(model, {}, kept, ids, compute_entropy)
        assert (found[1] is not None) == compute_entropy
        live = [x for x in found if x is not None]
        total = sum((x * torch.arange(1.0, kept + 1)).sum() for x in live)
        return [*live, *torch.autograd.grad(total, given)]

    theirs = both()
    with ms_swift.patched(("logprobs",)) as calls:
        ours = both()
    assert (calls["logprobs"].fused, calls["logprobs"].left) == (1, 0)
    for a, b in zip(ours, theirs, strict=True):
        # The weights go up to `kept`; a log-probability is a few nats.
        testing.assert_within_budget(a.detach(), b.detach(), condition=12.0 * kept, ops=4 * words)


def test_logprobs_of_one_ranks_part(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequence parallelism around one rank: ms-swift's function, with its ranks stood in for."""
    words, kept = 11, 6
    torch.manual_seed(0)
    logits, ids = torch.randn(2, kept + 3, words), torch.randint(words, (2, kept + 3))
    parallel = SimpleNamespace(
        prepare_inputs=lambda inputs: None,
        real_position_ids=None,
        pad_and_split_inputs=lambda *given, **_: (None, None, given[2].roll(-1, 1), *[None] * 4),
    )
    gather = SimpleNamespace(apply=lambda x, labels, dim, positions: (x, labels))
    monkeypatch.setattr(grpo_trainer, "sequence_parallel", parallel)
    monkeypatch.setattr(grpo_trainer, "GatherLoss", gather)

    def both() -> Any:
        def model(**_: Any) -> Any:
            return SimpleNamespace(logits=logits)

        return made._get_logps_via_sp(model, {}, batch(), kept, ids, True)

    theirs = both()
    with ms_swift.patched(("logprobs",)) as calls:
        ours = both()
    assert calls["logprobs"].fused == 1
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == (2, kept)
        testing.assert_within_budget(a, b, condition=12.0, ops=4 * words)


def test_places() -> None:
    """Every place is in ms-swift's own trainer, and is put back."""
    before = dict(vars(grpo_trainer.GRPOTrainer))
    places = ms_swift.apply()
    with pytest.raises(integrations.NeverReachedError, match="logprobs, loss"):
        ms_swift.revert()
    trainer = "swift.rlhf_trainers.grpo_trainer.GRPOTrainer"
    names = ("_get_logps_via_local_forward", "_get_logps_via_sp", "_compute_loss_and_metrics")
    assert places == [f"{trainer}.{name}" for name in names]
    assert dict(vars(grpo_trainer.GRPOTrainer)) == before
