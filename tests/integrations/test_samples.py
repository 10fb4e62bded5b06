"""Tests of the sample that a first call is compared on."""

from __future__ import annotations

import torch

from ppo_fast.integrations import _first_call


def test_samples_of_large_arguments() -> None:
    """Tokens of one row, words of the head; what is None stays so."""
    tokens = torch.arange(200).view(2, 100) * 100
    given = {"x": torch.ones(2, 100, 8), "w": torch.ones(20000, 8), "b": None, "t": tokens}
    found = _first_call.first_of_head("x", "w", "t", "b")(given)
    assert {k: x.shape for k, x in found.items() if x is not None} == {
        "x": (1, 64, 8),
        "w": (4096, 8),
        "t": (1, 64),
    }
    assert torch.equal(found["t"], tokens[:1, :64] % 4096)
    flat = {"x": torch.ones(100, 8), "t": tokens[0], "more": 3}
    assert _first_call.first_tokens("x", "t")(flat)["t"].shape == (64,)
    assert _first_call.first_rows("x")(flat)["x"].shape == (1, 8)
