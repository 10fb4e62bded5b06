"""Sampling completions with a key-value cache, keeping each token's log-probability."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import ppo_fast
from ppo_fast.loop.policy import Sequences, position_ids


class Rollout(NamedTuple):
    """Sampled sequences and the sampler's own log-probability of every token, (B, R) fp32."""

    seqs: Sequences
    logprobs: Tensor


def encode(tokenizer: Any, prompts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """Left-padded tokens and attention mask, each (B, P) int64; an empty prompt becomes an EOS."""
    rows = [tokenizer(p)["input_ids"] or [tokenizer.eos_token_id] for p in prompts]
    width = max(len(row) for row in rows)
    pad = tokenizer.pad_token_id
    tokens = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    attention = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return tokens.to(device), attention.to(device)


@torch.no_grad()
def generate(
    model: Any,
    tokens: Tensor,
    attention: Tensor,
    *,
    max_new_tokens: int,
    temperature: float,
    eos: list[int],
    generator: torch.Generator,
    backend: str,
) -> Rollout:
    """Sample one completion per left-padded prompt, tokens and attention (B, P).

    One step holds (B, V) logits and keeps (B,) numbers of them. A row that has ended is fed its
    EOS, masked everywhere, until all rows have.
    """
    stops = torch.tensor(eos, device=tokens.device)
    alive = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
    sampled, masks, logprobs = [], [], []
    step, positions, cache = tokens, position_ids(attention), None
    for _ in range(max_new_tokens):
        out = model(
            input_ids=step,
            attention_mask=attention,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits, cache = out.logits[:, -1], out.past_key_values
        probs = torch.softmax(logits.float() / temperature, dim=-1)
        drawn = torch.multinomial(probs, 1, generator=generator).squeeze(1)
        token = torch.where(alive, drawn, stops[0])
        scored = ppo_fast.token_logprobs(
            logits, token, temperature=temperature, mask=alive, backend=backend
        )
        sampled.append(token)
        masks.append(alive)
        logprobs.append(scored.logprobs)
        attention = torch.cat([attention, alive[:, None].to(attention.dtype)], dim=1)
        alive = alive & ~torch.isin(token, stops)
        if not alive.any():
            break
        step, positions = token[:, None], positions[:, -1:] + 1
    tokens = torch.cat([tokens, torch.stack(sampled, dim=1)], dim=1)
    return Rollout(
        Sequences(tokens, attention, torch.stack(masks, dim=1)), torch.stack(logprobs, dim=1)
    )


def completions(tokenizer: Any, seqs: Sequences) -> list[str]:
    """The text of each response, without its EOS and padding."""
    return [
        tokenizer.decode(row[kept], skip_special_tokens=True)
        for row, kept in zip(seqs.response.cpu(), seqs.mask.cpu(), strict=True)
    ]
