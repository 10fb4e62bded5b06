"""Sampling of completions with a key-value cache, and of each token's log-probability."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import ppo_fast
from ppo_fast.loop.data.sequences import Rollout, Sequences
from ppo_fast.loop.model.few_rows import few_rows
from ppo_fast.loop.model.layers import UnsupportedModelError, vocabulary
from ppo_fast.loop.sampling.truncate import Kept, Truncation, scaled

# Ended rows leave once they are an eighth of the batch: what that copies of the cache, over all
# times together, is then at most eight times what is held at the beginning.
_CROWDED = 7 / 8


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
    stopped: Callable[[Tensor], Tensor] | None = None,
    truncation: Truncation | None = None,
) -> Rollout:
    """Sample one completion per left-padded prompt, tokens and attention (B, P).

    A completion ends with its first token among `eos`, which is its own, with the first for which
    `stopped` is True, (n,) bool of the responses (n, t) so far, or with its `max_new_tokens`-th.
    One step holds (B, V) logits and keeps (B,) numbers of them; with a `truncation` also the ids
    that each token was drawn from, over which the log-probabilities are then.

    These prompts are the rows `rows`, (B,) int64, of a batch of `total` (all of it by default).
    Token t of row i is drawn with number (t, i) of the `max_new_tokens * total` uniforms that
    every call takes from `generator`: sequences do not depend on how the batch is shared out, nor
    on which rows have ended.

    Raises FloatingPointError if the logits of a token are not finite, UnsupportedModelError for a
    token without an embedding or a model without a cache.
    """
    from ppo_fast.loop.model.decoder import Decoder

    _check_tokens(model, tokens)
    n = len(tokens)
    uniforms = torch.rand(
        max_new_tokens,
        n if total is None else total,
        generator=generator,
        device=generator.device,
        dtype=torch.float64,
    )
    uniforms = (uniforms if rows is None else uniforms[:, rows]).to(tokens.device)
    stops = tokens.new_tensor(eos)
    response = tokens.new_full((n, max_new_tokens), eos[0] if eos else 0)
    mask = torch.zeros_like(response, dtype=torch.bool)
    logprobs = torch.zeros_like(response, dtype=torch.float64)
    kept = Kept(truncation, response) if truncation else None
    held = torch.arange(n, device=tokens.device)  # the rows in the decoder
    alive = torch.ones_like(held, dtype=torch.bool)  # of those, the ones that have not ended
    with few_rows(model, backend):
        decoder = Decoder(model, tokens, attention, max_new_tokens)
        for t in range(max_new_tokens):
            logits, going = decoder.logits, held[alive]
            if kept is not None:
                logits = kept.cut(logits, temperature, t, going, alive)
            token = draw(logits, uniforms[t, held], temperature)
            scored = ppo_fast.token_logprobs(
                logits, token, temperature=temperature, backend=backend
            ).logprobs
            response[going, t], mask[going, t] = token[alive], True
            logprobs[going, t] = scored[alive].double()
            alive &= ~torch.isin(token, stops)
            if stopped is not None:
                alive &= ~stopped(response[held, : t + 1]).to(alive.device)
            left = int(alive.sum())
            if left == 0 or t + 1 == max_new_tokens:
                break
            if left <= _CROWDED * len(held):
                stay = alive.nonzero().squeeze(1)
                decoder.keep(stay)
                held, token, alive = held[stay], token[stay], alive[stay]
            decoder.step(token)
    columns = (x[:, : t + 1] for x in (response, mask, logprobs.to(scored.dtype)))
    return _rollout(tokens, attention, kept, *columns)


def _check_tokens(model: Any, tokens: Tensor) -> None:
    """Raise UnsupportedModelError for a token without an embedding."""
    highest, known = int(tokens.max()), vocabulary(model)
    if highest >= known:
        raise UnsupportedModelError(
            f"prompts must have tokens below the {known} embeddings of {type(model).__name__}, got"
            f" {highest}"
        )


def _rollout(
    tokens: Tensor,
    attention: Tensor,
    kept: Kept | None,
    response: Tensor,
    mask: Tensor,
    logprobs: Tensor,
) -> Rollout:
    bad = ~logprobs.isfinite().all(1)
    if bad.any():
        rows = bad.nonzero().flatten().tolist()
        raise FloatingPointError(f"the model's logits must be finite, got others for rows {rows}")
    tokens = torch.cat([tokens, response], dim=1)
    attention = torch.cat([attention, mask.to(attention.dtype)], dim=1)
    support, cut = (None, None) if kept is None else kept.support()
    return Rollout(Sequences(tokens, attention, mask, support), logprobs, cut)


def draw(logits: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
    """Tokens (B,) of softmax(logits / temperature), logits (B, V), by inversion of the cdf.

    `uniforms` (B,) fp64 lie in [0, 1). The first token whose cdf exceeds a uniform's share of the
    whole sum has a width of its own, so one of probability 0 is never drawn, and the last step of
    the cdf need not be 1. fp64 keeps the widths of rare tokens far out in a large vocabulary.
    """
    cdf = torch.softmax(scaled(logits, temperature), dim=-1).cumsum(-1, dtype=torch.float64)
    token = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True)
    return token.squeeze(1).clamp(max=logits.shape[-1] - 1)  # NaN logits: nothing exceeds
