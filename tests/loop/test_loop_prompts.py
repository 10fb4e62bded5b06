"""Prompts and tokenizers at the edge: too long, empty, without pad or EOS, a head of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from loop_helpers import TEXTS, tiny, trainer
from transformers import LlamaConfig, LlamaForCausalLM

from ppo_fast.loop import TrainConfig, Trainer
from ppo_fast.loop.model.load import eos_ids, prompt_limit
from ppo_fast.loop.rewards import letters
from ppo_fast.loop.sampling.sampler import encode

CPU = torch.device("cpu")


def run_one(out: Path, model: Any, tokenizer: Any, **options: Any) -> dict[str, Any]:
    """The record of one update on the eight texts."""
    config = TrainConfig(
        out=out,
        model="tiny",
        device="cpu",
        batch=8,
        minibatches=2,
        micro_batch=2,
        max_new_tokens=6,
        train_layers=1,
        warmup=0,
        **options,
    )
    return Trainer(config, model, tokenizer, TEXTS, letters).step()


class Prepared:
    """Gives prepared rows, with the special tokens of another tokenizer."""

    def __init__(self, like: Any, rows: list[list[int]]) -> None:
        self.pad_token_id, self.eos_token_id = like.pad_token_id, like.eos_token_id
        self._rows = iter(rows)

    def __call__(self, prompt: str) -> dict[str, list[int]]:
        return {"input_ids": next(self._rows)}


def test_padding_is_told_by_the_mask_alone() -> None:
    """The pad token is the EOS, and a prompt may have the EOS inside it."""
    _, tokenizer = tiny()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0
    rows = [[5, 0, 7, 0], [0], [9]]
    tokens, attention = encode(Prepared(tokenizer, rows), ["a", "b", "c"], CPU)
    assert tokens.tolist() == [[5, 0, 7, 0], [0, 0, 0, 0], [0, 0, 0, 9]]
    assert attention.tolist() == [[1, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 1]]


@pytest.mark.parametrize("pad", [None, "a"])
def test_the_pad_token_changes_no_bit_of_an_update(tmp_path: Path, pad: str | None) -> None:
    model, tokenizer = tiny()
    want = run_one(tmp_path / "eos", model, tokenizer)
    model, tokenizer = tiny()
    tokenizer.pad_token = pad
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    got = run_one(tmp_path / "other", model, tokenizer)
    assert {k: got[k] for k in ("reward", "kl", "grad_norm", "loss")} == {
        k: want[k] for k in ("reward", "kl", "grad_norm", "loss")
    }


@pytest.mark.case("R5")
def test_without_an_eos_completions_have_full_length(tmp_path: Path) -> None:
    model, tokenizer = tiny()
    tokenizer.eos_token = tokenizer.pad_token = model.generation_config.eos_token_id = None
    assert eos_ids(model, tokenizer) == []
    assert run_one(tmp_path, model, tokenizer)["steps"] == 4


def test_an_empty_prompt_becomes_an_eos_or_is_named() -> None:
    _, tokenizer = tiny()
    tokens, attention = encode(tokenizer, ["it is", ""], CPU)
    assert tokens[1].tolist()[-1] == tokenizer.eos_token_id and attention[1].sum() == 1
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"prompts\[1\] must not be empty: .* no EOS, got ''"):
        encode(tokenizer, ["it is", ""], CPU)


def test_a_prompt_that_leaves_no_room_is_named(tmp_path: Path) -> None:
    model, tokenizer = tiny()
    model.config.max_position_embeddings = 30
    assert prompt_limit(model, 6) == 24
    long = "nobody in this picture knows why they are there at all, nor do we who watch them"
    n = len(tokenizer(long)["input_ids"])
    assert n > 24
    text = rf"prompts\[1\] must have at most 24 tokens, .* context, got {n}: 'nobody in this"
    with pytest.raises(ValueError, match=text):
        encode(tokenizer, ["it is", long], CPU, prompt_limit(model, 6))
    assert encode(tokenizer, ["it is", long], CPU, n)[0].shape == (2, n)  # as long as allowed
    t = trainer(tmp_path)
    t.agent.policy.model.config.max_position_embeddings = 30
    with pytest.raises(ValueError, match="must have at most 24 tokens"):
        t.sampler.rollout([long], t.backend)


@pytest.mark.parametrize("head", ["linear", "logits"])
def test_a_model_whose_head_is_not_its_embedding(tmp_path: Path, head: Any) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).eval()
    own, shared = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    before = own.detach().clone()
    assert own.data_ptr() != shared.data_ptr()
    config = TrainConfig(
        out=tmp_path,
        model="tiny",
        device="cpu",
        batch=8,
        minibatches=2,
        micro_batch=2,
        max_new_tokens=6,
        train_layers=0,
        warmup=0,
        lr=1e-3,
        head=head,
    )
    record = Trainer(config, model, tiny()[1], TEXTS, letters).step()
    assert record["steps"] == 4 and record["grad_norm"] > 0
    assert not torch.equal(own, before)  # trained, though it is not the embedding
