"""Forward passes over whole sequences: what policy, reference and critic compute per token."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ppo_fast.loop.models import decoder_layers

T = TypeVar("T")


class Sequences(NamedTuple):
    """Left-padded prompts followed by right-padded responses.

    tokens and attention (B, P + R) int64; mask (B, R) bool, True up to and including the EOS.
    A dropped sample has an all-False mask.
    """

    tokens: Tensor
    attention: Tensor
    mask: Tensor

    @property
    def response(self) -> Tensor:
        """The response tokens, (B, R)."""
        return self.tokens[:, -self.mask.shape[1] :]

    def rows(self, index: Tensor) -> Sequences:
        """The sequences at `index`."""
        return Sequences(*(x[index] for x in self))

    def flat(self, x: Tensor) -> Tensor:
        """Of a (B, R) tensor, the values at the n kept tokens, (n,)."""
        return x[self.mask]

    def cu_seqlens(self) -> Tensor:
        """Where each sequence's kept tokens begin among the n, (B + 1,) int64."""
        ends = self.mask.sum(1).cumsum(0)
        return torch.cat([ends.new_zeros(1), ends])

    def scored_positions(self) -> Tensor:
        """Flat indices into (B, P + R), ascending, of the positions that predict a kept token."""
        keep = torch.zeros_like(self.attention, dtype=torch.bool)
        keep[:, -self.mask.shape[1] - 1 : -1] = self.mask
        return keep.flatten().nonzero().squeeze(1)

    def unflatten(self, values: Tensor) -> Tensor:
        """Spread one value per kept token, (n,), over (B, R) with zeros elsewhere."""
        index = self.mask.flatten().nonzero().squeeze(1)
        flat = values.new_zeros(self.mask.numel()).index_copy(0, index, values)
        return flat.view(self.mask.shape)


def position_ids(attention: Tensor) -> Tensor:
    """Positions that count attended tokens only, so that left padding moves nothing."""
    return (attention.cumsum(-1) - 1).clamp(min=0)


class Tower:
    """A causal LM whose frozen bottom, the first `split` layers, can be computed once and re-used.

    Towers copied from one model share every frozen weight, so a batch's bottom activations
    (`trunk`, (B, P + R, H)) serve policy, reference and critic, in every epoch. Every forward goes
    through the whole model, so that what wraps it (shards, adapters) sees it, and runs inside
    `contexts`.
    """

    def __init__(
        self, model: Any, split: int, *contexts: Callable[[], AbstractContextManager[object]]
    ) -> None:
        self.model, self.split, self.contexts = model, split, contexts
        self.layers = decoder_layers(model)

    def copy(self) -> Tower:
        """A tower with weights of its own where they are trainable and shared ones elsewhere."""
        shared = {id(p): p for p in self.model.parameters() if not p.requires_grad}
        return Tower(copy.deepcopy(self.model, shared), self.split, *self.contexts)

    def logits(self, seqs: Sequences, trunk: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits (n, V) and last hidden states (n, H) that predict the n kept tokens.

        The output head sees these n rows alone: prompt and padding never get a logit.
        """
        return self._forward(seqs, trunk, lambda hidden: hidden)

    def hidden(self, seqs: Sequences, trunk: Tensor | None = None) -> Tensor:
        """Last hidden states (n, H) that predict the n kept tokens; the head sees no row."""
        return self._forward(seqs, trunk, lambda hidden: hidden[:0])[1]

    def with_trunk(self, forward: Callable[[], T]) -> tuple[T, Tensor | None]:
        """What `forward` gives, and the bottom activations on its way (None: none are frozen)."""
        if self.split == 0:
            return forward(), None
        seen: list[Tensor] = []

        def keep(_: nn.Module, args: object, output: Tensor) -> None:
            seen.append(output)

        with _hooked(self.layers[self.split - 1].register_forward_hook, keep):
            return forward(), seen[0]

    def head(self) -> dict[str, Any]:
        """Weight, bias and soft cap of the output head, as `linear_ppo_loss` takes them."""
        config = self.model.config.get_text_config()
        for name in ("logit_scale", "logits_scaling", "lm_head_multiplier"):
            if getattr(config, name, 1.0) not in (None, 1.0):
                raise ValueError(f"head must be 'logits' for a model with {name}, got 'linear'")
        linear = self.model.get_output_embeddings()
        cap = getattr(config, "final_logit_softcapping", None)
        return {"weight": linear.weight, "bias": linear.bias, "softcap": cap}

    def _forward(
        self, seqs: Sequences, trunk: Tensor | None, to_head: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Logits of the rows that `to_head` leaves, and hidden states (n, H) of all kept ones."""
        index = seqs.scored_positions()
        seen: list[Tensor] = []

        def select(_: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
            seen.append(args[0].flatten(0, 1).index_select(0, index))
            return to_head(seen[0])

        with ExitStack() as stack:
            for context in self.contexts:
                stack.enter_context(context())
            stack.enter_context(_replayed(self.layers, self.split, trunk))
            output_head = self.model.get_output_embeddings()
            stack.enter_context(_hooked(output_head.register_forward_pre_hook, select))
            out = self.model(
                input_ids=seqs.tokens,
                attention_mask=seqs.attention,
                position_ids=position_ids(seqs.attention),
                use_cache=False,
            )
        return out.logits, seen[0]


class Critic(nn.Module):
    """A zero-initialised scalar head on the policy's last hidden state or a tower of its own."""

    def __init__(
        self, hidden_size: int, tower: Tower | None, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.tower = tower
        self.body = None if tower is None else tower.model
        self.head = nn.Linear(hidden_size, 1, device=device, dtype=dtype)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, hidden: Tensor, seqs: Sequences, trunk: Tensor | None) -> Tensor:
        """Values (n,) of the n kept tokens; `hidden` (n, H) is the policy's."""
        if self.tower is not None:
            hidden = self.tower.hidden(seqs, trunk)
        values: Tensor = self.head(hidden.to(self.head.weight.dtype)).squeeze(-1)
        return values


class _Pass(nn.Module):
    """Stands in for a layer whose output is not needed."""

    def forward(self, hidden: Tensor, *args: object, **kwargs: object) -> Tensor:
        return hidden


class _Replay(nn.Module):
    """Stands in for the layers up to one, giving that one's recorded output."""

    def __init__(self, trunk: Tensor) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        return self.trunk


@contextmanager
def _hooked(register: Callable[..., Any], hook: Callable[..., Any]) -> Iterator[None]:
    handle = register(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _replayed(layers: nn.ModuleList, split: int, trunk: Tensor | None) -> Iterator[None]:
    """Skip the first `split` layers, whose output is `trunk`; with none, skip nothing."""
    if trunk is None:
        yield
        return
    kept = list(layers[:split])
    for i in range(split):
        layers[i] = _Replay(trunk) if i == split - 1 else _Pass()
    try:
        yield
    finally:
        for i, layer in enumerate(kept):
            layers[i] = layer
