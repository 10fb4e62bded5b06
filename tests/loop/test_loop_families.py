"""Model families: the loop trains them or names why it cannot, before anything is written."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_helpers import TEXTS, tiny
from model_zoo import build
from torch import nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, LlamaForCausalLM

from ppo_fast.loop import TrainConfig, Trainer, UnsupportedModelError
from ppo_fast.loop.model.decoder import Decoder, cache_argument
from ppo_fast.loop.model.layers import decoder_layers, freeze_below
from ppo_fast.loop.model.load import prompt_limit
from ppo_fast.loop.model.rounding import allowed_gap
from ppo_fast.loop.rewards import letters

TRAINED = [
    "gpt2",
    "mamba",
    "cohere",
    "granite",
    "bloom",
    "gpt_neo",
    "falcon",
    "mpt",
    "bart",
    "opt",
]


def made(out: Path, model: Any, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {"train_layers": 1, "updates": 2, "batch": 8, "micro_batch": 4}
    config = TrainConfig(
        out=out,
        max_new_tokens=10,
        warmup=0,
        lr=1e-3,
        model="mine",
        device="cpu",
        save_every=0,
        compare=0,
        **(defaults | options),
    )
    return Trainer(config, model, tiny()[1], TEXTS, letters)


@pytest.mark.parametrize("name", TRAINED)
def test_sampler_and_training_forward_agree_in_two_updates(tmp_path: Path, name: str) -> None:
    """With a frozen layer, whose output is a tuple in some, and prompts of unequal lengths."""
    t = made(tmp_path, build(name))
    for record in (t.step(), t.step()):
        assert record["steps"] == 4
        assert record["rollout_gap_max"] < allowed_gap(torch.float32)


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("layers", [0, 1])
@pytest.mark.parametrize("name", ["cohere", "falcon"])
def test_both_heads_give_one_update(tmp_path: Path, name: str, layers: int, critic: str) -> None:
    """A model that scales its logits, and one whose layers return tuples."""
    heads = [
        made(tmp_path / head, build(name), head=head, train_layers=layers, critic=critic).step()
        for head in ("linear", "logits")
    ]
    for record in heads:
        assert record["steps"] == 4 and record["rollout_gap_max"] < allowed_gap(torch.float32)
    for number in ("reward", "kl", "policy_loss", "value_loss", "grad_norm"):
        assert heads[0][number] == pytest.approx(heads[1][number], rel=1e-3, abs=1e-5)


def test_a_context_by_another_name_bounds_prompts() -> None:
    assert prompt_limit(build("mpt"), 12) == prompt_limit(build("llama"), 12) == 500
    assert prompt_limit(build("mamba"), 12) is None


def test_padding_that_moves_log_probs_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="RecurrentGemmaForCausalLM lets padding move"):
        t = made(tmp_path, build("recurrent_gemma"))
    assert t.step()["rollout_gap_max"] < allowed_gap(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        made(tmp_path / "llama", build("llama"))


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "mamba2"])
def test_a_recurrent_model_samples_as_without_padding(name: str) -> None:
    model = build(name)
    tokens = torch.randint(1, 290, (3, 12), generator=torch.Generator().manual_seed(5))
    attention = torch.ones_like(tokens)
    attention[1, :4], attention[2, :7] = 0, 0
    with torch.no_grad():
        decoder = Decoder(model, tokens[:, :8], attention[:, :8], 5)
        for t in range(8, 12):
            decoder.step(tokens[:, t])
        for row, padding in enumerate((0, 4, 7)):
            own = model(input_ids=tokens[row : row + 1, padding:], use_cache=False).logits[0, -1]
            gap = decoder.logits[row].log_softmax(-1) - own.log_softmax(-1)
            assert float(gap.abs().max()) < allowed_gap(torch.float32)


class ByItsFormerName(nn.Module):
    """A model whose forward calls its cache `cache_params`, as Mamba's did before 5.24."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner, self.config = model, model.config

    def forward(self, cache_params: Any = None, **inputs: Any) -> Any:
        return self.inner(**inputs, **{cache_argument(self.inner): cache_params})


def test_a_cache_by_its_former_name_is_the_cache() -> None:
    model, tokens = build("mamba"), torch.arange(1, 13).view(2, 6)
    with torch.no_grad():
        decoders = [
            Decoder(m, tokens, torch.ones_like(tokens), 1) for m in (model, ByItsFormerName(model))
        ]
        for decoder in decoders:
            decoder.step(torch.tensor([20, 21]))
    torch.testing.assert_close(decoders[1].logits, decoders[0].logits, rtol=0, atol=0)


REFUSED = [
    (
        "openai-gpt",
        "OpenAIGPTLMHeadModel's forward takes none of 'cache', 'past_key_values'",
    ),
    (
        "rwkv",
        "RwkvForCausalLM's forward takes none of 'cache', 'past_key_values'",
    ),
    ("xlstm", "xLSTMForCausalLM cannot be trained by the loop: a forward of it raised"),
    ("minimax", "MiniMaxForCausalLM cannot be trained by the loop: a forward of it raised"),
    ("roberta", "RobertaForCausalLM computes other log-probabilities with the loop's positions"),
    ("zamba2", "train_layers must be 0 for Zamba2ForCausalLM, got 1: a layer below shares"),
    ("hrm_text", "HrmTextForCausalLM computes other log-probabilities where the output of its"),
]


@pytest.mark.parametrize(("name", "message"), REFUSED)
def test_a_model_is_refused_by_name_before_anything(
    tmp_path: Path, name: str, message: str
) -> None:
    checkpoint = tmp_path / "out" / "checkpoints" / "update-000009"
    checkpoint.mkdir(parents=True)
    with pytest.raises(UnsupportedModelError, match=message):
        made(tmp_path / "out", build(name))
    assert [x.name for x in tmp_path.rglob("*")] == ["out", "checkpoints", "update-000009"]


def test_wrappers_and_bodies_are_refused(tmp_path: Path) -> None:
    model = tiny()[0]
    with pytest.raises(
        UnsupportedModelError, match=r"got a DataParallel around it: pass \.module"
    ):
        made(tmp_path, nn.DataParallel(model))
    with pytest.raises(
        UnsupportedModelError, match=r"OptimizedModule around it: pass \._orig_mod"
    ):
        made(tmp_path, torch.compile(model))
    with pytest.raises(UnsupportedModelError, match="with an output head, got LlamaModel"):
        made(tmp_path, model.model)
    with pytest.raises(UnsupportedModelError, match="with an output head, got Linear"):
        made(tmp_path, nn.Linear(2, 2))


class WithoutItsCache(LlamaForCausalLM):
    """A Llama whose last token alone is seen in generation."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("use_cache") and kwargs["input_ids"].shape[1] == 1:
            kwargs["position_ids"] = kwargs["position_ids"] + 1
        return super().forward(*args, **kwargs)


def test_a_sampler_of_another_distribution_is_refused(tmp_path: Path) -> None:
    model = WithoutItsCache(tiny()[0].config).eval()
    message = "WithoutItsCache computes other log-probabilities one token at a time with its cache"
    with pytest.raises(UnsupportedModelError, match=message):
        made(tmp_path, model, train_layers=0)


def test_layers_that_share_weights_are_not_frozen_apart() -> None:
    model = tiny()[0]
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(UnsupportedModelError, match="train_layers must be 0 for LlamaForCausalLM"):
        freeze_below(model, 1)


def test_the_layers_of_text_are_chosen_beside_those_of_images() -> None:
    text = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "head_dim": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 8,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 8,
    }
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(config).eval()
    layers = decoder_layers(model)
    assert layers is model.model.language_model.layers
    assert freeze_below(model, 1) == 1
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(
        name.startswith(("model.language_model.layers.1.", "model.language_model.norm."))
        for name in trained
    )


NORMS = [
    ("llama", "model.norm"),
    ("gpt2", "transformer.ln_f"),
    ("mamba", "backbone.norm_f"),
    ("opt", "model.decoder.final_layer_norm"),
    ("mpt", "transformer.norm_f"),
    ("recurrent_gemma", "model.final_norm"),
    ("gpt_neox", "gpt_neox.final_layer_norm"),
]


@pytest.mark.parametrize(("name", "norm"), NORMS)
def test_the_final_norm_trains_and_nothing_below(name: str, norm: str) -> None:
    model = build(name)
    split = freeze_below(model, 1)
    paths = {id(m): path for path, m in model.named_modules()}
    top = paths[id(decoder_layers(model)[split])]
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    outside = {n.rsplit(".", 1)[0] for n in trained if not n.startswith(top)}
    assert outside == {norm} and any(n.startswith(top) for n in trained)
