"""Linear layers in decoding: which take the product of a few rows, and for how long."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from loop_helpers import TEXTS, tiny
from torch import nn

import ppo_fast
from ppo_fast.loop.model.few_rows import few_rows
from ppo_fast.loop.sampling.generate import generate
from ppo_fast.loop.sampling.sampler import encode


class Doubled(nn.Linear):
    """A layer of its own kind."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def layers(model: nn.Module) -> list[nn.Linear]:
    return [m for m in model.modules() if isinstance(m, nn.Linear)]


def test_decoding_takes_it_in_every_layer_and_reading_the_prompts_in_none() -> None:
    model, tokenizer = tiny()
    tokens, attention = encode(tokenizer, TEXTS * 5, torch.device("cpu"))
    tokens, attention = tokens.repeat(1, 2), attention.repeat(1, 2)
    rows: list[int] = []

    def counted(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        rows.append(x.numel() // x.shape[-1])
        return kernel(x, *args, **kwargs)

    kernel = ppo_fast.few_rows_linear
    for n in (8, 40):
        rows.clear()
        with mock.patch.object(ppo_fast, "few_rows_linear", counted):
            generate(
                model,
                tokens[:n],
                attention[:n],
                max_new_tokens=4,
                temperature=1.0,
                eos=[],
                generator=torch.Generator().manual_seed(0),
                backend="cpu",
            )
        # The head has a row of each prompt, by buckets; then every layer one of each token.
        steps = 3 * len(layers(model)) if n == 8 else 0
        heads, decoded = rows[: len(rows) - steps], rows[len(rows) - steps :]
        assert sum(heads) == 8 and decoded == [n] * steps  # of the eight that differ


def test_layers_are_their_own_again_after_an_error() -> None:
    model, _ = tiny()
    with pytest.raises(KeyError), few_rows(model, "cpu"):
        assert all("forward" in vars(layer) for layer in layers(model))
        raise KeyError
    assert not any("forward" in vars(layer) for layer in layers(model))


def test_other_layers_and_backends_are_left_alone() -> None:
    own = nn.Linear(4, 4)
    own.forward = lambda x: x  # type: ignore[method-assign]
    model = nn.ModuleList(
        [nn.Linear(4, 4), Doubled(4, 4), nn.Linear(4, 4).double(), nn.Linear(4, 4).bfloat16(), own]
    )
    kept = own.forward
    with few_rows(model, "reference"):
        assert [m for m in model if "forward" in vars(m)] == [own]
    with few_rows(model, "cpu"):
        assert [m for m in model if "forward" in vars(m)] == [model[0], own]
    assert [m for m in model if "forward" in vars(m)] == [own] and own.forward is kept


def test_gradients_and_autocast_take_torchs_product() -> None:
    layer, x = nn.Linear(6, 3), torch.ones(2, 6)
    with few_rows(nn.ModuleList([layer]), "cpu"):
        layer(x).sum().backward()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        with torch.no_grad():
            assert torch.equal(layer(x), ppo_fast.few_rows_linear(x, layer.weight, layer.bias))
    assert layer.weight.grad is not None and bool((layer.weight.grad == 2).all())
