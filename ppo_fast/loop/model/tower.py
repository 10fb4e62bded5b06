"""Tower (backbone and output head) of policy, reference and critic: forwards over sequences."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ppo_fast.loop.data.sequences import Sequences, position_ids
from ppo_fast.loop.model.head import Product, hooked, measured, output_head
from ppo_fast.loop.model.layers import decoder_layers, plain_tokens, refusing

T = TypeVar("T")


class Tower:
    """A causal LM whose frozen bottom, the first `split` layers, can be computed once and re-used.

    Towers copied from one model share every frozen weight, so the output of the frozen layers
    (`frozen_out`, (B, P + R, H)) serves policy, reference and critic in every epoch. Every forward
    goes through the whole model, so that its wrappers (shards, adapters) see it, and runs inside
    `contexts`.
    """

    def __init__(
        self, model: Any, split: int, *contexts: Callable[[], AbstractContextManager[object]]
    ) -> None:
        self.model, self.split, self.contexts = model, split, contexts
        self.layers = decoder_layers(model)
        self._product: Product | None = None
        self._outputs = 0  # entries of the tuple that a layer returns; 0: no tuple

    def copy(self) -> Tower:
        """A tower with weights of its own where they are trainable and shared ones elsewhere."""
        shared = {id(p): p for p in self.model.parameters() if not p.requires_grad}
        tower = Tower(copy.deepcopy(self.model, shared), self.split, *self.contexts)
        tower._product, tower._outputs = self._product, self._outputs
        return tower

    def logits(self, seqs: Sequences, frozen_out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits (n, V) and last hidden states (n, H) that predict the n kept tokens.

        The output head sees these n rows alone: prompt and padding never get a logit.
        """
        return self._forward(seqs, frozen_out, lambda hidden: hidden)

    def hidden(self, seqs: Sequences, frozen_out: Tensor | None = None) -> Tensor:
        """Last hidden states (n, H) that predict the n kept tokens; the head sees no row."""
        return self._forward(seqs, frozen_out, lambda hidden: hidden[:0])[1]

    def with_frozen_out(self, forward: Callable[[], T]) -> tuple[T, Tensor | None]:
        """Result of `forward`, and the frozen layers' output in it (None: none are frozen)."""
        if self.split == 0:
            return forward(), None
        seen: list[Tensor] = []

        def keep(_: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            self._outputs = len(output) if isinstance(output, tuple) else 0
            seen.append(output[0] if isinstance(output, tuple) else output)

        with hooked(self.layers[self.split - 1].register_forward_hook, keep):
            return forward(), seen[0]

    def product(self) -> Product:
        """The product between hidden states and logits, measured at the first call.

        Raises UnsupportedModelError, which names the output head, where that is more than a
        weight, a bias, a factor and a soft cap.
        """
        if self._product is None:
            tokens = plain_tokens(self.model, 4)[None]
            with refusing(self.model), self.inside():
                self._product = measured(self.model, tokens)
        return self._product

    def head(self, hidden: Tensor | None = None) -> dict[str, Any]:
        """Weight, bias, soft cap and scale of the output head, as `linear_ppo_loss` takes them.

        With peft's adapters on the head as `extra` of the hidden states (n, H), or without these
        added to the weight.
        """
        options = self.product().options()
        with self.inside():
            head = output_head(self.model)
            if hidden is None:
                return {"weight": head.dense(), "bias": head.bias, **options}
            extra = head.extra(hidden)
        return {"weight": head.weight, "bias": head.bias, "extra": extra, **options}

    def run(self, tokens: Tensor, **options: Any) -> Any:
        """The model's answer to `tokens` (B, T), without a cache."""
        with self.inside():
            return self.model(input_ids=tokens, use_cache=False, **options)

    @contextmanager
    def inside(self) -> Iterator[None]:
        with ExitStack() as stack:
            for context in self.contexts:
                stack.enter_context(context())
            yield

    def _forward(
        self, seqs: Sequences, frozen_out: Tensor | None, to_head: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Logits of the rows that `to_head` leaves, and hidden states (n, H) of all kept ones."""
        index = seqs.scored_positions()
        seen: list[Tensor] = []

        def select(_: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
            seen.append(args[0].flatten(0, 1).index_select(0, index))
            return to_head(seen[0])

        output_head = self.model.get_output_embeddings()
        with (
            _replayed(self.layers, self.split, frozen_out, self._outputs),
            hooked(output_head.register_forward_pre_hook, select),
        ):
            out = self.run(
                seqs.tokens,
                attention_mask=seqs.attention,
                position_ids=position_ids(seqs.attention),
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

    def forward(self, hidden: Tensor, seqs: Sequences, frozen_out: Tensor | None) -> Tensor:
        """Values (n,) of the n kept tokens; `hidden` (n, H) is the policy's."""
        if self.tower is not None:
            hidden = self.tower.hidden(seqs, frozen_out)
        values: Tensor = self.head(hidden.to(self.head.weight.dtype)).squeeze(-1)
        return values


class _Replay(nn.Module):
    """Replacement of a frozen layer, which returns the recorded output of the last of them.

    Where layers return tuples, of `outputs` entries, the others are absent: no forward without a
    cache reads them. Other attributes are those of the layer itself.
    """

    def __init__(self, layer: nn.Module, frozen_out: Tensor, outputs: int) -> None:
        super().__init__()
        self._frozen_out, self._size = frozen_out, outputs
        self.__dict__["layer"] = layer  # not as a module: its weights are listed elsewhere

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(self, *args: object, **kwargs: object) -> Any:
        return (self._frozen_out, *[None] * (self._size - 1)) if self._size else self._frozen_out


@contextmanager
def _replayed(
    layers: nn.ModuleList, split: int, frozen_out: Tensor | None, outputs: int
) -> Iterator[None]:
    """Skip the first `split` layers, whose output is `frozen_out`; with none, skip nothing."""
    if frozen_out is None:
        yield
        return
    kept = list(layers[:split])
    for i, layer in enumerate(kept):
        layers[i] = _Replay(layer, frozen_out, outputs)
    try:
        yield
    finally:
        for i, layer in enumerate(kept):
            layers[i] = layer
