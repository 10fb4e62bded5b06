"""The optimisation phase: exact first ratio, split invariance, dropped samples, backends."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_helpers import batch_of, gradients, trainer, weights

from ppo_fast.loop.data.experience import Batch, make_plan
from ppo_fast.loop.data.sequences import Scores
from ppo_fast.loop.run import Trainer
from ppo_fast.loop.score import score
from ppo_fast.loop.update import Ahead, Forward, accumulate, forward, update

# fp64 sums in another order: 2**-53 times terms and condition number below 1e4, per unit.
FP64 = 1e-12


def gradient_of(t: Trainer, batch: Batch, minibatch: list[torch.Tensor]) -> list[torch.Tensor]:
    t.agent.optimizer.zero_grad()
    assert accumulate(t.agent, batch, minibatch, t.loss_kl_coef, t.backend) is not None
    return gradients(t)


def assert_near(a: list[torch.Tensor], b: list[torch.Tensor], share: float) -> None:
    """Equal up to `share` of the largest entry of all."""
    assert len(a) == len(b) > 0
    largest = max(float(x.abs().max()) for x in a)
    assert largest > 0
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=share * largest)


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("head", ["linear", "logits"])
@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_first_minibatch_has_ratio_exactly_one(
    tmp_path: Path, micro_batch: int, head: str, critic: str
) -> None:
    t = trainer(tmp_path, micro_batch=micro_batch, head=head, critic=critic, temperature=0.7)
    _, batch, plan = batch_of(t)
    assert [len(part) for part in plan[0]] == [1] * 4 if micro_batch == 1 else plan
    stats = accumulate(t.agent, batch, plan[0], 0.0, t.backend, unchanged=True)
    assert stats is not None
    computed = stats.compute()
    assert computed["ratio_min"] == computed["ratio_max"] == 1.0
    assert computed["kl_k2"] == 0.0 and computed["n_tokens"] > 0


@pytest.mark.parametrize("variant", ["clip", "gspo", "penalty"])
def test_both_heads_have_one_gradient(tmp_path: Path, variant: str) -> None:
    found = []
    for head in ("linear", "logits"):
        t = trainer(
            tmp_path,
            dtype=torch.float64,
            head=head,
            variant=variant,
            train_layers=0,
            entropy_coef=0.01,
        )
        _, batch, plan = batch_of(t)
        found.append(gradient_of(t, batch, plan[0]))
    assert_near(*found, share=FP64)


def test_a_ratio_off_one_by_one_ulp_stops_the_update(tmp_path: Path) -> None:
    t = trainer(tmp_path)
    _, batch, plan = batch_of(t)
    old = batch.scored.old
    old[:, 0] = torch.nextafter(old[:, 0], torch.tensor(0.0))
    before = weights(t)
    with pytest.raises(RuntimeError, match="must equal the old ones before the first"):
        update(t.agent, batch, plan, 0.0, t.shuffling, t.backend)
    assert all(map(torch.equal, before, weights(t)))


@pytest.mark.parametrize("variant", ["clip", "gspo", "cispo", "penalty", "linear"])
def test_gradient_does_not_depend_on_the_micro_batch_split(tmp_path: Path, variant: str) -> None:
    t = trainer(tmp_path, dtype=torch.float64, variant=variant, entropy_coef=0.1)
    _, batch, _ = batch_of(t)
    batch.scored.old.add_(0.1 * torch.randn_like(batch.scored.old))  # ratios away from 1
    rows = torch.arange(8)
    whole = gradient_of(t, batch, [rows])
    for size in (1, 3, 4):
        assert_near(whole, gradient_of(t, batch, list(rows.split(size))), FP64)


@pytest.mark.case("R3")
def test_a_dropped_sample_leaves_the_others_as_if_it_had_not_been(tmp_path: Path) -> None:
    t = trainer(tmp_path, dtype=torch.float64)
    values = [0.1 * i for i in range(8)]
    state = t.sampler.generator.get_state()
    _, dropped, _ = batch_of(t, Scores([*values[:3], 0.0, *values[4:]], {3: "no reward"}))
    t.sampler.generator.set_state(state)
    others = torch.tensor([0, 1, 2, 4, 5, 6, 7])
    batch = dropped._replace(
        seqs=dropped.seqs.rows(others),
        scored=dropped.scored.rows(others),
        advantages=dropped.advantages[others],
        returns=dropped.returns[others],
    )
    assert float(dropped.moments.values[0]) == float(batch.seqs.mask.sum())
    assert not dropped.seqs.mask[3].any() and dropped.advantages[3].eq(0).all()
    with_hole = gradient_of(t, dropped, [torch.arange(8)])
    assert_near(with_hole, gradient_of(t, batch, [torch.arange(7)]), FP64)


def test_nothing_left_leaves_weights_and_optimiser_alone(tmp_path: Path) -> None:
    t = trainer(tmp_path)
    _, batch, plan = batch_of(t, Scores([0.0] * 8, dict.fromkeys(range(8), "no reward")))
    before = weights(t)
    done = update(t.agent, batch, plan, 0.0, t.shuffling, t.backend)
    assert done.steps == 0 and done.stats is None
    assert all(map(torch.equal, before, weights(t))) and not t.agent.optimizer.state


def test_kl_stop_throws_away_the_gradient_that_went_too_far(tmp_path: Path) -> None:
    t = trainer(tmp_path, kl_stop=1e-9, epochs=4)
    _, batch, plan = batch_of(t)
    done = update(t.agent, batch, plan, 0.0, t.shuffling, t.backend)
    assert done.stopped_by_kl and done.steps == 1
    assert done.last is not None and done.last.compute()["kl_k3"] > 1.5e-9
    assert all(p.grad is None for p in t.agent.parameters)


def test_plan_covers_every_row_once() -> None:
    plan = make_plan(10, 3, 2, torch.Generator().manual_seed(0))
    assert [[len(rows) for rows in part] for part in plan] == [[2, 2], [2, 1], [2, 1]]
    assert sorted(torch.cat([rows for part in plan for rows in part]).tolist()) == list(range(10))


def test_separate_critic_leaves_the_policy_to_the_policy_loss(tmp_path: Path) -> None:
    grads = []
    for vf_coef in (0.0, 1.0):
        t = trainer(tmp_path, dtype=torch.float64, critic="separate", vf_coef=vf_coef)
        torch.nn.init.ones_(t.agent.critic.head.weight)
        _, batch, _ = batch_of(t)
        gradient_of(t, batch, [torch.arange(8)])
        policy = [p.grad for p in t.agent.policy.model.parameters() if p.grad is not None]
        body = [p.grad for p in t.agent.critic.body.parameters() if p.grad is not None]
        grads.append((policy, sum(float(g.abs().sum()) for g in body)))
    assert all(map(torch.equal, grads[0][0], grads[1][0]))
    assert grads[0][1] == 0.0 and grads[1][1] > 0.0


@pytest.mark.parametrize("variant", ["clip", "gspo", "cispo", "penalty", "linear"])
def test_every_variant_takes_its_steps(tmp_path: Path, variant: str) -> None:
    t = trainer(tmp_path, variant=variant)
    before = weights(t)
    records = [t.step() for _ in range(2)]
    assert [r["steps"] for r in records] == [4, 4]
    assert all(abs(r["loss"]) < 10 and 0 < r["grad_norm"] < 100 for r in records)
    assert not any(map(torch.equal, before, weights(t)))
    if variant == "penalty":
        ratio = records[1]["loss_kl_coef"] / records[0]["loss_kl_coef"]
        assert records[0]["loss_kl_coef"] == 1.0 and ratio in (0.5, 1.0, 2.0)


@pytest.mark.parametrize("options", [{}, {"critic": "separate"}, {"train_layers": 0}])
def test_default_backend_and_reference_train_alike(tmp_path: Path, options: dict) -> None:
    """In fp64 both compute the same real numbers, so the runs part by rounding alone.

    Adam divides by |g| + 1e-5: a gradient off by 1e-13 moves a step of lr = 1e-3 by 1e-11 at
    most, and 12 steps carry that on.
    """
    runs = []
    for backend in ("auto", "reference"):
        t = trainer(tmp_path / backend, dtype=torch.float64, backend=backend, **options)
        runs.append(([t.step() for _ in range(3)], weights(t)))
    (fast, fast_weights), (plain, plain_weights) = runs
    for name in ("reward", "kl", "loss", "value_loss", "entropy", "ref_kl", "grad_norm"):
        for a, b in zip(fast, plain, strict=True):
            assert a[name] == pytest.approx(b[name], rel=1e-8, abs=1e-9), name
    for x, y in zip(fast_weights, plain_weights, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-9)


def test_default_backend_and_reference_agree_on_a_batch_in_fp32(tmp_path: Path) -> None:
    """One fp32 gradient: each backend rounds sums of at most 300 terms, 2**-24 each."""
    t = trainer(tmp_path)
    _, batch, plan = batch_of(t)
    mine = gradient_of(t, batch, plan[0])
    t.backend = "reference"
    assert_near(mine, gradient_of(t, batch, plan[0]), 300 * 2**-24)


@pytest.mark.parametrize("options", [{}, {"head": "logits"}, {"critic": "separate"}], ids=str)
@pytest.mark.parametrize("micro_batch", [2, 4])
def test_the_forward_of_scoring_is_the_first_of_the_update(
    tmp_path: Path, micro_batch: int, options: dict
) -> None:
    """From the second update on: one forward fewer, and the same bits."""
    runs = []
    for keeps in (True, False):
        t = trainer(tmp_path / str(keeps), micro_batch=micro_batch, train_layers=0, **options)
        forwards: list[int] = []
        t.agent.policy.model.register_forward_hook(
            lambda model, args, out, seen=forwards: seen.append(int(torch.is_grad_enabled()))
        )
        counts = []
        for _ in range(3):
            forwards.clear()
            if not keeps:
                t.first_batch.repeats = False
            t.step()
            counts.append(sum(forwards))
        runs.append((weights(t), counts))
    (kept, fewer), (anew, counts) = runs
    assert all(map(torch.equal, kept, anew))
    scoring, epochs = 8 // micro_batch, 2 * 8 // micro_batch
    assert counts == [scoring + epochs] * 3
    assert fewer == [scoring + epochs, *[scoring + epochs - 1] * 2]


def test_a_forward_is_taken_once_and_for_its_rows_alone(tmp_path: Path) -> None:
    t = trainer(tmp_path)
    _, batch, plan = batch_of(t)
    parts = [rows for part in plan for rows in part]
    for rows in (parts[0].flip(0), parts[1], parts[0]):
        ahead = Ahead()
        score(t.agent, batch.seqs, parts, t.backend, ahead)
        out = ahead.take(rows)
        assert (out is not None) == (rows is parts[0]) and ahead.take(parts[0]) is None


def test_scoring_holds_one_graph_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = trainer(tmp_path, train_layers=0)
    rollout, _, plan = batch_of(t)
    held: list[weakref.ref[torch.Tensor]] = []
    counts = []

    def watched(*args: Any) -> Forward:
        counts.append(sum(hidden() is not None for hidden in held))
        out = forward(*args)
        held.append(weakref.ref(out.hidden))
        return out

    monkeypatch.setattr("ppo_fast.loop.score.forward", watched)
    score(t.agent, rollout.seqs, [rows for part in plan for rows in part], t.backend)
    assert counts == [0] * 4


@pytest.mark.parametrize("most", [1e-3, 1e3])
def test_gradients_are_clipped_to_the_largest_norm_and_otherwise_left(
    tmp_path: Path, most: float
) -> None:
    t = trainer(tmp_path, dtype=torch.float64, max_grad_norm=most)
    _, batch, plan = batch_of(t)
    before = gradient_of(t, batch, plan[0])
    norm = float(torch.stack([g.square().sum() for g in before]).sum().sqrt())
    assert t.agent.step() == pytest.approx(norm, rel=FP64)
    factor = min(1.0, most / (norm + 1e-6))
    assert_near([factor * g for g in before], gradients(t), FP64)
    assert (factor == 1.0) == (most > 1) == all(map(torch.equal, before, gradients(t)))
