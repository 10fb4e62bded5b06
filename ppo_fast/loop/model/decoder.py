"""The model in generation: prompts read in buckets of like length, a cache that does not grow.

Imports transformers, so it is imported where it is used.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, DynamicLayer

from ppo_fast.loop.data.sequences import position_ids
from ppo_fast.loop.model.layers import UnsupportedModelError

# Tokens of padding that cost as much as one more forward, which reads every weight once. SmolLM2
# on two cores: 70 ms, and 3 ms a token. A GPU reads a weight in the time of some 200 products.
_FORWARD = {"cpu": 32}
_FORWARD_ELSEWHERE = 256


class Decoder:
    """Some rows of a batch, a token at a time; `logits` (B, V) are those of the coming token.

    tokens and attention (B, P) are left-padded prompts, `steps` the tokens that may follow. Models
    with full attention alone have their keys and values written into one buffer; others (sliding
    windows, recurrent states) grow their own cache and read all prompts at once, as do models
    that take no positions.
    """

    def __init__(self, model: Any, tokens: Tensor, attention: Tensor, steps: int) -> None:
        self.model = model
        self._cache: Any
        self._argument = cache_argument(model)
        # Positions of its own making would begin elsewhere in prompts whose padding is cut.
        self._cuts = takes(model, "position_ids")
        self._seen = torch.cat([attention, attention.new_ones(len(tokens), steps)], dim=1)
        self._end = tokens.shape[1]
        cache = DynamicCache(config=model.config)
        # A state has taken in what was masked; a model of states alone multiplies by the mask.
        self._stateful = not any(isinstance(layer, DynamicLayer) for layer in cache.layers)
        if all(type(layer) is DynamicLayer for layer in cache.layers):
            self.logits, self._cache = self._read(tokens, attention, steps)
        else:
            self.logits, self._cache = self._forward(tokens, attention, cache), cache
            _check_filled(model, cache)

    def step(self, tokens: Tensor) -> None:
        """Append a token (B,) to every row."""
        self._end += 1
        self.logits = self._forward(tokens[:, None], self._seen[:, : self._end], self._cache)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone, (n,) int64; call `step` before `logits` are read."""
        self._seen = self._seen[rows]
        self._cache.reorder_cache(rows)

    def _read(self, tokens: Tensor, attention: Tensor, steps: int) -> tuple[Tensor, Cache]:
        """Read the prompts bucket by bucket, each without the padding in front of its longest.

        A prompt that stands in several rows, as in a group of completions, is read once.
        """
        width, lengths = tokens.shape[1], attention.sum(1).tolist()
        alike: dict[tuple[int, ...], list[int]] = {}
        for i, (row, length) in enumerate(zip(tokens.tolist(), lengths, strict=True)):
            alike.setdefault(tuple(row[width - length :]), []).append(i)
        groups = list(alike.values())
        spare = _FORWARD.get(tokens.device.type, _FORWARD_ELSEWHERE)
        spare = spare if self._cuts else tokens.numel()
        logits: Tensor | None = None
        layers: list[Any] = []
        for bucket in buckets([lengths[group[0]] for group in groups], spare):
            first = torch.tensor([groups[k][0] for k in bucket], device=tokens.device)
            cut = width - int(attention[first[0]].sum())
            part = DynamicCache(config=self.model.config)
            read = self._forward(tokens[first, cut:], attention[first, cut:], part)
            _check_filled(self.model, part)
            if logits is None:
                shape = (len(tokens), width, steps)
                layers = [StaticLayer(layer, *shape) for layer in part.layers]
                logits = read.new_empty(len(tokens), read.shape[1])
            rows = torch.tensor([i for k in bucket for i in groups[k]], device=tokens.device)
            source = [at for at, k in enumerate(bucket) for _ in groups[k]]
            logits[rows] = read[source]
            for layer, filled in zip(layers, part.layers, strict=True):
                layer.fill(rows, filled, source)
        assert logits is not None
        return logits, Cache(layers=layers)

    def _forward(self, tokens: Tensor, seen: Tensor, cache: Cache) -> Tensor:
        """Logits (B, V) behind the last of `tokens` (B, T); `seen` (B, S) covers the cache too."""
        new = tokens.shape[1]
        logits: Tensor = self.model(
            input_ids=tokens,
            attention_mask=seen[:, -new:] if self._stateful else seen,
            position_ids=position_ids(seen)[:, -new:],
            use_cache=True,
            logits_to_keep=1,
            **{self._argument: cache},
        ).logits
        return logits[:, -1]


class StaticLayer(DynamicLayer):
    """One layer's keys and values in buffers (B, heads, P + steps, D), of which views are seen.

    transformers' own static layer shows attention the whole buffer, whose unwritten part costs as
    much as the rest, and its dynamic layer copies what it holds at every token.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, like: Any, batch: int, prompt: int, steps: int) -> None:
        super().__init__()
        self.device, self.is_initialized = like.keys.device, True
        # Zeros: attention multiplies what is masked by 0, and NaN times 0 is NaN.
        self._buffers = [
            x.new_zeros(batch, x.shape[1], prompt + steps, x.shape[3])
            for x in (like.keys, like.values)
        ]
        self._show(prompt)

    def fill(self, rows: Tensor, layer: Any, source: list[int]) -> None:
        """Take over the prompts `source` of a layer for `rows`, flush with the longest's end."""
        for seen, filled in ((self.keys, layer.keys), (self.values, layer.values)):
            seen[rows, :, -filled.shape[2] :] = filled[source]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, heads, T, D); returns all so far, as views."""
        start = self.keys.shape[2]
        self._show(start + key_states.shape[2])
        self.keys[:, :, start:] = key_states
        self.values[:, :, start:] = value_states
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows `beam_idx`."""
        length = self.keys.shape[2]
        self._buffers = [buffer.index_select(0, beam_idx) for buffer in self._buffers]
        self._show(length)

    def _show(self, length: int) -> None:
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)


def cache_argument(model: Any) -> str:
    """Name of the cache argument of a model's forward: `cache` from transformers 5.24 on.

    Before it Mamba's was `cache_params`, which takes the others' kind of cache from 5.5 on.
    Raises UnsupportedModelError for a model that has none.
    """
    for name in ("cache", "past_key_values", "cache_params"):
        if takes(model, name):
            return name
    raise UnsupportedModelError(
        f"model must keep a key-value cache to be sampled from: {type(model).__name__}'s forward"
        " takes none of 'cache', 'past_key_values' and 'cache_params'"
    )


def takes(model: Any, name: str) -> bool:
    """True if a model's forward, or one that it may hand its arguments to, names an argument."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    forwards = [
        base.forward,
        *(vars(c)["forward"] for c in type(base).__mro__ if "forward" in vars(c)),
    ]
    return any(name in inspect.signature(forward).parameters for forward in forwards)


def _check_filled(model: Any, cache: Cache) -> None:
    """Raise UnsupportedModelError unless a forward has written to its cache."""
    if not any(getattr(layer, "is_initialized", True) for layer in cache.layers):
        raise UnsupportedModelError(
            f"model must keep a key-value cache to be sampled from: {type(model).__name__} wrote"
            f" nothing to the {type(cache).__name__} that its forward was given"
        )


def buckets(lengths: list[int], spare: int) -> list[list[int]]:
    """Rows by falling length, a new bucket wherever padding would pass `spare` tokens in one."""
    parts: list[list[int]] = []
    left = 0
    for row in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        gap = lengths[parts[-1][0]] - lengths[row] if parts else 0
        if not parts or gap > left:
            parts.append([])
            left, gap = spare, 0
        parts[-1].append(row)
        left -= gap
    return parts
