"""Truncated sampling: what is kept and drawn, and scoring and update over the same ids."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loop_helpers import TEXTS, batch_of, ids_of, rollout_of, tiny, trainer, weights
from rich.console import Console
from torch.nn.functional import pad
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import ppo_fast
from ppo_fast.loop import OptionError, TrainConfig, Trainer, preflight
from ppo_fast.loop.data.experience import joined, supported
from ppo_fast.loop.data.sequences import Cut, Rollout, Sequences
from ppo_fast.loop.log.meter import Phases
from ppo_fast.loop.sampling import truncate
from ppo_fast.loop.sampling.generate import draw, generate
from ppo_fast.loop.sampling.sampler import encode
from ppo_fast.loop.sampling.truncate import LIMIT, Truncation, held_at_most, require_support
from ppo_fast.loop.score import score
from ppo_fast.loop.update import accumulate

SOME = [
    Truncation(top_k=5),
    Truncation(top_p=0.9),
    Truncation(min_p=0.3),
    Truncation(top_k=40, top_p=0.5),
    Truncation(top_k=3, top_p=0.97, min_p=0.9),
    Truncation(top_k=1),
    Truncation(top_p=1e-9),
    Truncation(min_p=1.0),
    Truncation(top_k=10**6, top_p=0.999),
]
CPU = torch.device("cpu")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spelled(z: list[float], t: Truncation) -> tuple[list[int], float]:
    """The kept ids of one row, and the mass that is cut: sets of tokens, one after the other."""
    top = max(z)
    weight = [math.exp(x - top) for x in z]
    left = {i for i, x in enumerate(z) if x > -math.inf}
    if t.top_k and t.top_k < len(z):
        least = sorted(z)[-t.top_k]
        left = {i for i in left if z[i] >= least}
    if t.top_p < 1:
        mass, reached = math.fsum(weight[i] for i in left), 0.0
        for i in sorted(left, key=lambda i: -z[i]):
            reached += weight[i]
            if reached >= t.top_p * mass:
                left = {j for j in left if z[j] >= z[i]}
                break
    largest = max(weight[i] for i in left)
    left = {i for i in left if weight[i] >= t.min_p * largest}
    kept = math.fsum(weight[i] for i in left) / math.fsum(weight)
    return sorted(left), 1 - kept


def rows_of(mask: torch.Tensor) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in mask]


def some_logits(n: int, vocab: int, seed: int) -> torch.Tensor:
    """Rows of flat to peaked distributions."""
    z = torch.randn(n, vocab, generator=seeded(seed), dtype=torch.float64)
    return z * torch.linspace(0.01, 6, n, dtype=torch.float64)[:, None]


@pytest.mark.parametrize("t", SOME, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 300, 1500])
def test_the_kept_set_is_the_one_spelled_out(vocab: int, t: Truncation) -> None:
    z = some_logits(8, vocab, vocab)
    z[1, 3:] = -torch.inf
    z[2, vocab // 2 :] = torch.where(torch.arange(vocab - vocab // 2) > 0, -torch.inf, 1.0)
    kept, rows, ids, counts, cut, limited = t.choose(z)
    assert torch.equal(kept.nonzero(), torch.stack([rows, ids], 1))
    assert counts.tolist() == kept.sum(1).tolist()
    for i, row in enumerate(z.tolist()):
        want, mass = spelled(row, t)
        assert kept[i].nonzero().flatten().tolist() == want
        # sums of at most 1500 terms of probabilities whose sum is 1
        assert float(cut[i]) == pytest.approx(mass, rel=0, abs=1500 * 2**-53)
    assert not limited.any()


@pytest.mark.parametrize("t", SOME, ids=str)
def test_ties_are_kept_together_wherever_they_stand(t: Truncation) -> None:
    """Logits of few values: all tokens of the last value that is reached, at any ids."""
    z = (some_logits(8, 700, 1) * 2).round()
    kept = rows_of(t.choose(z).kept)
    assert kept == [spelled(row, t)[0] for row in z.tolist()]
    order = torch.randperm(700, generator=seeded(2))
    moved = rows_of(t.choose(z[:, order]).kept)
    assert [sorted(order[row].tolist()) for row in moved] == kept


@pytest.mark.parametrize("t", [x for x in SOME if x.top_p > 1e-6], ids=str)
def test_the_kept_set_is_that_of_transformers_warpers(t: Truncation) -> None:
    z = some_logits(16, 1000, 3)
    warped = TopKLogitsWarper(t.top_k)(None, z) if t.top_k else z
    warped = TopPLogitsWarper(t.top_p)(None, warped)
    warped = MinPLogitsWarper(t.min_p)(None, warped)
    assert torch.equal(t.choose(z).kept, warped.isfinite())


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two threads, among which torch would share a long row."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("t", [*SOME, Truncation(top_p=0.99999)], ids=str)
@pytest.mark.parametrize(("dtype", "vocab"), [(torch.float32, 49152), (torch.float64, 6000)])
def test_a_row_is_cut_by_itself(t: Truncation, dtype: torch.dtype, vocab: int) -> None:
    z = some_logits(6, vocab, 4).to(dtype)
    together = t.choose(z)
    for i in range(6):
        alone = t.choose(z[i : i + 1])
        assert torch.equal(together.kept[i], alone.kept[0])
        # differences of sums over all six rows, which are at most 6
        bound = 6 * vocab * 6 * 2**-53
        assert float(together.mass[i]) == pytest.approx(float(alone.mass), rel=0, abs=bound)


def test_a_long_rows_mass_is_summed_in_one_order(two_threads: None) -> None:
    """Top-p compares it with sums of probabilities: its last bit may decide on a token."""
    probs = torch.softmax(some_logits(6, 49152, 4).float(), -1)
    together = truncate._mass(probs)
    alone = torch.cat([truncate._mass(row[None]) for row in probs])
    assert torch.equal(together, alone)


def test_at_most_so_many_ids_are_kept() -> None:
    """The likeliest; of those that tie for the last place the ones of the lowest ids."""
    z = torch.zeros(3, LIMIT + 500, dtype=torch.float64)
    z[0] = torch.linspace(1, 0, LIMIT + 500)
    z[1, 1000:1200] = -1.0
    z[2, :500] = -50.0
    kept, _, _, counts, cut, limited = Truncation(top_p=0.999999).choose(z)
    assert limited.tolist() == [True, True, False]
    assert kept.sum(1).tolist() == counts.tolist() == [LIMIT] * 3
    assert kept[0, :LIMIT].all() and kept[2, 500:].all()
    assert rows_of(kept)[1] == [*range(1000), *range(1200, LIMIT + 200)]
    probs = torch.softmax(z, -1)
    torch.testing.assert_close(cut, (probs * ~kept).sum(1), rtol=0, atol=5000 * 2**-53)


def test_draws_invert_the_cdf_of_what_is_kept_in_the_order_of_ids(tmp_path: Path) -> None:
    """Sampling of the tiny model with ended rows that leave, row by row and by whole forwards."""
    model, tokenizer = tiny(torch.float64)
    tokens, attention = encode(tokenizer, TEXTS * 2, CPU)
    t, temperature, eos = Truncation(top_k=100, top_p=0.7), 0.8, list(range(0, 300, 4))
    options = {"max_new_tokens": 6, "temperature": temperature, "eos": eos, "truncation": t}
    found = generate(model, tokens, attention, generator=seeded(6), backend="reference", **options)
    uniforms = torch.rand(6, 16, generator=seeded(6), dtype=torch.float64)
    support, mask = found.seqs.support, found.seqs.mask
    assert support is not None and found.cut is not None
    width, ids = mask.shape[1], ids_of(support)
    assert mask.sum(1).min() < width and len(ids) == mask.numel()
    for i, (row, seen) in enumerate(zip(tokens, attention, strict=True)):
        text = row[seen.bool()].tolist()
        for step in range(width):
            if not mask[i, step]:
                assert ids[i * width + step] == [] and found.cut.mass[i, step] == 0
                continue
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]
            z = (logits / temperature).tolist()
            kept, cut = spelled(z, t)
            top = max(z)
            weight = [math.exp(z[k] - top) for k in kept]
            share = float(uniforms[step, i]) * math.fsum(weight)
            at = next(n for n in range(len(kept)) if math.fsum(weight[: n + 1]) > share)
            assert ids[i * width + step] == kept
            assert int(found.seqs.response[i, step]) == kept[at]
            # fp64 sums in another order: 2**-53 times a condition number below 1e4
            own = math.log(weight[at] / math.fsum(weight))
            assert float(found.logprobs[i, step]) == pytest.approx(own, rel=0, abs=1e-12)
            assert float(found.cut.mass[i, step]) == pytest.approx(cut, rel=0, abs=1e-12)
            text.append(kept[at])


@pytest.mark.parametrize("share", [[0, 2, 4, 6], [5], [7, 0, 1, 2, 3, 4, 6]])
def test_a_share_of_the_batch_draws_and_keeps_what_the_whole_does(share: list[int]) -> None:
    model, tokenizer = tiny(torch.float64)
    tokens, attention = encode(tokenizer, TEXTS, CPU)
    options: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.0, "eos": [0]}
    options |= {"backend": "reference", "truncation": Truncation(top_p=0.8)}
    whole = generate(model, tokens, attention, generator=seeded(3), **options)
    rows = torch.tensor(share)
    part = generate(
        model, tokens[rows], attention[rows], generator=seeded(3), rows=rows, total=8, **options
    )
    want = whole.rows(rows)
    assert torch.equal(part.seqs.response, want.seqs.response)
    assert ids_of(part.seqs.support) == ids_of(want.seqs.support)
    torch.testing.assert_close(part.logprobs, want.logprobs, rtol=0, atol=1e-12)
    assert part.cut is not None and want.cut is not None
    torch.testing.assert_close(part.cut.mass, want.cut.mass, rtol=0, atol=1e-12)


@pytest.mark.parametrize("by", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_named(by: float) -> None:
    model, tokenizer = tiny()
    tokens, attention = encode(tokenizer, TEXTS[:2], CPU)
    with torch.no_grad():
        model.model.norm.weight[0] = by
    options: dict[str, Any] = {"max_new_tokens": 2, "temperature": 1.0, "eos": [0]}
    with pytest.raises(FloatingPointError, match=r"must be finite, got others for rows \[0, 1\]"):
        generate(
            model,
            tokens,
            attention,
            generator=seeded(8),
            backend="reference",
            truncation=Truncation(top_p=0.9),
            **options,
        )


def test_a_truncation_that_keeps_all_draws_the_tokens_of_none(tmp_path: Path) -> None:
    plain, full = trainer(tmp_path / "a"), trainer(tmp_path / "b", top_k=10**6)
    one, other = rollout_of(plain), rollout_of(full)
    assert torch.equal(one.seqs.tokens, other.seqs.tokens) and one.seqs.support is None
    assert other.seqs.support is not None and other.cut is not None
    assert set(map(len, ids_of(other.seqs.flat_support()))) == {300}
    assert float(other.cut.mass.max()) <= 300 * 2**-53


OPTIONS = [{"top_p": 0.9}, {"top_k": 4}, {"min_p": 0.7, "temperature": 0.7}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("micro_batch", [1, 8])
@pytest.mark.parametrize("head", ["linear", "logits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_first_ratio_is_one(
    tmp_path: Path, dtype: torch.dtype, head: str, micro_batch: int, options: dict[str, Any]
) -> None:
    """To the bit, in which `unchanged` holds the update to it; log-probs are over what is kept."""
    t = trainer(tmp_path, dtype=dtype, head=head, micro_batch=micro_batch, **options)
    t.step()  # policy and reference differ
    rollout, batch, plan = batch_of(t)
    seqs = batch.seqs
    stats = accumulate(t.agent, batch, plan[0], 0.0, t.backend, unchanged=True)
    assert stats is not None and stats.compute()["ratio_min"] == stats.compute()["ratio_max"] == 1
    bound = 1e4 * (2**-53 if dtype == torch.float64 else 2**-24)
    for tower, got in ((t.agent.policy, batch.scored.old), (t.agent.reference, batch.scored.ref)):
        with torch.no_grad():
            want = dense(t, tower.logits(seqs)[0], seqs)
        torch.testing.assert_close(seqs.flat(got), want, rtol=0, atol=bound)
    torch.testing.assert_close(rollout.logprobs, batch.scored.old, rtol=0, atol=bound)


def dense(t: Trainer, logits: torch.Tensor, seqs: Any) -> torch.Tensor:
    """Log-probs of the kept tokens by a log-softmax over logits that are -inf where cut."""
    masked = torch.full_like(logits, -torch.inf)
    for i, ids in enumerate(ids_of(seqs.flat_support())):
        masked[i, ids] = logits[i, ids]
    every = torch.log_softmax(masked / t.config.temperature, -1)
    return every.gather(1, seqs.flat(seqs.response)[:, None]).squeeze(1)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("head", ["linear", "logits"])
def test_gradients_are_those_of_a_dense_softmax_over_what_is_kept(
    tmp_path: Path, head: str, backend: str
) -> None:
    options = {"top_k": 20, "top_p": 0.9, "vf_coef": 0.0, "loss_kl_coef": 0.3}
    t = trainer(tmp_path, dtype=torch.float64, head=head, backend=backend, **options)
    t.step()
    _, batch, plan = batch_of(t)
    accumulate(t.agent, batch, plan[0], 0.3, t.backend)
    model = t.agent.policy.model
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    t.agent.discard()
    rows = torch.cat(plan[0])
    part = batch.rows(rows)
    new = dense(t, t.agent.policy.logits(part.seqs)[0], part.seqs)
    whole = ppo_fast.whiten(batch.advantages, moments=batch.moments)[rows]
    old, ref, white = (part.seqs.flat(x) for x in (part.scored.old, part.scored.ref, whole))
    k3 = (ref - new).exp() - 1 - (ref - new)  # Schulman 2020
    (-(new - old).exp() * white + 0.3 * k3).mean().backward()
    want = [p.grad for p in model.parameters() if p.grad is not None]
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11 * float(b.abs().max()))


@pytest.mark.parametrize("variant", ["gspo", "cispo", "sapo", "dppo-kl", "gmpo", "clip-cov"])
def test_every_loss_learns_over_what_is_kept(tmp_path: Path, variant: str) -> None:
    record = trainer(tmp_path, variant=variant, top_p=0.8).step()
    assert record["steps"] == 4 and record["support_size"] < 300
    assert record["ratio_min"] < 1 < record["ratio_max"]


@pytest.mark.parametrize("head", ["linear", "logits"])
def test_one_kept_token_leaves_nothing_to_learn(tmp_path: Path, head: str) -> None:
    """Greedy: each token has probability 1, whatever the weights."""
    record = trainer(tmp_path, head=head, top_k=1, vf_coef=0.0).step()
    assert record["support_size"] == 1 and 0 < record["support_cut"] < 1
    assert record["entropy"] == record["kl"] == record["rollout_gap_max"] == 0
    assert record["grad_norm"] == 0 and record["ratio_min"] == record["ratio_max"] == 1


def test_the_log_counts_what_was_kept(tmp_path: Path) -> None:
    t = trainer(tmp_path, top_p=0.9)
    rollout = rollout_of(t)
    seqs = rollout.seqs.kept([False] * 3 + [True] * 5)
    slots = zip(ids_of(seqs.support), seqs.mask.flatten().tolist(), strict=True)
    sizes = [len(ids) for ids, kept in slots if kept]
    assert len(sizes) == int(seqs.mask.sum()) < int(rollout.seqs.mask.sum())
    assert rollout.cut is not None and seqs.support is not None
    assert supported(seqs, rollout) == {
        "support_size": pytest.approx(sum(sizes) / len(sizes), rel=1e-12),
        "support_none": 0,
        "support_mb": (4 * len(seqs.support.ids) + 8 * (seqs.mask.numel() + 1)) / 1e6,
        "support_cut": pytest.approx(float(rollout.cut.mass[seqs.mask].mean()), rel=1e-12),
        "support_limited": 0,
    }
    limited = rollout.cut._replace(limited=torch.ones_like(seqs.mask))
    assert supported(seqs, rollout._replace(cut=limited))["support_limited"] == len(sizes)
    record = t.step()
    assert 0.05 < record["support_cut"] < 0.1 and record["support_limited"] == 0
    assert t.last_batch is not None and t.last_batch.rollout.seqs.support is None
    plain = trainer(tmp_path / "plain").step()
    assert not [name for name in plain if name.startswith("support")]


def test_rollouts_that_are_joined_keep_their_ids(tmp_path: Path) -> None:
    """A narrow one and a wide one, of rows in another order."""
    t = trainer(tmp_path, top_p=0.8)
    wide, other = (
        t.collector.sample(t.prompts.next(8), Phases(CPU), lambda scores: scores) for _ in range(2)
    )
    (tokens, attention, mask, support), logprobs, cut = other.rollout
    width, short = mask.shape[1], mask.shape[1] - 2
    assert support is not None and cut is not None
    slots = torch.arange(8 * width).view(8, width)[:, :short].flatten()
    seqs = Sequences(tokens[:, :-2], attention[:, :-2], mask[:, :-2], support.rows(slots))
    less = Rollout(seqs, logprobs[:, :-2], Cut(*(x[:, :-2] for x in cut)))
    narrow = other._replace(rollout=less)
    found = joined([narrow.rows([3, 0]), wide.rows([5])])
    every, of_wide = ids_of(support), ids_of(wide.rollout.seqs.support)
    want = [every[i * width + k] if k < short else [] for i in (3, 0) for k in range(width)]
    assert ids_of(found.rollout.seqs.support) == want + of_wide[5 * width : 6 * width]
    assert found.rollout.cut is not None and wide.rollout.cut is not None
    masses = pad(cut.mass[[3, 0], :-2], (0, 2))
    assert torch.equal(found.rollout.cut.mass[:2], masses)
    assert torch.equal(found.rollout.cut.mass[2], wide.rollout.cut.mass[5])


def test_filtered_groups_learn_over_what_was_kept(tmp_path: Path) -> None:
    """Of several rollouts: the first ratio, which the update holds to 1, is of joined ones."""
    options: dict[str, Any] = {"group": 2, "advantages": "grpo", "dynamic_filtering": 3}

    def reward(prompts: list[str], texts: list[str]) -> list[float]:
        return [float(len(text) % 2) for text in texts]

    record, sample = trainer(tmp_path, reward, top_p=0.8, **options).iteration()
    assert record["rollouts"] > 1 and record["steps"] == 4 and record["support_size"] < 300
    seqs = sample.rollout.seqs
    tokens = seqs.flat(seqs.response).tolist()
    assert all(x in ids for x, ids in zip(tokens, ids_of(seqs.flat_support()), strict=True))


def test_scoring_in_halves_is_over_the_same_ids(tmp_path: Path) -> None:
    t = trainer(tmp_path, dtype=torch.float64, top_p=0.8)
    _, batch, plan = batch_of(t)
    parts = [rows for part in plan for rows in part]
    t.agent.memory.halved = True
    again = score(t.agent, batch.seqs, parts, t.backend)
    torch.testing.assert_close(again.old, batch.scored.old, rtol=0, atol=1e-12)


@pytest.mark.parametrize("head", ["linear", "logits"])
def test_a_resumed_run_ends_with_the_bits_of_the_whole(tmp_path: Path, head: str) -> None:
    options = {"top_p": 0.9, "min_p": 0.01, "head": head, "save_every": 1}
    whole = trainer(tmp_path / "a", updates=2, **options)
    whole.step(), whole.step()
    trainer(tmp_path / "b", updates=1, **options).run(Console(quiet=True))
    later = trainer(tmp_path / "b", updates=2, resume=True, **options)
    later.begin(lambda _: None)
    later.step(), later.close()
    assert all(map(torch.equal, weights(whole), weights(later)))
    with pytest.raises(ValueError, match=r"resume: top_p is 0\.8, the checkpoint's is 0\.9"):
        trainer(tmp_path / "b", updates=4, resume=True, **(options | {"top_p": 0.8})).begin()


def test_evaluations_draw_from_what_is_kept(tmp_path: Path) -> None:
    """Nothing is left to chance with one token: all completions of a prompt are the same."""
    options: dict[str, Any] = {"eval_every": 1, "eval_samples": 3, "eval_prompts": 2}
    record = trainer(tmp_path, top_k=1, **options).step()
    assert record["eval_reward"] == pytest.approx(record["eval_best"], rel=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": -1}, "top_k must be at least 0, got -1"),
        ({"top_k": 2.0}, "top_k must be a whole number, got 2.0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        ({"min_p": -0.1}, r"min_p must be in \[0, 1\], got -0.1"),
        ({"min_p": 2}, r"min_p must be in \[0, 1\], got 2"),
        ({"top_p": 0.9, "transitions": Path("x")}, "top_p must be 1.0 with transitions, got 0.9"),
        ({"top_k": 9, "transitions": Path("x")}, "top_k must be 0 with transitions, got 9"),
    ],
)
def test_options_out_of_their_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=f"^TrainConfig: {message}$"):
        TrainConfig(**options)


def test_a_backend_without_supports_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = "^backend must be triton, cpu or reference with {}, got 'cuda'$"
    config = TrainConfig(top_p=0.9, out=tmp_path, model="tiny").resolved()
    with monkeypatch.context() as patch:
        patch.setattr(preflight, "select", lambda *_: "cuda")
        with pytest.raises(OptionError, match=message.format(r"top_p 0\.9")):
            preflight.check(config, CPU, first=True)
        preflight.check(dataclasses.replace(config, top_p=1.0), CPU, first=True)
    with monkeypatch.context() as patch:
        patch.setattr("ppo_fast.loop.ppo.select", lambda *_: "cuda")
        with pytest.raises(OptionError, match=message.format("top_k 3")):
            trainer(tmp_path, top_k=3)
    with pytest.raises(OptionError, match=message.format("transitions that have support_ids")):
        require_support("cuda", TrainConfig(), stored=True)
    require_support("triton", config, stored=True)


def test_the_memory_of_the_supports_is_said() -> None:
    config = TrainConfig(batch=8, group=4, max_new_tokens=100, top_p=0.9)
    assert held_at_most(config, 10**5) == (
        "an update's kept ids take at most 52.5 MB (3200 tokens, 4096 ids each)"
    )
    few = dataclasses.replace(config, top_k=20, dynamic_filtering=3)
    assert held_at_most(few, 10**5) == (
        "an update's kept ids take at most 1.1 MB"
        " (12800 tokens, 20 ids each, more only where logits tie)"
    )


@given(st.lists(st.integers(-6, 6), min_size=1, max_size=40), st.integers(0, 45), st.data())
@settings(deadline=None)
def test_any_row_keeps_what_is_spelled_out(row: list[int], k: int, data: Any) -> None:
    p = data.draw(st.sampled_from([0.1, 0.37, 0.61, 0.93, 1.0]))
    m = data.draw(st.sampled_from([0.0, 0.05, 0.3, 1.0]))
    t = Truncation(k, p, m)
    z = torch.tensor([[0.731 * x for x in row]], dtype=torch.float64)
    kept = rows_of(t.choose(z).kept)[0]
    assert kept == spelled(z[0].tolist(), t)[0] and kept
    masked = torch.full_like(z, -torch.inf)
    masked[0, kept] = z[0, kept]
    for u in (0.0, 1 - 2**-53):
        assert int(draw(masked, torch.tensor([u], dtype=torch.float64), 1.0)) in kept
