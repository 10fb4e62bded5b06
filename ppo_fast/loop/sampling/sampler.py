"""Sampler of a run: prompts to tokens, completions across ranks, and their text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ppo_fast.loop.config import OptionError, TrainConfig
from ppo_fast.loop.data.sequences import Cut, Rollout, Sequences, support_of
from ppo_fast.loop.model.agent import Agent
from ppo_fast.loop.model.load import eos_ids, prompt_limit
from ppo_fast.loop.sampling.generate import generate
from ppo_fast.loop.sampling.truncate import Truncation
from ppo_fast.loop.values import require_text, tokens_within

_SPECIAL = 8  # tokens that a tokenizer may add to those of a text


class Sampler:
    """Completions of a run's prompts, drawn from `generator`.

    Each ends with one of the tokens `eos`, or with one of the texts `config.stop`.
    """

    def __init__(
        self, agent: Agent, tokenizer: Any, config: TrainConfig, device: torch.device
    ) -> None:
        self.agent, self.tokenizer, self.config, self.device = agent, tokenizer, config, device
        self.eos = eos_ids(agent.policy.model, tokenizer)
        self.truncation = Truncation.of(config)
        self.generator = torch.Generator(device).manual_seed(config.seed)

    def rollout(
        self, prompts: list[str], backend: str, generator: torch.Generator | None = None
    ) -> Rollout:
        """One completion per prompt: each rank samples those of its share, for every rank."""
        agent, model, config = self.agent, self.agent.policy.model, self.config
        limit = prompt_limit(model, config.max_new_tokens)
        tokens, attention = encode(self.tokenizer, prompts, self.device, limit)
        rows = agent.ranks.share(torch.arange(len(tokens), device=tokens.device))
        with agent.autocast(), agent.whole(model):
            mine = generate(
                model,
                tokens[rows],
                attention[rows],
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                eos=self.eos,
                generator=generator or self.generator,
                backend=backend,
                stopped=self._stopped if config.stop else None,
                rows=rows,
                total=len(tokens),
                truncation=self.truncation,
            )
        return self._gathered(mine)

    def completions(self, seqs: Sequences) -> tuple[list[str], list[bool]]:
        """The text of each response, and whether it ended by itself."""
        return completions(self.tokenizer, seqs, self.eos, self.config.stop)

    def _gathered(self, mine: Rollout) -> Rollout:
        """The rollouts of all ranks in one."""
        gather, (tokens, attention, mask, support) = self.agent.ranks.gather, mine.seqs
        if self.agent.ranks.size == 1:
            return mine
        if support is not None:
            ids = gather(support.ids[None], -1).flatten()
            support = support_of(ids[ids >= 0], gather(support.counts.view(mask.shape), 0))
        cut = None if mine.cut is None else Cut(*(gather(x, 0) for x in mine.cut))
        # Without an EOS every completion has full length, and none is padded.
        end = next(iter(self.eos), 0)
        seqs = Sequences(gather(tokens, end), gather(attention, 0), gather(mask, 0), support)
        return Rollout(seqs, gather(mine.logprobs, 0), cut)

    def _stopped(self, responses: Tensor) -> Tensor:
        rows = responses.tolist()
        return torch.tensor([_stops(self.tokenizer, row, self.config.stop) for row in rows])


def completions(
    tokenizer: Any, seqs: Sequences, eos: list[int], stops: tuple[str, ...] = ()
) -> tuple[list[str], list[bool]]:
    """The text of each response and whether it ended, with a token of `eos` or a text of `stops`.

    The text is without that end and what follows it, and without padding.
    """
    texts, ended = [], []
    for row, kept in zip(seqs.response.cpu(), seqs.mask.cpu(), strict=True):
        tokens = row[kept].tolist()
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        places = [text.find(stop) for stop in stops]
        texts.append(text[: min((at for at in places if at >= 0), default=None)])
        ended.append(any(token in eos for token in tokens) or _stops(tokenizer, tokens, stops))
    return texts, ended


def _stops(tokenizer: Any, tokens: list[int], stops: tuple[str, ...]) -> bool:
    """True for tokens whose text holds one of `stops`, which may be that of a special token."""
    text = tokenizer.decode(tokens) if stops else ""
    return any(stop in text for stop in stops)


def check_lengths(tokenizer: Any, prompts: list[str], limit: int | None) -> None:
    """Raise OptionError for the first prompt of more than `limit` tokens.

    One of so many bytes at most is not read: no common tokenizer makes more tokens of it.
    """
    for i, prompt in enumerate(prompts):
        if limit is not None and len(prompt.encode(errors="surrogatepass")) + _SPECIAL > limit:
            prompt_tokens(tokenizer, i, prompt, limit)


def prompt_tokens(tokenizer: Any, i: int, prompt: str, limit: int | None = None) -> list[int]:
    """The tokens of prompt number `i`; an empty prompt becomes an EOS.

    Raises ValueError, naming it, for one that is no text or has half a character (a lone
    surrogate), and OptionError for one of more than `limit` tokens, and for an empty one where
    there is no EOS.
    """
    row, whole = tokens_within(
        lambda text: tokenizer(text)["input_ids"], require_text(f"prompts[{i}]", prompt), limit
    )
    row = row or [tokenizer.eos_token_id]
    if row == [None]:
        raise OptionError(f"prompts[{i}] must not be empty: the tokenizer has no EOS, got ''")
    if limit is not None and len(row) > limit:
        raise OptionError(
            f"prompts[{i}] must have at most {limit} tokens, which is what max_new_tokens"
            f" leaves of the model's context, got {'' if whole else 'more than '}{len(row)}:"
            f" {prompt[:50]!r}"
        )
    return row


def encode(
    tokenizer: Any, prompts: list[str], device: torch.device, limit: int | None = None
) -> tuple[Tensor, Tensor]:
    """Left-padded tokens and attention mask, each (B, P) int64; an empty prompt becomes an EOS.

    The mask alone tells padding from text: a tokenizer may have no pad token, or use its EOS.
    Raises ValueError as `prompt_tokens` does.
    """
    rows = [prompt_tokens(tokenizer, i, prompt, limit) for i, prompt in enumerate(prompts)]
    width = max(len(row) for row in rows)
    pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    tokens = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    attention = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return tokens.to(device), attention.to(device)
