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
    rows: Tensor | None = None,
    total: int | None = None,
) -> Rollout:
    """Sample one completion per left-padded prompt, tokens and attention (B, P).

    One step holds (B, V) logits and keeps (B,) numbers of them. A row that has ended is fed its
    EOS, masked everywhere, until all rows have.

    These prompts are the rows `rows`, (B,) int64, of a batch of `total` (all of it by default).
    Token t of row i is drawn with number (t, i) of the `max_new_tokens * total` uniforms that
    every call takes from `generator`: sequences do not depend on how the batch is shared out.
    """
    stops = torch.tensor(eos, device=tokens.device)
    uniforms = _uniforms(generator, max_new_tokens, len(tokens) if total is None else total)
    uniforms = (uniforms if rows is None else uniforms[:, rows]).to(tokens.device)
    alive = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
    sampled, masks, logprobs = [], [], []
    step, positions, cache = tokens, position_ids(attention), None
    for t in range(max_new_tokens):
        out = model(
            input_ids=step,
            attention_mask=attention,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits, cache = out.logits[:, -1], out.past_key_values
        token = torch.where(alive, draw(logits, uniforms[t], temperature), stops[0])
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


def draw(logits: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
    """Tokens (B,) of softmax(logits / temperature), logits (B, V), by inversion of the cdf.

    `uniforms` (B,) fp64 lie in [0, 1). The first token whose cdf exceeds a uniform's share of the
    whole sum has a width of its own, so one of probability 0 is never drawn, and the last step of
    the cdf need not be 1. fp64 keeps the widths of rare tokens far out in a large vocabulary.
    """
    cdf = torch.softmax(logits.float() / temperature, dim=-1).cumsum(-1, dtype=torch.float64)
    token = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True)
    return token.squeeze(1).clamp(max=logits.shape[-1] - 1)  # NaN logits: nothing exceeds


def _uniforms(generator: torch.Generator, steps: int, total: int) -> Tensor:
    return torch.rand(
        steps, total, generator=generator, device=generator.device, dtype=torch.float64
    )


def completions(tokenizer: Any, seqs: Sequences) -> list[str]:
    """The text of each response, without its EOS and padding."""
    return [
        tokenizer.decode(row[kept], skip_special_tokens=True)
        for row, kept in zip(seqs.response.cpu(), seqs.mask.cpu(), strict=True)
    ]
