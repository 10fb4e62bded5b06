"""Distillation: gradients and advantages by their formulas, learning, resumes, the log."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_helpers import (
    TEXTS,
    batch_of,
    gradients,
    ids_of,
    rollout_of,
    tiny,
    tiny_teacher,
    trainer,
    weights,
)
from rich.console import Console

import ppo_fast
from ppo_fast.loop import TrainConfig, Trainer
from ppo_fast.loop.compare import compare
from ppo_fast.loop.data.experience import taught
from ppo_fast.loop.data.sequences import Sequences
from ppo_fast.loop.log.history import History
from ppo_fast.loop.rewards import letters
from ppo_fast.loop.update import accumulate

WHOLE = ("reverse", "forward", "jsd", "mixed")
# fp64 sums in another order: 2**-53 times terms and condition number below 1e4, per unit.
FP64 = 1e-12


def learner(out: Path, kind: str, **options: Any) -> Trainer:
    """A trainer in fp64 with a teacher of another hidden size, alone if not said otherwise."""
    options = {"reward_coef": 0.0, "vf_coef": 0.0, "dtype": torch.float64} | options
    return trainer(out, distill=kind, teacher=tiny_teacher(options["dtype"]), **options)


def own_logprobs(t: Trainer, seqs: Sequences) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ln of both models' distributions, (n, V), of their own logits, and the policy's lse (n,).

    Over the kept ids, where there are some.
    One forward: transformers' norms are in fp32, and so is a gradient of two of them.
    """
    assert t.agent.teacher is not None
    own, config = t.config.temperature, t.config
    with torch.no_grad():
        other = t.agent.teacher.logits(seqs)[0] / (config.distill_temperature or own)
    logits = t.agent.policy.logits(seqs)[0] / own
    if seqs.support is not None:
        cut = torch.ones_like(logits, dtype=torch.bool)
        for row, ids in zip(cut, ids_of(seqs.flat_support()), strict=True):
            row[ids] = False
        # Not -inf, whose product with a probability of 0 is NaN.
        logits, other = logits.masked_fill(cut, -1e5), other.masked_fill(cut, -1e5)
    return logits.log_softmax(-1), other.log_softmax(-1), logits.logsumexp(-1)


def divergence(kind: str, beta: float, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The divergence of each row, (n,), spelled out from its definition."""
    p, q = s.exp(), t.exp()
    reverse, forward = (p * (s - t)).sum(-1), (q * (t - s)).sum(-1)
    if kind == "jsd":
        m = torch.logaddexp(math.log(1 - beta) + s, math.log(beta) + t)
        return beta * (q * (t - m)).sum(-1) + (1 - beta) * (p * (s - m)).sum(-1)
    mixed = beta * reverse + (1 - beta) * forward
    return {"reverse": reverse, "forward": forward, "mixed": mixed}[kind]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("coefs", [(1.0, 0.0), (0.3, 0.7)], ids=["alone", "beside the reward"])
@pytest.mark.parametrize("top_p", [1.0, 0.9], ids=["all tokens", "kept tokens"])
def test_gradients_are_those_of_the_formula(
    tmp_path: Path, kind: str, coefs: tuple[float, float], top_p: float, backend: str
) -> None:
    options: dict[str, Any] = {"temperature": 0.8, "distill_temperature": 1.3, "backend": backend}
    beta = 0.3 if kind in ("jsd", "mixed") else 0.5
    options |= {"distill_coef": coefs[0], "reward_coef": coefs[1], "distill_beta": beta}
    options |= {"top_p": top_p}
    t = learner(tmp_path, kind, z_loss_coef=0.01, **options)
    _, batch, plan = batch_of(t)
    stats = accumulate(t.agent, batch, plan[0], 0.0, t.backend, unchanged=True)
    assert stats is not None
    found = [p.grad.clone() for p in t.agent.policy.model.parameters() if p.grad is not None]
    t.agent.discard()
    sums, n = torch.zeros(2, dtype=torch.float64), int(batch.seqs.mask[torch.cat(plan[0])].sum())
    for rows in plan[
        0
    ]:  # transformers' norms are in fp32: other rows beside would round otherwise
        part = batch.rows(rows)
        s, q, lse = own_logprobs(t, part.seqs)
        each = divergence(kind, beta, s, q)
        white = part.seqs.flat(part.advantages)  # with the reward's coefficient
        assert bool(white.any()) == (coefs[1] > 0)
        new = s.gather(1, part.seqs.flat(part.seqs.response)[:, None]).squeeze(1)
        z_loss = lse.square()
        ((coefs[0] * each - new * white + 0.01 * z_loss).sum() / n).backward()
        sums += torch.stack([each.sum(), z_loss.sum()]).detach() / n
    want = [p.grad for p in t.agent.policy.model.parameters() if p.grad is not None]
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11 * float(b.abs().max()))
    told = stats.compute()
    assert [told["divergence"], told["z_loss"]] == pytest.approx(sums.tolist(), rel=FP64)


@pytest.mark.parametrize("head", ["linear", "logits"])
@pytest.mark.parametrize("top_k", [0, 20])
@pytest.mark.parametrize("advantages", ["gae", "grpo"])
@pytest.mark.parametrize("coefs", [(1.0, 0.0), (0.3, 0.7)], ids=["alone", "beside the reward"])
def test_advantages_are_those_of_the_formula(
    tmp_path: Path, coefs: tuple[float, float], advantages: str, top_k: int, head: str
) -> None:
    """sg(log p_teacher - log p_old) a token, and the reward's as without a teacher."""
    options: dict[str, Any] = {"temperature": 0.8, "distill_temperature": 1.3, "head": head}
    options |= {"advantages": advantages, "group": 2, "batch": 4, "top_k": top_k}
    t = learner(tmp_path / "a", "pg", distill_coef=coefs[0], reward_coef=coefs[1], **options)
    _, batch, _ = batch_of(t)
    seqs, mask = batch.seqs, batch.seqs.mask
    s, q, _ = own_logprobs(t, seqs)
    tokens = seqs.flat(seqs.response)[:, None]
    gap = (q - s.detach()).gather(1, tokens).squeeze(1)
    del options["distill_temperature"]
    plain = trainer(tmp_path / "b", dtype=torch.float64, **options | {"kl_coef": t.config.kl_coef})
    _, other, _ = batch_of(plain)
    assert torch.equal(other.seqs.tokens, seqs.tokens)
    reward = other.advantages
    if other.moments is not None:
        reward = ppo_fast.whiten(reward, mask, moments=other.moments)
    want = coefs[0] * gap + (coefs[1] * seqs.flat(reward) if coefs[1] else 0)
    assert batch.moments is None and batch.advantages[~mask].eq(0).all()
    torch.testing.assert_close(seqs.flat(batch.advantages), want, rtol=0, atol=FP64)
    told = taught(t.config, seqs, batch.scored)
    assert told == {"divergence": pytest.approx(-float(gap.mean()), rel=1e-10)}


@pytest.mark.parametrize("kind", ["reverse", "pg"])
def test_gradients_do_not_depend_on_the_micro_batch_split(tmp_path: Path, kind: str) -> None:
    t = learner(tmp_path, kind, backend="reference", reward_coef=0.5)
    _, batch, _ = batch_of(t)
    found = []
    for size in (8, 3, 1):
        t.agent.discard()
        accumulate(t.agent, batch, list(torch.arange(8).split(size)), 0.0, t.backend)
        found.append(gradients(t))
    largest = max(float(x.abs().max()) for x in found[0])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=FP64 * largest)


@pytest.mark.parametrize("kind", ["reverse", "pg"])
def test_the_teacher_is_read_once_whatever_the_epochs(tmp_path: Path, kind: str) -> None:
    t = learner(tmp_path, kind, backend="reference", epochs=3)
    seen: list[int] = []
    assert t.agent.teacher is not None
    before = [p.clone() for p in t.agent.teacher.model.parameters()]
    t.step()  # the first batch's checks read it too
    t.agent.teacher.model.register_forward_pre_hook(lambda *_: seen.append(1))
    record = t.step()
    assert record["steps"] == 6 and len(seen) == 4  # of 8 sequences in micro-batches of 2
    assert all(map(torch.equal, before, t.agent.teacher.model.parameters()))
    assert all(p.grad is None for p in t.agent.teacher.model.parameters())


@pytest.mark.parametrize("kind", ["reverse", "pg"])
def test_a_teacher_alone_needs_no_critic(tmp_path: Path, kind: str) -> None:
    alone = learner(tmp_path / "a", kind, backend="reference", dtype=torch.float32)
    record = alone.step()
    assert alone.agent.critic is None and list(alone.agent.modules) == ["policy"]
    assert not {"value_loss", "explained_variance", "vf_clip_frac"} & record.keys()
    assert TrainConfig(distill=kind, reward_coef=0.0).resolved().kl_coef == 0.0
    assert TrainConfig(distill=kind, reward_coef=0.1).resolved().kl_coef > 0.0
    assert record["divergence"] > 0 and math.isfinite(record["reward"])
    both = learner(tmp_path / "b", kind, backend="reference", reward_coef=0.5, vf_coef=0.1)
    assert both.agent.critic is not None and "value_loss" in both.step()


def test_numbers_of_terms_that_are_not_there_are_not_logged(tmp_path: Path) -> None:
    record = trainer(tmp_path / "a").step()
    assert not {"divergence", "z_loss"} & record.keys()
    record = trainer(tmp_path / "b", z_loss_coef=1e-4, backend="reference").step()
    assert record["z_loss"] > 0 and "divergence" not in record


LEARNING: dict[str, Any] = {
    "prompts": [f"{text} {i}" for i in range(4) for text in TEXTS],
    "train_layers": 0,
    "batch": 32,
    "micro_batch": 16,
}


@pytest.fixture(scope="module")
def letters_policy(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tiny model after ten updates of PPO, by which its reward rises."""
    t = trainer(tmp_path_factory.mktemp("teacher"), lr=1e-2, **LEARNING)
    rewards = [t.iteration()[0]["reward"] for _ in range(10)]
    assert rewards[-1] > rewards[0] + 0.2
    return t.agent.policy.model


@pytest.mark.parametrize("kind", [*WHOLE, "pg"])
def test_the_divergence_falls(tmp_path: Path, letters_policy: Any, kind: str) -> None:
    """The base model learns of the policy that it became; measured on the logits of both."""
    teacher = copy.deepcopy(letters_policy)
    t = trainer(tmp_path, distill=kind, reward_coef=0.0, teacher=teacher, lr=6e-3, **LEARNING)
    seqs = rollout_of(t).seqs

    @torch.no_grad()
    def kl() -> float:
        s, q, _ = own_logprobs(t, seqs)
        return float(divergence("reverse", 0.5, s, q).mean())

    before, records = kl(), [t.iteration()[0] for _ in range(8)]
    assert kl() < 0.6 * before
    told = [r["divergence"] for r in records]
    assert sum(told[-2:]) < 0.8 * sum(told[:2])
    assert records[-1]["reward"] > records[0]["reward"]  # which no term has


@pytest.mark.parametrize("kind", ["reverse", "pg"])
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.float32, "lora_rank": 2, "train_layers": 0},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float32, "variant": "gspo", "reduction": "seq-mean-token-mean"},
        {"dtype": torch.float32, "variant": "linear", "reward_coef": 1.0, "advantages": "gae"},
        {"dtype": torch.float32, "correction": "token", "correction_high": 2.0},
    ],
    ids=["lora", "bf16", "gspo", "linear", "corrected"],
)
def test_it_goes_with_other_options(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    if "lora_rank" in options:
        pytest.importorskip("peft", reason="adapters are peft's")
    with pytest.warns(UserWarning) if options["dtype"] == torch.bfloat16 else nullcontext():
        t = learner(tmp_path, kind, backend="reference", **options)
    records = [t.step() for _ in range(2)]
    assert all(r["steps"] == 4 and r["skipped"] == 0 and r["grad_norm"] > 0 for r in records)
    assert all(math.isfinite(r["divergence"]) for r in records)


@pytest.mark.parametrize("kind", ["reverse", "pg"])
def test_bf16_reads_the_same_teacher(tmp_path: Path, kind: str) -> None:
    """Products in bf16: 2**-8 of logits of size 3, in differences of two log-probs."""
    wide = learner(tmp_path / "a", kind, dtype=torch.float32, backend="reference", lr=1e-9)
    config = dataclasses.replace(wide.config, dtype="bfloat16", out=tmp_path / "b")
    half = Trainer(config, *tiny(), TEXTS, letters, teacher=tiny_teacher())
    assert half.agent.teacher is not None
    assert {p.dtype for p in half.agent.teacher.model.parameters()} == {torch.bfloat16}
    found = [t.step()["divergence"] for t in (wide, half)]
    assert found[1] == pytest.approx(found[0], abs=0.1) and found[0] != found[1]


@pytest.mark.parametrize("kind", ["jsd", "pg"])
def test_a_resumed_run_ends_with_the_bits_of_the_whole(tmp_path: Path, kind: str) -> None:
    options: dict[str, Any] = {"dtype": torch.float32, "backend": "reference", "save_every": 1}
    whole = learner(tmp_path / "a", kind, updates=2, **options)
    whole.step(), whole.step()
    learner(tmp_path / "b", kind, updates=1, **options).run(Console(quiet=True))
    later = learner(tmp_path / "b", kind, updates=2, resume=True, **options)
    later.begin(lambda _: None)
    later.step(), later.close()
    assert all(map(torch.equal, weights(whole), weights(later)))
    again = {"updates": 4, "resume": True, **options}
    for changed, message in (
        ({"distill_coef": 0.5}, r"resume: distill_coef is 0\.5, the checkpoint's is 1\.0"),
        ({"distill_temperature": 2.0}, "resume: distill_temperature is 2.0, .* is None"),
    ):
        with pytest.raises(ValueError, match=message):
            learner(tmp_path / "b", kind, **(again | changed)).begin()
    with pytest.raises(ValueError, match=r"^resume: the teacher's sha256 is '\w+', the check"):
        trainer(
            tmp_path / "b",
            distill=kind,
            teacher=tiny_teacher(seed=8),
            **({"reward_coef": 0.0, "vf_coef": 0.0} | again),
        ).begin()


def test_backends_are_compared_with_a_teacher(tmp_path: Path) -> None:
    t = learner(tmp_path, "pg", dtype=torch.float32)
    t.step()
    found = compare(t, 1)
    assert found.gradient > 0 and found.gradient_difference < 1e-4 * found.gradient


def test_the_log_s_readers_know_the_divergence(tmp_path: Path) -> None:
    t = learner(tmp_path, "pg", dtype=torch.float32)
    record = t.step()
    t.close()
    line = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert line["divergence"] == record["divergence"]
    assert History([line]).column("divergence").tolist() == [record["divergence"]]
    bad = History([line | {"divergence": None}])
    assert bad.lost == {0: "divergence"}
