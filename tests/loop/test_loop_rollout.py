"""Sampling: the distribution, what a sequence's tokens depend on, and how rows end."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loop_helpers import TEXTS, tiny
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from ppo_fast.loop.model.decoder import Decoder, buckets
from ppo_fast.loop.model.tower import Tower
from ppo_fast.loop.sampling.generate import draw, generate
from ppo_fast.loop.sampling.sampler import encode


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
            model,
            tokens[share],
            attention[share],
            generator=generator,
            rows=share,
            total=8,
            **options,
        )
        assert torch.equal(generator.get_state(), after)  # every process is as far as the others
        assert torch.equal(part.seqs.response, whole.seqs.response[share])
        torch.testing.assert_close(part.logprobs, whole.logprobs[share], rtol=0, atol=1e-12)


FAMILIES = ("llama", "untied", "gpt2", "qwen2", "gemma3", "mistral")
# A quarter of the vocabulary, so that some rows end at once, some late and some not at all.
EOS = list(range(0, 300, 4))


def family(name: str) -> Any:
    """A random model of three layers in fp64. Windows are shorter than the prompts."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "vocab_size": 300,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "initializer_range": 0.2,
    }
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    makers: dict[str, Callable[[], Any]] = {
        "llama": lambda: tiny()[0],
        "untied": lambda: LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False)),
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(n_layer=3, n_embd=16, n_head=2, vocab_size=300, initializer_range=0.2)
        ),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**sizes)),
        "gemma3": lambda: Gemma3ForCausalLM(
            Gemma3TextConfig(**sizes, sliding_window=4, layer_types=kinds)
        ),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**sizes, sliding_window=4)),
    }
    return makers[name]().eval().double()


def one_by_one(
    model: Any, prompt: list[int], uniforms: torch.Tensor, temperature: float, eos: list[int]
) -> tuple[list[int], list[float]]:
    """One completion by whole forwards: no cache, no padding, no other row."""
    row, logprobs = list(prompt), []
    for u in uniforms.tolist():
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1]
        logprob = torch.log_softmax(logits / temperature, -1)
        token = int((logprob.exp().cumsum(0) <= u).sum())
        row.append(token)
        logprobs.append(float(logprob[token]))
        if token in eos:
            break
    return row[len(prompt) :], logprobs


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_is_its_rows_one_by_one(name: str) -> None:
    """With a cache, in buckets, beside rows that end and leave: the same tokens and log-probs."""
    model, (_, tokenizer) = family(name), tiny()
    tokens, attention = encode(tokenizer, TEXTS * 2, torch.device("cpu"))
    rollout = generate(
        model,
        tokens,
        attention,
        max_new_tokens=6,
        temperature=0.9,
        eos=EOS,
        generator=_seeded(4),
        backend="reference",
    )
    uniforms = torch.rand(6, 16, generator=_seeded(4), dtype=torch.float64)
    lengths = set()
    for i, (row, seen) in enumerate(zip(tokens, attention, strict=True)):
        want, logprobs = one_by_one(model, row[seen.bool()].tolist(), uniforms[:, i], 0.9, EOS)
        kept = rollout.seqs.mask[i]
        lengths.add(len(want))
        assert kept.tolist() == [t < len(want) for t in range(len(kept))]
        assert rollout.seqs.response[i, kept].tolist() == want
        # fp64 sums in another order: 2**-53 times a condition number below 1e4
        assert rollout.logprobs[i, kept].tolist() == pytest.approx(logprobs, rel=0, abs=1e-12)
    assert min(lengths) == 1 and max(lengths) == 6
    response_attention = rollout.seqs.attention[:, tokens.shape[1] :]
    assert torch.equal(response_attention.bool(), rollout.seqs.mask)
    assert rollout.logprobs[~rollout.seqs.mask].eq(0).all()


def test_a_prompt_of_several_rows_is_read_once() -> None:
    """The test above has each prompt twice: what is left out changes no token."""
    model, (_, tokenizer) = family("llama"), tiny()
    tokens, attention = encode(tokenizer, [*TEXTS[:3], *TEXTS[:2], TEXTS[0]], torch.device("cpu"))
    read: list[int] = []
    model.register_forward_pre_hook(
        lambda model, args, given: read.append(len(given["input_ids"])), with_kwargs=True
    )
    with torch.no_grad():
        decoder = Decoder(model, tokens, attention, 2)
        assert sum(read) == 3
        logits = decoder.logits
        decoder.step(torch.ones(6, dtype=torch.long))
    assert read[-1] == 6
    for twin, first in ((3, 0), (4, 1), (5, 0)):
        assert torch.equal(logits[twin], logits[first])


@pytest.mark.parametrize("name", FAMILIES)
def test_full_attention_writes_into_one_buffer(name: str) -> None:
    model, (_, tokenizer) = family(name), tiny()
    tokens, attention = encode(tokenizer, TEXTS, torch.device("cpu"))
    decoder = Decoder(model, tokens, attention, 3)
    addresses, lengths = [], []
    with torch.no_grad():
        for _ in range(3):
            decoder.step(torch.ones(8, dtype=torch.long))
            layer = decoder._cache.layers[1]
            addresses.append(layer.keys.data_ptr())
            lengths.append(layer.keys.shape[2])
    windowed = name == "mistral"  # of gemma3 too the second layer is a full one, but it grows
    assert (len(set(addresses)) == 1) == (name not in ("gemma3", "mistral"))
    assert lengths == ([3] * 3 if windowed else [tokens.shape[1] + t for t in (1, 2, 3)])


def test_ended_rows_leave_once_they_are_an_eighth() -> None:
    model, tokenizer = tiny(torch.float64)
    tokens, attention = encode(tokenizer, TEXTS * 4, torch.device("cpu"))
    rows: list[int] = []

    def count(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["input_ids"].shape[1] == 1 and kwargs["attention_mask"].shape[1] > 1:
            rows.append(len(kwargs["input_ids"]))

    model.register_forward_pre_hook(count, with_kwargs=True)
    rollout = generate(
        model,
        tokens,
        attention,
        max_new_tokens=12,
        temperature=1.0,
        eos=EOS,
        generator=_seeded(5),
        backend="reference",
    )
    alive = rollout.seqs.mask.sum(0).tolist()[1:]
    assert len(rows) == len(alive) and alive[-1] < 16
    assert all(a <= held < 8 / 7 * a for a, held in zip(alive, rows, strict=True))


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(0, 50))
def test_buckets_hold_every_row_and_little_padding(lengths: list[int], spare: int) -> None:
    parts = buckets(lengths, spare)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    padding = [[lengths[part[0]] - lengths[i] for i in part] for part in parts]
    assert all(min(gaps) >= 0 and sum(gaps) <= spare for gaps in padding)
    for part, coming in itertools.pairwise(parts):  # no bucket had room for the row behind it
        gaps = [lengths[part[0]] - lengths[i] for i in [*part, coming[0]]]
        assert sum(gaps) > spare


def test_fp32_rollouts_have_the_training_forwards_logprobs() -> None:
    model, tokenizer = tiny()
    tokens, attention = encode(tokenizer, TEXTS, torch.device("cpu"))
    rollout = generate(
        model,
        tokens,
        attention,
        max_new_tokens=9,
        temperature=1.0,
        eos=EOS,
        generator=_seeded(6),
        backend="cpu",
    )
    seqs = rollout.seqs
    logits, _ = Tower(model, 0).logits(seqs)
    again = torch.log_softmax(logits, -1).gather(1, seqs.flat(seqs.response)[:, None])
    assert rollout.logprobs.dtype == torch.float32
    # fp32 sums in another order: 2**-24 times the same condition number
    torch.testing.assert_close(
        seqs.flat(rollout.logprobs), again.squeeze(1), rtol=0, atol=2**-24 * 1e4
    )


def test_without_an_eos_every_row_goes_to_the_end() -> None:
    model, tokenizer = tiny()
    tokens, attention = encode(tokenizer, TEXTS, torch.device("cpu"))
    rollout = generate(
        model,
        tokens,
        attention,
        max_new_tokens=3,
        temperature=1.0,
        eos=[],
        generator=_seeded(7),
        backend="reference",
    )
    assert rollout.seqs.mask.all() and rollout.seqs.mask.shape == (8, 3)


def test_logits_that_are_not_finite_are_named() -> None:
    model, tokenizer = tiny()
    tokens, attention = encode(tokenizer, TEXTS[:2], torch.device("cpu"))
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(FloatingPointError, match=r"must be finite, got others for rows \[0, 1\]"):
        generate(
            model,
            tokens,
            attention,
            max_new_tokens=2,
            temperature=1.0,
            eos=[0],
            generator=_seeded(8),
            backend="reference",
        )


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
