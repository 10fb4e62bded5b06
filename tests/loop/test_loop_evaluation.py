"""Evaluations on held-out prompts, and what they leave as it was."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_helpers import TEXTS, trainer, weights
from rich.console import Console

from ppo_fast.__main__ import main
from ppo_fast.loop.data.prompts import Row
from ppo_fast.loop.evaluate import held_out
from ppo_fast.loop.log.meter import Phases
from ppo_fast.loop.rewards import letters
from ppo_fast.report.runs import load_run

QUIET = Console(quiet=True)


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_the_last_prompts_are_held_out_and_not_trained_on(tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def reward(prompts: list[str], texts: list[str]) -> list[float]:
        asked.append(prompts)
        return letters(prompts, texts)

    t = trainer(
        tmp_path,
        reward,
        prompts=[*TEXTS, TEXTS[-1]],
        updates=4,
        batch=4,
        minibatches=1,
        eval_every=2,
        eval_prompts=3,
        eval_samples=2,
    )
    held = [TEXTS[6], TEXTS[7], TEXTS[7]]
    t.run(Console(file=(out := (tmp_path / "said").open("w")), width=200)), out.close()
    evaluated = [p for p in asked if set(p) <= set(held)]
    assert [p for p in asked if set(p) & set(held)] == evaluated
    # In turns of at most a batch's four completions: two prompts, twice each, and the third one.
    assert evaluated == [[held[0]] * 2 + [held[1]] * 2, [held[2]] * 2] * 3
    log = log_of(tmp_path)
    assert ["eval_reward" in r for r in log] == [False, True, False, True]
    assert ["eval_reward_before" in r for r in log] == [True, False, False, False]
    assert all(r["eval_best"] >= r["eval_reward"] for r in log if "eval_best" in r)
    # At update 0 the plot and the report have the evaluation before any learning.
    drawn = t.history.column("eval_reward")
    assert drawn[0] == log[0]["eval_reward_before"] and drawn[1] == log[1]["eval_reward"]
    assert math.isnan(drawn[2])
    assert load_run(tmp_path, "run").records[0]["eval_best"] == log[0]["eval_best_before"]
    assert "evaluation" in log[1]["seconds"] and "evaluation" not in log[2]["seconds"]
    told = (tmp_path / "said").read_text().splitlines()
    said = [line for line in told if line.startswith("evaluation")]
    assert [line.partition(":")[0] for line in said] == [
        "evaluation before the first update",
        "evaluation after 2 updates",
        "evaluation after 4 updates",
    ]
    assert (
        f"mean reward {log[3]['eval_reward']:+.3f}, best of 2 {log[3]['eval_best']:+.3f}"
        in said[2]
    )


def test_mean_and_best_of_k(tmp_path: Path) -> None:
    """Rewards 0, 1, 2, ... in the order of the calls, every fifth one missing."""
    counts = iter(range(10**6))

    def reward(prompts: list[str], texts: list[str]) -> list[float | None]:
        numbers = [next(counts) for _ in prompts]
        return [None if n % 5 == 4 else float(n) for n in numbers]

    t = trainer(tmp_path, reward, eval_every=1, eval_prompts=2, eval_samples=3)  # type: ignore[arg-type]
    assert t.evaluation is not None
    found = t.evaluation.measure(Phases(t.device))
    assert found == {"eval_reward": (0 + 1 + 2 + 3 + 5) / 5, "eval_best": 3.5, "eval_dropped": 1}


def test_an_evaluation_changes_nothing_that_is_learnt(tmp_path: Path) -> None:
    plain = trainer(tmp_path / "a", prompts=TEXTS[:6], batch=4)
    plain.run(QUIET)
    seen = trainer(
        tmp_path / "b",
        prompts=TEXTS[:6],
        batch=4,
        eval_every=1,
        held_out=TEXTS[6:],
        eval_samples=3,
    )
    seen.run(QUIET)
    for ours, theirs in zip(weights(plain), weights(seen), strict=True):
        assert torch.equal(ours, theirs)
    rewards = [[r["reward"] for r in log_of(tmp_path / name)] for name in "ab"]
    assert rewards[0] == rewards[1]
    # The same draws each time: what differs between evaluations is the policy.
    first = seen.evaluation.measure(Phases(seen.device))  # type: ignore[union-attr]
    assert first == seen.evaluation.measure(Phases(seen.device))  # type: ignore[union-attr]
    assert first["eval_reward"] == log_of(tmp_path / "b")[-1]["eval_reward"]


def test_a_resumed_run_evaluates_as_one_that_was_not_stopped(tmp_path: Path) -> None:
    options: dict[str, Any] = {"eval_every": 2, "eval_prompts": 2, "batch": 4, "save_every": 1}
    trainer(tmp_path / "a", updates=4, **options).run(QUIET)
    trainer(tmp_path / "b", updates=2, **options).run(QUIET)
    trainer(tmp_path / "b", updates=4, resume=True, **options).run(QUIET)
    found = [[r.get("eval_reward") for r in log_of(tmp_path / name)] for name in "ab"]
    assert found[0] == found[1]


def test_rows_are_held_out_once(tmp_path: Path) -> None:
    rows = [Row(text, {"n": i}) for i, text in enumerate(["a", "b", "a", "c", "b"])]
    left, held = held_out(rows, 2)
    assert left == [rows[0], rows[2]] and held == rows[3:]
    with pytest.raises(ValueError, match=r"eval_prompts must leave prompts to train.* got 4 of 5"):
        held_out(rows, 4)
    with pytest.raises(ValueError, match="held_out must be absent with eval_every 0"):
        trainer(tmp_path, held_out=["x"])


def test_a_reward_that_learns_is_not_evaluated_with(tmp_path: Path) -> None:
    class Counting:
        calls = 0

        def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
            return letters(prompts, completions)

        def state_dict(self) -> dict[str, int]:
            return {"calls": self.calls}

    with pytest.raises(ValueError, match="eval_every must be 0 with a reward that learns"):
        trainer(tmp_path, Counting(), eval_every=1, eval_prompts=2)


def write(path: Path, prompts: list[str]) -> str:
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerows([["prompt", "level"], *([text, i] for i, text in enumerate(prompts))])
    return str(path)


def test_the_command_evaluates_on_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "train.csv", TEXTS[:5])
    held = write(tmp_path / "test.csv", TEXTS[5:])
    out = tmp_path / "run"
    line = (
        f"train --data {data} --eval-data {held} --eval-every 1 --eval-samples 2 --model tiny"
        f" --reward letters --train-layers 1 --updates 2 --batch 4 --device cpu --out {out}"
        " --max-new-tokens 4 --lr-schedule cosine --warmup 0 --weight-decay 0.1 --critic-lr 0.001"
    )
    assert main(line.split()) == 0
    said = capsys.readouterr().out
    assert "3 prompts, 0 bad rows left out" in said.replace("\n", "")
    log = log_of(out)
    assert all("eval_best" in r for r in log) and "eval_reward_before" in log[0]
    assert [r["lr"] for r in log] == [3e-4, pytest.approx(1.5e-4)]
    assert [r["critic_lr"] for r in log] == [1e-3, pytest.approx(5e-4)]
