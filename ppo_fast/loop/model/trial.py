"""Trial of a model before a run: the loop's assumptions, on a few made-up tokens.

A model's own forward over one row without padding says what is right. The training forward must
say the same of left-padded rows, so must the sampler with its cache, and frozen layers that are
replayed must change nothing.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ppo_fast.loop.data.sequences import Sequences
from ppo_fast.loop.model.layers import UnsupportedModelError, plain_tokens, refusing, vocabulary
from ppo_fast.loop.model.rounding import excess_gap, has_routed_experts
from ppo_fast.loop.model.tower import Tower

_PROMPT, _STEPS, _PADDING = 6, 8, 2
_OWN = "{} computes other log-probabilities with the loop's positions and mask than without any"
_SAMPLED = "{} computes other log-probabilities one token at a time with its cache than at once"
_FROZEN = (
    "{} computes other log-probabilities where the output of its frozen layers is re-used: set"
    " train_layers to 0, which freezes none"
)
_PADDED = (
    "{} lets padding move its log-probabilities ({}): it is trained as it is sampled from, in"
    " left-padded batches; prompts of one length are not affected"
)


def check_is_causal_lm(model: Any) -> None:
    """Raise UnsupportedModelError for what is no transformers model with an output head."""
    kind = type(model).__name__
    inner = next((x for x in ("_orig_mod", "module") if hasattr(model, x)), None)
    if inner is not None:
        raise UnsupportedModelError(
            f"model must be the model itself, got a {kind} around it: pass .{inner}"
        )
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not hasattr(model, "config") or head is None:
        raise UnsupportedModelError(
            f"model must be a transformers causal LM with an output head, got {kind}"
        )


def try_model(tower: Tower, sampled: bool) -> None:
    """Refuse a model, by its name, unless its forwards agree with each other.

    `sampled` says that completions will be drawn from it.
    """
    kind = type(tower.model).__name__
    with refusing(tower.model):
        seqs, own = _alone(tower)
        scored = tower.logits(seqs)[0].view(*seqs.mask.shape, -1)
        _require(_difference(tower, scored[:1], own[:1]), _OWN.format(kind))
        if padding := _difference(tower, scored[1:], own[1:]):
            warnings.warn(_PADDED.format(kind, padding), stacklevel=2)
        if (width := scored.shape[-1]) > (known := vocabulary(tower.model)):
            raise UnsupportedModelError(
                f"{kind} has logits for {width} tokens and embeddings for {known}: what it samples"
                " it could not read"
            )
        if sampled:
            _require(_difference(tower, _decoded(tower, seqs), scored), _SAMPLED.format(kind))
        if tower.split:
            _require(_difference(tower, _replayed(tower, seqs), scored), _FROZEN.format(kind))


def _alone(tower: Tower) -> tuple[Sequences, Tensor]:
    """Two rows, one of them padded, and the logits (2, steps, V) of each row by itself."""
    count = _PROMPT + _STEPS
    tokens = plain_tokens(tower.model, 2 * count).view(2, count)
    attention = torch.ones_like(tokens)
    attention[1, :_PADDING] = 0
    mask = torch.ones(2, _STEPS, dtype=torch.bool, device=tokens.device)
    logits = [
        tower.run(row[None, padding:]).logits[0, -_STEPS - 1 : -1]
        for row, padding in zip(tokens, (0, _PADDING), strict=True)
    ]
    return Sequences(tokens, attention, mask), torch.stack(logits)


def _replayed(tower: Tower, seqs: Sequences) -> Tensor:
    """The logits where the rows' frozen output is re-used in another order of the rows."""
    frozen_out = tower.with_frozen_out(lambda: tower.logits(seqs))[1]
    if frozen_out is None or frozen_out.shape[:2] != seqs.tokens.shape:
        raise UnsupportedModelError(_FROZEN.format(type(tower.model).__name__))
    turned = torch.arange(len(frozen_out) - 1, -1, -1, device=frozen_out.device)
    logits = tower.logits(seqs.rows(turned), frozen_out[turned])[0]
    return logits.view(*seqs.mask.shape, -1)[turned]


def _decoded(tower: Tower, seqs: Sequences) -> Tensor:
    from ppo_fast.loop.model.decoder import Decoder

    with tower.inside():
        decoder = Decoder(
            tower.model, seqs.tokens[:, :_PROMPT], seqs.attention[:, :_PROMPT], _STEPS
        )
        logits = [decoder.logits]
        for token in seqs.response.T[:-1]:
            decoder.step(token)
            logits.append(decoder.logits)
    return torch.stack(logits, 1)


def _difference(tower: Tower, got: Tensor, want: Tensor) -> str | None:
    """Difference of distributions, (rows, steps, V), beyond rounding at likely tokens."""
    if got.shape != want.shape:
        return f"logits are {tuple(got.shape)}, not {tuple(want.shape)}"
    wide, near = want.double().log_softmax(-1), got.double().log_softmax(-1)
    likely = wide > wide.mean(-1, keepdim=True)
    dtypes = (got.dtype, want.dtype, tower.model.dtype)
    dtype = min(dtypes, key=lambda x: torch.finfo(x).bits)
    return excess_gap((near - wide)[likely].abs(), dtype, has_routed_experts(tower.model))


def _require(difference: str | None, what: str) -> None:
    if difference is not None:
        raise UnsupportedModelError(f"{what} (of the differences {difference})")
