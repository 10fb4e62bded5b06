"""The loop's forwards: sampling, rescoring, padding, EOS, and the re-used frozen layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from loop_helpers import TEXTS, batch_of, tiny, trainer
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import ppo_fast
from ppo_fast.loop.data.sequences import Rollout, Sequences
from ppo_fast.loop.model.layers import freeze_below
from ppo_fast.loop.model.load import eos_ids
from ppo_fast.loop.model.tower import Tower
from ppo_fast.loop.sampling.generate import generate
from ppo_fast.loop.sampling.sampler import completions, encode

# fp64 forwards of the same sums in another order: 2**-53 times a condition number below 1e4.
FP64 = 1e-12


def sample(model: Any, tokens: torch.Tensor, attention: torch.Tensor, **options: Any) -> Rollout:
    defaults: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.8, "eos": [0], "seed": 3}
    options = defaults | options
    generator = torch.Generator().manual_seed(options.pop("seed"))
    return generate(model, tokens, attention, generator=generator, backend="reference", **options)


def rescore(tower: Tower, seqs: Sequences, temperature: float) -> torch.Tensor:
    logits, _ = tower.logits(seqs)
    out = ppo_fast.token_logprobs(
        logits, seqs.response[seqs.mask], temperature=temperature, backend="reference"
    )
    return seqs.unflatten(out.logprobs)


def test_sampled_logprobs_are_those_of_the_training_forward() -> None:
    model, tokenizer = tiny(torch.float64)
    tokens, attention = encode(tokenizer, TEXTS, torch.device("cpu"))
    assert attention.sum(1).unique().numel() > 1  # some prompts are padded
    rollout = sample(model, tokens, attention)
    again = rescore(Tower(model, 0), rollout.seqs, 0.8)
    assert rollout.logprobs.min() < -1
    torch.testing.assert_close(again, rollout.logprobs, rtol=0, atol=FP64)


@pytest.mark.parametrize("padding", [1, 9])
def test_completion_does_not_depend_on_left_padding(padding: int) -> None:
    model, tokenizer = tiny(torch.float64)
    tokens, attention = encode(tokenizer, TEXTS[:1], torch.device("cpu"))
    plain = sample(model, tokens, attention)
    pad = torch.full((1, padding), 7)
    padded = sample(
        model, torch.cat([pad, tokens], 1), torch.cat([torch.zeros_like(pad), attention], 1)
    )
    assert padded.seqs.response.tolist() == plain.seqs.response.tolist()
    torch.testing.assert_close(padded.logprobs, plain.logprobs, rtol=0, atol=FP64)


def test_a_row_ends_with_its_eos_and_is_masked_behind_it() -> None:
    model, tokenizer = tiny(torch.float64)
    tokens, attention = encode(tokenizer, TEXTS, torch.device("cpu"))
    eos = list(range(0, 300, 4))  # a quarter of the vocabulary, so that rows end at once or late
    rollout = sample(model, tokens, attention, eos=eos, max_new_tokens=8)
    lengths = rollout.seqs.mask.sum(1).tolist()
    assert min(lengths) == 1 and max(lengths) > 2
    for row, length in zip(rollout.seqs.response.tolist(), lengths, strict=True):
        assert not set(row[: length - 1]) & set(eos)
        assert row[length - 1] in eos or length == 8
    response_attention = rollout.seqs.attention[:, tokens.shape[1] :]
    assert torch.equal(response_attention.bool(), rollout.seqs.mask)
    assert rollout.logprobs[~rollout.seqs.mask].eq(0).all()
    again = rescore(Tower(model, 0), rollout.seqs, 0.8)
    torch.testing.assert_close(again, rollout.logprobs, rtol=0, atol=FP64)


@pytest.mark.case("R5")
def test_an_eos_at_once_is_an_empty_completion_of_one_token() -> None:
    model, tokenizer = tiny()
    tokens, attention = encode(tokenizer, ["", TEXTS[0]], torch.device("cpu"))
    rollout = sample(model, tokens, attention, eos=list(range(300)))
    assert rollout.seqs.mask.tolist() == [[True], [True]]
    ended = rollout.seqs._replace(tokens=rollout.seqs.tokens.clone())
    ended.tokens[:, -1] = tokenizer.eos_token_id
    eos = [tokenizer.eos_token_id]
    assert completions(tokenizer, ended, eos) == (["", ""], [True, True])


@pytest.mark.parametrize("head", ["linear", "logits"])
def test_only_kept_tokens_reach_the_output_head(tmp_path: Path, head: str) -> None:
    t = trainer(tmp_path, head=head)
    shapes: list[torch.Size] = []
    module = t.agent.policy.model.get_output_embeddings()
    module.register_forward_hook(lambda m, a, out: shapes.append(out.shape))
    _, batch, _ = batch_of(t)
    kept = int(batch.seqs.mask.sum())
    sampling = [rows * steps for rows, steps, _ in (s for s in shapes if len(s) == 3)]
    assert sum(sampling) == kept  # of a prompt its last position; of 8 rows none that has ended
    scoring = [rows for rows, _ in (s for s in shapes if len(s) == 2)]
    assert sum(scoring) == (kept if head == "logits" else 0)


def models() -> dict[str, Any]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "vocab_size": 300}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    gemma = Gemma3TextConfig(
        **sizes,
        **heads,
        sliding_window=4,
        final_logit_softcapping=5.0,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    return {
        "llama": tiny()[0],
        "gpt2": GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=16, n_head=2, vocab_size=300)),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**sizes, **heads)),
        "gemma3": Gemma3ForCausalLM(gemma),
    }


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "gemma3"])
def test_replayed_layers_change_no_bit(name: str) -> None:
    model = models()[name].eval()
    split = freeze_below(model, 1)
    assert split == len(Tower(model, 0).layers) - 1
    tokens = torch.randint(300, (3, 9), generator=torch.Generator().manual_seed(1))
    attention = torch.ones_like(tokens)
    attention[0, :3] = 0
    seqs = Sequences(tokens, attention, torch.ones(3, 4, dtype=torch.bool))
    tower = Tower(model, split)
    (logits, _), frozen_out = tower.with_frozen_out(lambda: tower.logits(seqs))
    assert frozen_out is not None and frozen_out.shape[:2] == tokens.shape
    calls: list[int] = []
    handle = tower.layers[0].register_forward_hook(lambda *_: calls.append(1))
    again, hidden = tower.logits(seqs, frozen_out)
    handle.remove()
    assert calls == [] and torch.equal(again, logits)
    assert logits.shape == (12, 300) and torch.equal(hidden, tower.hidden(seqs))
    full = model(
        input_ids=tokens,
        attention_mask=attention,
        position_ids=(attention.cumsum(1) - 1).clamp(min=0),
    ).logits[:, 4:8]
    torch.testing.assert_close(logits.view(3, 4, 300), full, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "gemma3"])
def test_the_linear_head_is_the_models_own(name: str) -> None:
    tower = Tower(models()[name].eval().double(), 0)
    tokens = torch.randint(300, (3, 9), generator=torch.Generator().manual_seed(1))
    seqs = Sequences(tokens, torch.ones_like(tokens), torch.ones(3, 4, dtype=torch.bool))
    logits, hidden = tower.logits(seqs)
    want = ppo_fast.token_logprobs(logits, seqs.flat(seqs.response), backend="reference")
    got = ppo_fast.linear_token_logprobs(
        hidden, tokens=seqs.flat(seqs.response), backend="reference", **tower.head()
    )
    torch.testing.assert_close(got.logprobs, want.logprobs, rtol=0, atol=FP64)


def test_a_scale_that_only_the_config_has_changes_nothing() -> None:
    model = models()["llama"]
    model.config.logit_scale = 0.5
    assert Tower(model, 0).head()["logit_scale"] == 1.0


def test_copies_share_frozen_weights_and_own_trainable_ones() -> None:
    model, _ = tiny()
    tower = Tower(model, freeze_below(model, 1))
    copied = dict(tower.copy().model.named_parameters())
    shared = {n for n, p in model.named_parameters() if copied[n].data_ptr() == p.data_ptr()}
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert shared | trainable == set(copied) and not shared & trainable
    assert {n.split(".")[1] for n in trainable} == {"layers", "norm"}
    assert {n.split(".")[2] for n in trainable if "layers" in n} == {"1"}


def test_eos_ids_unite_tokenizer_and_generation_config() -> None:
    model, tokenizer = tiny()
    model.generation_config.eos_token_id = [5, 9]
    assert eos_ids(model, tokenizer) == [0, 5, 9]


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_freezing_leaves_the_top_layers(layers: int) -> None:
    model, _ = tiny()
    assert freeze_below(model, layers) == (0 if layers == 0 else 2 - layers)
    assert model.get_output_embeddings().weight.requires_grad == (layers == 0)


def test_too_many_trainable_layers_is_an_error() -> None:
    with pytest.raises(ValueError, match="train_layers must be at most 2, got 3"):
        freeze_below(tiny()[0], 3)
