"""Groups of completions: baselines without a critic, filtering, truncated and stopped ones."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_helpers import TEXTS, batch_of, gradients, tiny, trainer
from rich.console import Console

import ppo_fast
from ppo_fast.loop import TrainConfig
from ppo_fast.loop.data.experience import Experience, advantages, joined
from ppo_fast.loop.data.sequences import Rollout, Scores, Sequences
from ppo_fast.loop.log.meter import Phases
from ppo_fast.loop.rewards import letters
from ppo_fast.loop.sampling.sampler import completions
from ppo_fast.loop.update import accumulate, forward, logprobs, numbers

QUIET = Console(quiet=True)
FP64 = 1e-12


def grouped(out: Path, *args: Any, **options: Any) -> Any:
    """Four prompts, two completions each, of which one token in four is an end."""
    fixed = {"advantages": "grpo", "batch": 4, "group": 2, "kl_coef": 0.0, "loss_kl_coef": 0.0}
    model, tokenizer = options.pop("model_of", None) or tiny(options.get("dtype", torch.float32))
    model.generation_config.eos_token_id = list(range(0, 300, 4))
    return trainer(out, *args, model_of=(model, tokenizer), **(fixed | options))


@pytest.mark.parametrize("baseline", ["grpo", "rloo", "dr_grpo", "opo", "reinforce++"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.5])
def test_advantages_of_a_batch(tmp_path: Path, baseline: str, kl_coef: float) -> None:
    """Every kept token has its completion's, of the score less the sequence's KL."""
    t = grouped(
        tmp_path, dtype=torch.float64, advantages=baseline, kl_coef=kl_coef, group=3, batch=3
    )
    with torch.no_grad():  # away from the reference, so that there is a KL
        for p in t.agent.parameters:
            p.mul_(1.1)
    dropped = {4: "no reward"}
    scores = Scores([1.0, 2.0, 4.0, 1.0, 0.0, 3.0, 2.0, 2.0, -1.0], dropped)
    rollout, batch, _ = batch_of(t, scores)
    mask = batch.seqs.mask
    kl = (batch.scored.old - batch.scored.ref).masked_fill(~mask, 0).sum(1)
    assert kl[mask.any(1)].abs().min() > 0
    kept = [i for i in range(9) if i != 4]
    shaped = torch.tensor(scores.values, dtype=torch.float64) - kl_coef * kl
    lengths = rollout.seqs.mask.sum(1)[kept] if baseline == "opo" else None
    want = ppo_fast.group_advantages(
        shaped[kept], torch.tensor(kept) // 3, baseline=baseline, lengths=lengths
    )
    for i, a in zip(kept, want.tolist(), strict=True):
        assert batch.advantages[i][mask[i]].tolist() == pytest.approx(
            [a] * int(mask[i].sum()), abs=FP64
        )
    assert not batch.advantages[~mask].any() and not mask[4].any()
    assert batch.moments is None and not batch.returns.any()


def test_two_scores_of_a_group_by_hand(tmp_path: Path) -> None:
    t = grouped(tmp_path, dtype=torch.float64)
    _, batch, _ = batch_of(t, Scores([1.0, 3.0, 5.0, 5.0, 0.0, 1.0, 2.0, 4.0]))
    first = [row[m][0].item() for row, m in zip(batch.advantages, batch.seqs.mask, strict=True)]
    half = 1 / (math.sqrt(2) + 1e-6)  # (1 - 2) / (sqrt(2) + eps)
    tenth = 0.5 / (math.sqrt(0.5) + 1e-6)
    want = [-half, half, 0.0, 0.0, -tenth, tenth, -half, half]
    assert first == pytest.approx(want, abs=FP64)


def test_a_run_without_a_critic(tmp_path: Path) -> None:
    t = grouped(tmp_path, updates=3, save_every=2, warmup=2)
    assert t.agent.critic is None
    asked: list[list[str]] = []

    def reward(prompts: list[str], texts: list[str]) -> list[float]:
        asked.append(prompts)
        return letters(prompts, texts)

    t.collector.reward = reward
    t.run(QUIET)
    assert all(p[0::2] == p[1::2] and len(set(p)) == 4 for p in asked) and len(asked) == 3
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for record in log:
        assert not {"value_loss", "vf_clip_frac", "explained_variance"} & record.keys()
        assert record["batch"] == 8 and record["steps"] == 4 and 0 <= record["groups_alike"] <= 1
        assert record["loss"] == record["policy_loss"]
    resumed = grouped(tmp_path / "again", updates=2, save_every=2, warmup=2)
    resumed.run(QUIET)
    resumed = grouped(tmp_path / "again", updates=3, save_every=2, warmup=2, resume=True)
    resumed.run(QUIET)
    for ours, theirs in zip(t.agent.parameters, resumed.agent.parameters, strict=True):
        assert torch.equal(ours, theirs)


def shift(batch: Any) -> torch.Tensor:
    """Offsets of the old log-probs, (R,): ratios of 0.7 to 1.5, which all three bounds cut."""
    return torch.linspace(-0.4, 0.35, batch.advantages.shape[1], dtype=torch.float64)


def plain_loss(t: Any, batch: Any, rows: torch.Tensor, reduction: str) -> torch.Tensor:
    """The clipped loss of one minibatch over (B, R), with the op's own divisor."""
    seqs = batch.seqs.rows(rows)
    out = forward(t.agent, seqs, batch.scored.frozen_out[rows])
    own = logprobs(t.agent, t.agent.policy, out.hidden, None, seqs, t.backend)
    return ppo_fast.ppo_loss(
        seqs.unflatten(own),
        batch.scored.old[rows] + shift(batch),
        batch.advantages[rows],
        seqs.mask,
        clip_low=0.1,
        clip_high=0.28,
        dual_clip=1.2,
        reduction=reduction,
        denom=int(seqs.mask.any(1).sum()) * 6 if reduction.endswith("norm") else None,
        backend="reference",
    ).loss


REDUCTIONS = (
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_reductions_do_not_depend_on_the_split(
    tmp_path: Path, reduction: str, micro_batch: int
) -> None:
    t = grouped(
        tmp_path,
        dtype=torch.float64,
        reduction=reduction,
        micro_batch=micro_batch,
        minibatches=1,
        clip_low=0.1,
        clip_high=0.28,
        dual_clip=1.2,
    )
    _, batch, plan = batch_of(t, Scores([1.0, 3.0, 5.0, 2.0, 0.0, 1.0, 2.0, 4.0], {3: "none"}))
    assert len(set(batch.seqs.mask.sum(1).tolist())) > 2  # lengths differ
    rows = torch.cat(plan[0])
    plain_loss(t, batch, rows, reduction).backward()
    want = gradients(t)
    t.agent.discard()
    moved = batch._replace(scored=batch.scored._replace(old=batch.scored.old + shift(batch)))
    stats = accumulate(t.agent, moved, plan[0], 0.0, t.backend)
    assert stats is not None
    loss = plain_loss(t, batch, rows, reduction).item()
    assert numbers(t.agent, stats)["loss"] == pytest.approx(loss, abs=FP64)
    largest = max(float(x.abs().max()) for x in want)
    computed = stats.compute()
    assert largest > 0 and computed["clip_frac_high"] > 0 and computed["clip_frac_dual"] > 0
    for ours, theirs in zip(gradients(t), want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=FP64 * largest)


def by_prompt(alike: set[str]) -> Any:
    """A reward that differs within a group, but for the prompts `alike`."""
    counts = iter(range(10**6))

    def reward(prompts: list[str], texts: list[str]) -> list[float]:
        return [1.0 if p in alike else float(next(counts) % 2) for p in prompts]

    return reward


def test_groups_that_differ_fill_the_batch(tmp_path: Path) -> None:
    alike = set(TEXTS[:5])
    t = grouped(tmp_path, by_prompt(alike), dynamic_filtering=9, batch=3)
    record, sample = t.iteration()
    assert not set(sample.prompts) & alike and len(sample.prompts) == 6
    assert record["rollouts"] > 1 and 0 < record["groups_alike"] < 1
    assert record["batch"] == 6 and sample.scores.values == [0.0, 1.0] * 3
    groups = record["rollouts"] * 3
    lost = round(record["groups_alike"] * groups)
    # Of everything that was sampled: what is filtered out is not forgotten.
    assert record["reward"] == pytest.approx((lost + 0.5 * (groups - lost)) / groups, abs=1e-12)
    assert record["steps"] == 4 and record["ratio_max"] > 1


def test_what_lacks_is_made_up_of_groups_that_are_alike(tmp_path: Path) -> None:
    t = grouped(tmp_path, by_prompt(set(TEXTS[1:])), dynamic_filtering=2, batch=3)
    record, sample = t.iteration()
    assert record["rollouts"] == 2 and record["groups_alike"] == pytest.approx(5 / 6)
    assert sample.prompts[:2] == [TEXTS[0]] * 2 and len(sample.prompts) == 6
    assert sample.scores.values == [0.0, 1.0] + [1.0] * 4


def test_a_full_batch_takes_one_rollout(tmp_path: Path) -> None:
    record, _ = grouped(tmp_path, by_prompt(set()), dynamic_filtering=5).iteration()
    assert record["rollouts"] == 1 and record["groups_alike"] == 0.0


def test_filtered_groups_keep_their_bits(tmp_path: Path) -> None:
    """Joined with wider ones, a sample has the tokens, log-probs and mask it was drawn with."""
    t = grouped(tmp_path)
    prompts = [t.prompts.next(4) for _ in range(2)]
    both = [
        Experience([p.text for p in ps], ["x"] * 4, r, Scores([1.0] * 4), [True] * 4)
        for ps in prompts
        if (r := t.sampler.rollout([p.text for p in ps], t.backend))
    ]
    narrow = both[0].rows([2])
    cut = Rollout(
        Sequences(*(x[:, :-3] for x in narrow.rollout.seqs[:3])), narrow.rollout.logprobs[:, :-3]
    )
    one = joined([narrow._replace(rollout=cut), both[1]])
    assert one.prompts == [both[0].prompts[2], *both[1].prompts]
    for k, (source, i) in enumerate([(cut, 0), *((both[1].rollout, i) for i in range(4))]):
        mask, attended = source.seqs.mask[i], source.seqs.attention[i].bool()
        ours = one.rollout.seqs
        assert torch.equal(
            ours.tokens[k][ours.attention[k].bool()], source.seqs.tokens[i][attended]
        )
        assert torch.equal(one.rollout.logprobs[k][ours.mask[k]], source.logprobs[i][mask])
        assert torch.equal(ours.response[k][ours.mask[k]], source.seqs.response[i][mask])


def test_truncated_completions_leave_the_loss_and_not_the_baseline(tmp_path: Path) -> None:
    t = grouped(tmp_path, keep_truncated=False)
    sample, _ = t.collector.groups(t.prompts.next, Phases(t.device), lambda scores: scores)
    assert any(sample.ended) and not all(sample.ended)
    seqs = sample.learnt(t.config)
    assert seqs.mask.any(1).tolist() == sample.ended
    kept = grouped(tmp_path, keep_truncated=True)
    assert sample.learnt(kept.config).mask.any(1).all()


def test_the_kl_is_that_of_the_sequences_in_the_loss(tmp_path: Path) -> None:
    """Truncated ones that are left out are scored by no forward, and count for no 0 either."""
    t = grouped(tmp_path, dtype=torch.float64)
    rollout, batch, _ = batch_of(t)
    scores = Scores([1.0] * 8)
    moved = batch.scored._replace(ref=batch.scored.old - 0.5)
    seqs = rollout.seqs.kept([i < 2 for i in range(8)])
    _, kl = advantages(t.config, 0.0, seqs, moved, scores, t.backend)
    assert kl == pytest.approx(0.5 * int(seqs.mask.sum()) / 2, abs=FP64)


def test_a_stop_text_ends_a_completion(tmp_path: Path) -> None:
    model, tokenizer = tiny()
    free = grouped(tmp_path, model_of=(model, tokenizer), max_new_tokens=12)
    prompts = [p.text for p in free.prompts.next(4)] * 2
    rollout = free.sampler.rollout(prompts, free.backend)
    texts, _ = free.sampler.completions(rollout.seqs)
    stop = next(c for c in sorted(set("".join(texts))) if sum(c in text for text in texts) >= 3)
    t = grouped(tmp_path, model_of=(model, tokenizer), max_new_tokens=12, stop=(stop, "qqq"))
    stopped = t.sampler.rollout(prompts, t.backend)
    found, ended = t.sampler.completions(stopped.seqs)
    for i, (before, after) in enumerate(zip(texts, found, strict=True)):
        mask = stopped.seqs.mask[i]
        tokens = stopped.seqs.response[i][mask]
        assert torch.equal(tokens, rollout.seqs.response[i][: len(tokens)])
        assert after == before.partition(stop)[0]
        if stop in before:  # it ends with the token that completes the text
            assert stop in tokenizer.decode(tokens) and ended[i]
            assert stop not in tokenizer.decode(tokens[:-1])
    assert sum(map(len, found)) < sum(map(len, texts))


def test_a_stop_text_may_be_a_special_token(tmp_path: Path) -> None:
    """It ends a completion as an EOS does, though no text shows it."""
    model, tokenizer = tiny()
    special = tokenizer.eos_token
    t = grouped(tmp_path, model_of=(model, tokenizer))
    rollout = t.sampler.rollout(TEXTS, t.backend)
    rows = rollout.seqs.response.clone()
    rows[0, 2] = tokenizer.eos_token_id
    seqs = rollout.seqs._replace(tokens=rows, mask=torch.ones_like(rows, dtype=torch.bool))
    _, ended = completions(tokenizer, seqs, [], (special,))
    assert ended == [tokenizer.eos_token_id in row for row in rows.tolist()] and ended[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"advantages": "grpo", "group": 1}, "group must be above 1 with grpo, got 1"),
        ({"advantages": "rloo", "critic_lr": 0.1}, "critic_lr must be absent with rloo, which"),
        ({"dynamic_filtering": 3}, "dynamic_filtering must be 0 with a group of 1, got 3"),
        ({"overlong_buffer": 9, "max_new_tokens": 8}, "overlong_buffer must be at most 8"),
        ({"stop": ("",)}, "stop must be texts that are not empty"),
        ({"dual_clip": 1.0}, "dual_clip must be above 1, got 1.0"),
        ({"dual_clip": 2.0, "variant": "cispo"}, "dual_clip must be absent with variant cispo"),
        ({"clip_low": 1.5}, "clip_low must be at most 1, got 1.5"),
        ({"variant": "linear", "loss_kl_coef": 1.0}, "loss_kl_coef must be below 1 with variant"),
        ({"batch": 2, "group": 3, "minibatches": 7}, r"minibatches must be in \[1, 6\], got 7"),
        ({"transitions": Path("x"), "group": 2}, "group must be 1 with transitions, got 2"),
        (
            {"transitions": Path("x"), "advantages": "grpo"},
            "group must be 1 with transitions, got 4",
        ),
        ({"eval_split": "test"}, "eval_split must be absent without data, got test"),
        ({"eval_data": "x.csv"}, "eval_data must be absent with eval_every 0, got x.csv"),
        ({"lr_end": 1.5}, r"lr_end must be in \[0, 1\], got 1.5"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


def test_the_kl_stands_where_a_baselines_paper_has_it() -> None:
    grpo = TrainConfig(advantages="grpo").resolved()
    assert (grpo.batch, grpo.group, grpo.kl_coef, grpo.loss_kl_coef) == (8, 4, 0.0, 0.04)
    rloo = TrainConfig(advantages="rloo", kl_coef=0.05, group=2).resolved()
    assert (rloo.batch, rloo.group, rloo.kl_coef, rloo.loss_kl_coef) == (8, 2, 0.05, None)
    quick = TrainConfig(advantages="dr_grpo", quick=True).resolved()
    assert (quick.batch, quick.group, quick.updates, quick.kl_coef) == (8, 4, 30, 0.0)
    assert quick.sequences == 32
