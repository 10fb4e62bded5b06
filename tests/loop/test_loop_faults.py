"""Faults in a run cost what they must, and no more."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_helpers import TEXTS, trainer, weights
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_fast.loop.rewards import RewardLengthError, letters, score
from ppo_fast.loop.rewards.text import vader

QUIET = Console(quiet=True)


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The log, refusing the NaN and Infinity that JSON does not have."""

    def refuse(name: str) -> float:
        raise ValueError(f"{name} is not JSON")

    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def assert_whole(folder: Path, updates: int) -> None:
    """The run left a log of `updates` lines, a plot and a model that loads."""
    assert [r["update"] for r in log_of(folder)] == list(range(updates))
    assert (folder / "reward.png").read_bytes()[:4] == b"\x89PNG"
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert sum(p.numel() for p in model.parameters()) > 10_000


@pytest.mark.case("R3")
@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (ValueError("boom"), "reward raised ValueError: boom"),
        (math.nan, "reward returned nan"),
        (math.inf, "reward returned inf"),
        (None, "reward returned None"),
        ("good", "reward returned 'good'"),
    ],
)
def test_a_sample_without_a_reward_is_named_and_dropped(bad: Any, reason: str) -> None:
    def reward(prompts: list[str], texts: list[str]) -> list[Any]:
        if isinstance(bad, Exception) and "c" in texts:
            raise bad
        return [bad if t == "c" else float(i) for i, t in enumerate(texts)]

    scores = score(reward, ["p"] * 4, ["a", "b", "c", "d"])
    assert scores.faults == {2: reason}
    assert scores.kept == [True, True, False, True]
    alone = isinstance(bad, Exception)  # each was asked for by itself, and so is number 0
    assert scores.values == ([0.0, 0.0, 0.0, 0.0] if alone else [0.0, 1.0, 0.0, 3.0])
    assert scores.mean == pytest.approx(0.0 if alone else 4 / 3)


@pytest.mark.case("R4")
@pytest.mark.parametrize(
    ("result", "got"), [([1.0, 2.0], "got 2"), ([], "got 0"), (None, "got None"), (0.5, "got 0.5")]
)
def test_a_wrong_number_of_rewards_stops(result: Any, got: str) -> None:
    with pytest.raises(RewardLengthError, match=f"must return 3 numbers, {got}"):
        score(lambda p, c: result, ["p"] * 3, ["c"] * 3)


def test_without_any_reward_the_mean_is_nan() -> None:
    assert math.isnan(score(lambda p, c: [None], ["p"], ["c"]).mean)  # type: ignore[list-item]


def test_a_run_goes_on_around_dropped_samples(tmp_path: Path) -> None:
    def reward(prompts: list[str], texts: list[str]) -> list[float]:
        good = letters(prompts, texts)
        return [math.nan if p == TEXTS[3] else r for p, r in zip(prompts, good, strict=True)]

    outcome = trainer(tmp_path, reward).run(QUIET)
    assert_whole(tmp_path, 3)
    records = log_of(tmp_path)
    for record in records:  # 8 prompts a batch: each is in every one
        assert list(record["dropped"].values()) == ["reward returned nan"]
        assert record["steps"] == 4
    assert all(0 <= r <= 1 for r in outcome.rewards)


@pytest.mark.case("R3")
def test_an_update_with_every_sample_dropped_changes_nothing(tmp_path: Path) -> None:
    calls: list[int] = []

    def reward(prompts: list[str], texts: list[str]) -> list[Any]:
        calls.append(1)
        return letters(prompts, texts) if len(calls) == 1 else [None] * len(prompts)

    seen: list[list[torch.Tensor]] = []
    t = trainer(tmp_path, reward)
    step = t.step
    t.step = lambda: (seen.append(weights(t)), step())[1]  # type: ignore[method-assign]
    outcome = t.run(QUIET)
    assert not all(map(torch.equal, seen[0], seen[1]))
    assert all(map(torch.equal, seen[1], seen[2])) and all(map(torch.equal, seen[2], weights(t)))
    assert [len(r["dropped"]) for r in log_of(tmp_path)] == [0, 8, 8]
    assert [r["reward"] for r in log_of(tmp_path)[1:]] == [None] * 2
    assert len(outcome.rewards) == 3
    assert_whole(tmp_path, 3)


def test_a_wrong_length_loses_no_finished_update(tmp_path: Path) -> None:
    calls: list[int] = []

    def reward(prompts: list[str], texts: list[str]) -> list[float]:
        calls.append(1)
        return letters(prompts, texts)[: 8 if len(calls) < 3 else 7]

    with pytest.raises(RewardLengthError, match="must return 8 numbers, got 7"):
        trainer(tmp_path, reward, updates=5).run(QUIET)
    assert_whole(tmp_path, 2)


def test_ctrl_c_leaves_log_plot_and_model(tmp_path: Path) -> None:
    calls: list[int] = []

    def reward(prompts: list[str], texts: list[str]) -> list[float]:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return letters(prompts, texts)

    outcome = trainer(tmp_path, reward, updates=5).run(QUIET)
    assert outcome.interrupted and len(outcome.rewards) == 3
    assert_whole(tmp_path, 3)


def test_the_saved_model_is_the_trained_one(tmp_path: Path) -> None:
    t = trainer(tmp_path)
    outcome = t.run(QUIET)
    model = AutoModelForCausalLM.from_pretrained(outcome.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(outcome.model)
    trained = t.agent.policy.model
    for (name, a), (other, b) in zip(
        model.state_dict().items(), trained.state_dict().items(), strict=True
    ):
        assert name == other and torch.equal(a, b)
    inputs = tokenizer(TEXTS[0], return_tensors="pt")
    assert inputs["input_ids"].tolist() == [t.tokenizer(TEXTS[0])["input_ids"]]
    texts = [
        m.generate(inputs["input_ids"], do_sample=False, max_new_tokens=8).tolist()
        for m in (model, trained)
    ]
    assert texts[0] == texts[1] and len(texts[0][0]) > inputs["input_ids"].shape[1]


def test_the_same_seed_gives_the_same_run(tmp_path: Path) -> None:
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        t = trainer(tmp_path / name, seed=seed)
        outcome = t.run(QUIET)
        runs.append((outcome.rewards, weights(t)))
    assert runs[0][0] == runs[1][0] != runs[2][0]
    assert all(map(torch.equal, runs[0][1], runs[1][1]))


def test_vader_scores_the_completion_alone() -> None:
    pytest.importorskip("vaderSentiment")
    rewards = vader()(["awful, horrible"] * 3, ["wonderful", "terrible", "a table"])
    assert rewards[0] == pytest.approx(0.5719) and rewards[1] < -0.4 and rewards[2] == 0.0
