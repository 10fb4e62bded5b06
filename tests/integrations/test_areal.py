"""AReaL: log-probabilities, GAE, actor and critic losses, and whole runs, against its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pages
import pytest
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from edited import edit
from torch import Tensor
from trainers import needs

needs("areal")
import areal_run
from areal.trainer.ppo.actor import PPOActor
from areal.utils import functional as exported
from areal.utils.dynamic_import import import_from_string
from areal.utils.functional import functional, vocab_parallel
from areal_calls import REJECTIONS, actor, assert_alike, normal, results, rows
from both_sides import B, T, mask_of

from ppo_fast import integrations, testing
from ppo_fast.integrations import areal

WORDS, WORLD = 13, 2
CLIPPED = actor({}, eps_clip=0.2)
WHITENED = ("ppo_actor/advantages/avg",)  # 0 but for rounding


@pytest.fixture(autouse=True)
def not_compiled() -> Iterator[None]:
    """AReaL compiles its log-probabilities, which takes longer than all else here."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A model's files, while this process is a rank by itself."""
    made = tmp_path_factory.mktemp("areal")
    areal_run.save_model(str(made))
    dist.init_process_group("gloo", init_method=f"file://{made}/ranks", rank=0, world_size=1)
    yield str(made)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("critic", "options"),
    [
        (True, {"eps_clip": 0.3}),
        (False, {"use_decoupled_loss": True, "rejected": True}),
        (False, {"recompute_logprob": True, "eps_clip_higher": 0.28, "kl_estimator": "k3"}),
        (
            False,
            {
                "use_decoupled_loss": True,
                "prox_logp_method": "loglinear",
                "importance_sampling_level": "sequence",
                "c_clip": 3.0,
                "m2_threshold": 0.5,
            },
        ),
    ],
    ids=["critic", "decoupled", "recomputed", "sequence"],
)
def test_a_run_is_the_same(
    folder: str, monkeypatch: pytest.MonkeyPatch, critic: bool, options: dict[str, Any]
) -> None:
    """Three updates of AReaL's FSDP engines: every logged number and every weight."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    theirs = areal_run.run(folder, critic, **options)
    with areal.patched(areal.integration.ops if critic else None) as calls:
        ours = areal_run.run(folder, critic, **options)
    # AReaL counts a value as clipped where old + (value - old) is off by rounding, too.
    names = [name for name in theirs.metrics[0] if name.startswith("ppo_critic/clip")]
    tiny.assert_same_run(ours, theirs, 3, (*names, *WHITENED))
    assert calls["gae"].fused == 3 and calls["policy_loss"].fused == 6
    assert calls["logprobs"].fused >= 6 and not any(n.left for n in calls.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropies(dtype: torch.dtype, temperature: float) -> None:
    """With their gradients; more rows than the first call's comparison has, in chunks of 16."""
    logits, labels = (3 * normal(70, WORDS)).to(dtype).requires_grad_(), torch.arange(70) % WORDS
    weights = normal(2, 70, seed=1)

    def both() -> list[Tensor]:
        given = (logits, labels, temperature, None, 16)
        alone = exported.gather_logprobs(*given)
        found = exported.gather_logprobs_entropy(*given)
        total = (torch.stack([*found]) * weights).sum()
        grads = [*torch.autograd.grad(alone.sum(), logits), *torch.autograd.grad(total, logits)]
        return [alone, *found, *grads]

    theirs = both()
    with areal.patched(("logprobs",)) as calls:
        ours = both()
    assert (calls["logprobs"].fused, calls["logprobs"].left) == (2, 0)
    leaf = logits.detach().double().requires_grad_()
    logs = (leaf / temperature).log_softmax(-1)
    taken, entropy = logs.gather(-1, labels[:, None])[:, 0], -(logs.exp() * logs).sum(-1)
    total = (torch.stack([taken, entropy]) * weights).sum()
    (plain,) = torch.autograd.grad(taken.sum(), leaf, retain_graph=True)
    exact = [taken, taken, entropy, plain, *torch.autograd.grad(total, leaf)]
    # The largest logit over the temperature, and in a gradient the weights.
    for size, a, b, want in zip((20, 20, 20, 20, 200), ours, theirs, exact, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        for side in (a, b):
            testing.assert_within_budget(
                side.detach(), want.detach(), condition=float(size), ops=4 * WORDS
            )


def of_shard(rank: int, place: str) -> None:
    """Both functions on this rank's half of the words, then a run, on AReaL and patched."""
    torch.compiler.set_stance("force_eager")
    os.environ["LOCAL_RANK"] = "0"
    where = f"file://{place}/rendezvous"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=WORLD)
    logits, labels = 3 * normal(20, 2 * WORDS), torch.arange(20) % (2 * WORDS)
    leaf = logits[:, rank * WORDS : (rank + 1) * WORDS].clone().requires_grad_()

    def both() -> list[Tensor]:
        given = (leaf, labels, 0.7, dist.group.WORLD, 8)
        alone = exported.gather_logprobs(*given)
        found = exported.gather_logprobs_entropy(*given)
        total = alone.sum() + found[0].cos().sum() + found[1].sin().sum()
        return [x.detach() for x in (alone, *found, *torch.autograd.grad(total, leaf))]

    theirs = both()
    with areal.patched(("logprobs",)) as calls:
        ours = both()
    assert (calls["logprobs"].fused, calls["logprobs"].left) == (2, 0)
    run = areal_run.run(place, backend=f"fsdp:d1t{WORLD}")
    with areal.patched() as calls:
        patched = areal_run.run(place, backend=f"fsdp:d1t{WORLD}")
    assert calls["logprobs"].fused >= 6 and not any(n.left for n in calls.values())
    tiny.assert_same_run(patched, run, 3, WHITENED)
    torch.save((ours, theirs), f"{place}/{rank}")
    dist.destroy_process_group()


def test_logprobs_of_a_shared_vocabulary(tmp_path: Path) -> None:
    """Two ranks with half of the words each, AReaL's tensor parallelism: calls and updates."""
    areal_run.save_model(str(tmp_path))
    mp.start_processes(of_shard, args=(str(tmp_path),), nprocs=WORLD, start_method="spawn")
    for rank in range(WORLD):
        ours, theirs = torch.load(tmp_path / str(rank))
        for a, b in zip(ours, theirs, strict=True):
            testing.assert_within_budget(a, b, condition=20.0, ops=8 * WORDS)


def advantages_of(values: Tensor | None, **options: Any) -> dict[str, Tensor]:
    """AReaL's `compute_advantages` without normalisation, on rows with holes and without EOS."""
    attention = torch.ones(B, T, dtype=torch.long)
    attention[1, 7:], attention[2, 9:] = 0, 0
    loss_mask = mask_of("bool").long() * attention
    loss_mask[:, :2] = 0
    own = areal_run.actor_config(**options)
    data = {
        "input_ids": attention,
        "attention_mask": attention,
        "loss_mask": loss_mask,
        "logprobs": 0.3 * normal(B, T) - 2,
        "rewards": normal(B, seed=4),
    }
    if values is not None:
        data["values"] = values
    return PPOActor(own, engine=None)._compute_advantages(data)


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize(("discount", "gae_lambda"), [(1.0, 1.0), (0.97, 0.9), (1.0, 0.0)])
def test_gae(values: bool, discount: float, gae_lambda: float) -> None:
    """Advantages and returns of the kept slots, against AReaL's and the recursion in fp64."""
    own = normal(B, T, seed=5) if values else None
    options = {"discount": discount, "gae_lambda": gae_lambda, "reward_scaling": 2.0}
    theirs = advantages_of(own, **options)
    with areal.patched(("gae",)) as calls:
        ours = advantages_of(own, **options)
    assert (calls["gae"].fused, calls["gae"].left) == (1, 0)
    keep, v = theirs["loss_mask"] != 0, torch.zeros(B, T) if own is None else own
    exact = torch.zeros(B, T, dtype=torch.float64)
    for row in range(B):
        after, last = (float(v[row, -1]) if row not in (1, 2) else 0.0), 0.0
        for t in reversed(range(T - 1)):
            if keep[row, t]:
                delta = float(theirs["tot_rewards"][row, t]) + discount * after - float(v[row, t])
                after, last = float(v[row, t]), delta + discount * gae_lambda * last
                exact[row, t] = last
    assert ours["advantages"].shape == theirs["advantages"].shape
    assert not keep[:, -1].any() and keep.sum() > 20
    for name, want in (("advantages", exact), ("returns", exact + v)):
        for side in (ours, theirs):
            found = torch.where(keep, side[name], 0.0)
            # Sums of at most T rewards and values of size 5.
            testing.assert_within_budget(
                found, torch.where(keep, want, 0.0), condition=10.0 * T, ops=4 * T, name=name
            )
    assert torch.equal(ours["advantages"][~keep], torch.zeros_like(ours["advantages"][~keep]))


def test_gae_that_is_left_to_areal() -> None:
    """A discount above 1, with a warning; one slot has no step."""
    theirs = advantages_of(None, discount=1.5)
    warned = pytest.warns(RuntimeWarning, match=r"left to areal: discount 1\.5")
    with warned, areal.patched(("gae",)) as calls:
        ours = advantages_of(None, discount=1.5)
    assert (calls["gae"].fused, calls["gae"].left) == (0, 1)
    assert torch.equal(ours["advantages"], theirs["advantages"])


@pytest.mark.parametrize("rejection", REJECTIONS)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("cap", [None, 1.3])
def test_actor_loss(rejection: str, level: str, cap: float | None) -> None:
    """Padded and packed; ratios that meet every bound."""
    call = actor(
        REJECTIONS[rejection],
        eps_clip=0.05,
        eps_clip_higher=0.1,
        c_clip=cap,
        importance_sampling_level=level,
    )
    cases = [rows(packed) for packed in (False, True)]
    assert_alike(call, *cases)
    found = results(call, cases[0].to(torch.float32))
    assert 0 < found["clip_mask"].sum() < mask_of("bool").sum()
    assert (found["dual_clip_mask"].sum() > 0) == (cap is not None)
    if rejection not in ("none", "clamped sequences"):
        assert 0 < float(found["filtered_fraction"]) < 1


def test_a_mask_that_keeps_nothing() -> None:
    x = rows(True)
    assert_alike(CLIPPED, x._replace(mask=torch.zeros_like(x.mask)))


def test_what_masked_slots_hold_is_not_read() -> None:
    """NaN there is NaN in AReaL's gradient, which is 0 times it."""
    x = rows(False).to(torch.float32)
    holes = torch.where(x.mask, x.new.detach(), torch.nan).requires_grad_()
    assert results(CLIPPED, x._replace(new=holes))["gradient"].isnan().any()
    with areal.patched(("policy_loss",)):
        ours = results(CLIPPED, x)
        assert torch.equal(results(CLIPPED, x._replace(new=holes))["gradient"], ours["gradient"])


@pytest.mark.parametrize("masked", [True, False])
def test_critic_loss(masked: bool) -> None:
    """Loss, gradient and what is logged; targets that were made under inference mode."""
    value = normal(B, T).requires_grad_()
    old, mask = value.detach() + 0.3 * normal(B, T, seed=1), mask_of("bool") if masked else None
    with torch.inference_mode():
        target = normal(B, T, seed=2)

    def both() -> list[Tensor]:
        loss, found = functional.ppo_critic_loss_fn(value, old, target, 0.2, mask)
        (gradient,) = torch.autograd.grad(loss, value)
        keep = torch.ones(B, T, dtype=torch.bool) if mask is None else mask
        return [loss.detach(), gradient, *(torch.where(keep, x, 0) for x in found.values())]

    theirs = both()
    with areal.patched(("value_loss",)) as calls:
        ours = both()
    assert (calls["value_loss"].fused, calls["value_loss"].left) == (1, 0)
    assert 0.1 < float(ours[2].double().mean()) < 0.9  # clipped tokens
    v, o, r = value.detach().double().requires_grad_(), old.double(), target.clone().double()
    terms = 0.5 * torch.max((v - r) ** 2, (o + (v - o).clamp(-0.2, 0.2) - r) ** 2)
    exact = (terms if mask is None else terms[mask]).mean()
    want = [exact.detach(), *torch.autograd.grad(exact, v)]
    assert torch.equal(ours[2], theirs[2]) and torch.equal(ours[3], theirs[3])
    for a, b in zip(ours, want, strict=False):
        testing.assert_within_budget(a, b, condition=40.0, ops=8 + B * T)


@pytest.mark.parametrize(
    ("call", "reason", "error"),
    [
        (actor({}, eps_clip=0.2, c_clip=0.9), r"c_clip 0\.9", AssertionError),
        (actor({}, eps_clip=0.2, importance_sampling_level="turn"), "level 'turn'", ValueError),
    ],
)
def test_errors_are_areals_own(call: Any, reason: str, error: type[Exception]) -> None:
    """In the first call, which is compared, and in later ones, which are left."""
    x = rows(False).to(torch.float32)
    with pytest.raises(error) as theirs:
        call(x)
    with areal.patched(("policy_loss",)):
        with pytest.raises(error) as first:
            call(x)
        CLIPPED(x)
        with pytest.raises(error) as later, pytest.warns(RuntimeWarning, match=reason):
            call(x)
    assert str(first.value) == str(later.value) == str(theirs.value)


def test_a_critic_without_a_token() -> None:
    """0, where AReaL has NaN; not as the first call, which is compared."""
    value, mask = normal(B, T).requires_grad_(), torch.zeros(B, T, dtype=torch.bool)
    given = value.detach() + 1, value.detach() - 1, 0.2
    assert functional.ppo_critic_loss_fn(value, *given, mask)[0].isnan()
    with areal.patched(("value_loss",)):
        functional.ppo_critic_loss_fn(value, *given, ~mask)
        assert functional.ppo_critic_loss_fn(value, *given, mask)[0] == 0.0


def test_a_critic_loss_that_is_left_to_areal() -> None:
    x = [normal(B, T, seed=i) for i in range(3)]
    theirs = functional.ppo_critic_loss_fn(*x, 0.2, None, "huber")[0]
    warned = pytest.warns(RuntimeWarning, match="left to areal: loss_fn_type 'huber'")
    with warned, areal.patched(("value_loss",)) as calls:
        assert torch.equal(functional.ppo_critic_loss_fn(*x, 0.2, None, "huber")[0], theirs)
    assert (calls["value_loss"].fused, calls["value_loss"].left) == (0, 1)


CHANGED = (
    (functional, "ppo_actor_loss_fn", "policy_loss", "c_clip * adv", "adv", "pg_loss3 = "),
    (functional, "_mse_loss", "value_loss", "0.5 * ", "", r"return \(x - y\) \*\* 2"),
    (vocab_parallel, "_chunked_apply", "logprobs", "end_idx], labels", "], labels", r"fn\("),
    (PPOActor, "_compute_advantages", "gae", "nextvalues - val", "nextvalues + val", "delta = "),
)


@pytest.mark.parametrize(("place", "name", "op", "old", "new", "what"), CHANGED)
def test_a_changed_statement_of_areal_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, place: Any, name: str, op: str, old: str, new: str, what: str
) -> None:
    edit(monkeypatch, place, name, old, new)
    before = getattr(place, name)
    with pytest.raises(integrations.UnknownSourceError, match=rf"is not a known one: `.*{what}"):
        areal.apply((op,))
    assert getattr(place, name) is before and not areal.integration.calls


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# Skip tokens", "# Leave out those"),
        ("newgaelam = delta", "newgaelam = (delta)"),
        ("This indicates compute_logp() was", "compute_logp() was"),
    ],
)
def test_a_harmless_change_of_areal_is_known(
    monkeypatch: pytest.MonkeyPatch, old: str, new: str
) -> None:
    edit(monkeypatch, PPOActor, "_compute_advantages", old, new)
    with areal.patched(("gae",)) as calls:
        advantages_of(None)
    assert calls["gae"].fused == 1


def test_it_is_patched_at_every_import_and_put_back() -> None:
    from areal.engine import fsdp_engine
    from areal.trainer.ppo import actor as module

    names = "gather_logprobs", "gather_logprobs_entropy"
    held = [(m, n) for m in (exported, fsdp_engine) for n in names]
    held += [(m, "ppo_actor_loss_fn") for m in (exported, module)]
    before = [getattr(m, n) for m, n in held]
    areal.apply()
    assert not any(getattr(m, n) is x for (m, n), x in zip(held, before, strict=True))
    with pytest.raises(integrations.NeverReachedError, match="logprobs, gae, policy_loss: "):
        areal.revert()
    assert all(getattr(m, n) is x for (m, n), x in zip(held, before, strict=True))


def test_the_block_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that a worker imports by name: importing them patches it."""
    (block,) = pages.blocks(pages.ROOT / "docs/integrations/areal.md")
    module = ModuleType("engines")
    monkeypatch.setitem(sys.modules, "engines", module)
    exec(compile(block.code, block.page, "exec"), vars(module))
    assert import_from_string("engines.Actor") is vars(module)["Actor"]  # as AReaL's workers do
    assert [*areal.integration.calls] == [*areal.integration.ops]
    with pytest.raises(integrations.NeverReachedError):
        areal.revert()
    made: list[Any] = []

    def controller(config: Any, scheduler: Any) -> Any:
        made.append((config, scheduler))

        def create_process_group(parallel_strategy: Any) -> None:
            made.append(parallel_strategy)

        return SimpleNamespace(create_process_group=create_process_group)

    trainer = object.__new__(vars(module)["Trainer"])
    trainer.scheduler = "scheduler"
    for name, method in (("Actor", "_create_train_engine"), ("Critic", "_create_critic")):
        monkeypatch.setattr(vars(module)[name], "as_controller", controller)
        getattr(trainer, method)("config", SimpleNamespace(parallel="parallel"))
    assert made == [("config", "scheduler"), "parallel"] * 2
