"""Sampling: the distribution, what a sequence's tokens depend on, and how rows end."""

from __future__ import annotations

import math

import pytest
import torch
from loop_helpers import TEXTS, tiny

from ppo_fast.loop.rollout import draw, encode, generate


def test_draws_follow_the_softmax() -> None:
    """Pearson's chi-square of n draws over the cells, each with n * p >= 5.

    With k degrees of freedom it exceeds k + 2 sqrt(k x) + 2 x with a probability of at most
    exp(-x) (Laurent and Massart 2000, lemma 1), here in one seed of 200,000.
    """
    logits = torch.linspace(-3, 2, 12)[torch.randperm(12, generator=_seeded(1))]
    n, temperature = 200_000, 0.7
    uniforms = torch.rand(n, generator=_seeded(2), dtype=torch.float64)
    tokens = draw(logits.expand(n, 12), uniforms, temperature)
    expected = n * torch.softmax(logits.double() / temperature, 0)
    assert expected.min() > 5
    chi_square = float(((tokens.bincount(minlength=12) - expected) ** 2 / expected).sum())
    k, x = 11, math.log(200_000)
    assert chi_square < k + 2 * math.sqrt(k * x) + 2 * x


def test_extreme_uniforms_draw_tokens_that_have_a_probability() -> None:
    logits = torch.tensor([-math.inf, -math.inf, 1.0, -math.inf, 0.0, -math.inf]).expand(2, 6)
    uniforms = torch.tensor([0.0, 1.0 - 2.0**-53], dtype=torch.float64)
    assert draw(logits, uniforms, 1.0).tolist() == [2, 4]


def test_a_rare_token_far_out_keeps_its_width() -> None:
    """Its probability, 2**-27, is below half a unit in the last place of an fp32 cdf near 1."""
    logits = torch.full((1, 5), -math.inf)
    logits[0, 0], logits[0, 4] = 0.0, -27 * math.log(2)
    just_inside = torch.tensor([1.0 - 2.0**-28], dtype=torch.float64)
    just_outside = torch.tensor([1.0 - 2.0**-26], dtype=torch.float64)
    assert draw(logits, just_inside, 1.0).tolist() == [4]
    assert draw(logits, just_outside, 1.0).tolist() == [0]


@pytest.mark.parametrize("shares", [([0, 2, 4, 6], [1, 3, 5, 7]), ([5], [7, 0, 1, 2, 3, 4, 6])])
def test_a_share_of_the_batch_draws_the_tokens_of_the_whole(shares: tuple[list[int], ...]) -> None:
    model, tokenizer = tiny(torch.float64)
    tokens, attention = encode(tokenizer, TEXTS, torch.device("cpu"))
    options = {"max_new_tokens": 6, "temperature": 1.0, "eos": [0], "backend": "reference"}
    generator = _seeded(3)
    whole = generate(model, tokens, attention, generator=generator, **options)
    after = generator.get_state()
    for share in map(torch.tensor, shares):
        generator = _seeded(3)
        part = generate(
            model, tokens[share], attention[share], generator=generator, rows=share, total=8,
            **options,
        )  # fmt: skip
        assert torch.equal(generator.get_state(), after)  # every process is as far as the others
        assert torch.equal(part.seqs.response, whole.seqs.response[share])
        torch.testing.assert_close(part.logprobs, whole.logprobs[share], rtol=0, atol=1e-12)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
