"""Checks of a model before and at a run's first update: gaps, precision, vocabulary."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_helpers import tiny, trainer, weights
from rich.console import Console
from transformers import BertConfig, BertForSequenceClassification, BertModel

from ppo_fast.loop import Trainer, UnsupportedModelError
from ppo_fast.loop.data.replay import open_transitions
from ppo_fast.loop.data.sequences import Rollout
from ppo_fast.loop.model.load import check_vocabulary, load_model
from ppo_fast.loop.model.rounding import allowed_gap, excess_gap
from ppo_fast.loop.rewards import frozen, letters
from ppo_fast.loop.sampling.generate import generate

CPU = torch.device("cpu")


def shifted(t: Trainer, by: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the sampler report another log-prob for each first token."""
    sample = t.sampler.rollout

    def off(*args: Any, **options: Any) -> Rollout:
        rollout = sample(*args, **options)
        rollout.logprobs[:, 0] += by
        return rollout

    monkeypatch.setattr(t.sampler, "rollout", off)


def test_a_gap_beyond_rounding_stops_before_the_first_optimiser_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = trainer(tmp_path)
    before = weights(t)
    shifted(t, 1e-3, monkeypatch)
    with pytest.raises(UnsupportedModelError, match=r"largest is 0\.001 nats, and rounding") as e:
        t.step()
    assert "LlamaForCausalLM samples from another distribution" in str(e.value)
    assert all(map(torch.equal, weights(t), before))


def test_a_gap_of_rounding_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    t = trainer(tmp_path)
    shifted(t, 1e-4, monkeypatch)
    assert t.step()["rollout_gap_max"] > 5e-5


def test_a_resumed_run_is_checked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer(tmp_path, updates=1, save_every=1).run(Console(quiet=True))
    t = trainer(tmp_path, updates=2, save_every=1, resume=True)
    shifted(t, 1e-2, monkeypatch)
    with pytest.raises(UnsupportedModelError, match="samples from another distribution"):
        t.run(Console(quiet=True))


def test_stored_transitions_come_from_another_sampler(tmp_path: Path) -> None:
    """Their log-probs may be far off: importance weights are for that."""
    t = trainer(tmp_path / "own", save_transitions=tmp_path / "t.jsonl", updates=1)
    t.step()
    path = tmp_path / "t.jsonl"
    path.write_text(path.read_text().replace('"logprobs": [-', '"logprobs": [-1'))
    config = dataclasses.replace(
        t.config, out=tmp_path / "stored", save_transitions=None, transitions=path
    )
    model, tokenizer = tiny()
    stream = open_transitions(
        path,
        8,
        0,
        shuffle=False,
        keep_truncated=True,
        model=model,
        tokenizer=tokenizer,
        report=lambda _: None,
    )
    assert Trainer(config, model, tokenizer, stream, letters).step()["rollout_gap_max"] > 1.0


def test_what_counts_as_beyond_rounding() -> None:
    near, far = torch.full((100,), 1e-6), torch.full((100,), 1e-6)
    far[:5] = 0.5
    assert excess_gap(near, torch.float32, routed=False) is None
    assert "the largest is 0.5 nats" in str(excess_gap(far, torch.float32, routed=False))
    assert excess_gap(far, torch.float32, routed=True) is None  # ties of a router
    far[:20] = 0.5
    assert "0.9 quantile is 0.5 nats" in str(excess_gap(far, torch.float32, routed=True))
    assert excess_gap(far, torch.bfloat16, routed=False) is None
    far[:51] = 0.5
    assert "the median is 0.5 nats" in str(excess_gap(far, torch.bfloat16, routed=False))
    assert excess_gap(torch.tensor([float("nan")]), torch.float32, routed=False) is None
    assert allowed_gap(torch.float64) == allowed_gap(torch.float32) == 2.0**-11.5
    assert allowed_gap(torch.bfloat16) == 2.0**-3.5


@pytest.mark.parametrize("layers", [0, 1])
def test_a_model_in_bf16_trains_fp32_weights(tmp_path: Path, layers: int) -> None:
    """At a step far below bf16's spacing nearly every weight moves."""
    with pytest.warns(UserWarning, match="weights of LlamaForCausalLM come in half precision"):
        t = trainer(tmp_path, dtype=torch.bfloat16, train_layers=layers, lr=1e-5)
    model = t.agent.policy.model
    for p in model.parameters():
        assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16)
    layer = model.model.layers[1].mlp.down_proj.weight
    before = layer.detach().clone()
    record = t.step()
    assert record["ratio_min"] <= 1 <= record["ratio_max"]
    assert (layer != before).float().mean() > 0.9


def test_a_model_in_fp16_becomes_fp32_as_a_whole(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="and so are frozen ones in float16"):
        t = trainer(tmp_path, dtype=torch.float16)
    assert {p.dtype for p in t.agent.policy.model.parameters()} == {torch.float32}
    assert t.step()["rollout_gap_max"] < allowed_gap(torch.float32)


def test_fp64_and_fp32_stay(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for dtype in (torch.float32, torch.float64):
            t = trainer(tmp_path / str(dtype), dtype=dtype)
            assert {p.dtype for p in t.agent.policy.model.parameters()} == {dtype}


def frozen_but(count: int) -> Any:
    model, tokenizer = tiny()
    for p in list(model.parameters())[count:]:
        p.requires_grad_(False)
    return model, tokenizer


def test_a_policy_without_trainable_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loop_helpers.tiny", lambda dtype: frozen_but(0))
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM whose 20 all have requires"):
        trainer(tmp_path, train_layers=0)
    assert any(p.requires_grad for p in trainer(tmp_path).agent.policy.model.parameters())


def test_weights_that_stay_frozen_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loop_helpers.tiny", lambda dtype: frozen_but(3))
    with pytest.warns(UserWarning, match="train_layers 0 trains 3 of the 20 weights of Llama"):
        t = trainer(tmp_path, train_layers=0)
    assert sum(p.requires_grad for p in t.agent.policy.model.parameters()) == 3


def grown() -> tuple[Any, Any]:
    model, tokenizer = tiny()
    tokenizer.add_tokens([f"<{i}>" for i in range(302 - len(tokenizer))])
    return model, tokenizer


def test_a_tokenizer_of_more_tokens_than_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = "no more tokens than the 300 embeddings of LlamaForCausalLM, got 302 tokens up to id"
    with monkeypatch.context() as patch, pytest.raises(UnsupportedModelError, match=message):
        patch.setattr("loop_helpers.tiny", lambda dtype: grown())
        trainer(tmp_path)
    model, tokenizer = grown()
    model.save_pretrained(tmp_path / "m"), tokenizer.save_pretrained(tmp_path / "m")
    for load in (
        lambda: load_model(str(tmp_path / "m"), [], CPU),
        lambda: frozen.likelihood(str(tmp_path / "m"), CPU),
    ):
        with pytest.raises(UnsupportedModelError, match=message):
            load()
    model.resize_token_embeddings(310)  # more embeddings than tokens are fine
    check_vocabulary(model, tokenizer)


@pytest.mark.parametrize("token", ["eos_token_id", "pad_token_id"])
def test_special_tokens_outside_the_embedding(token: str) -> None:
    model = tiny()[0]

    class Own:
        eos_token_id, pad_token_id = 0, 0

    check_vocabulary(model, Own())
    setattr(Own, token, 300)
    with pytest.raises(UnsupportedModelError, match=f"tokenizer.{token} must be below the 300"):
        check_vocabulary(model, Own())


def test_placeholders_of_images_need_no_embedding() -> None:
    model, tokenizer = tiny()
    tokenizer.add_tokens([f"<{i}>" for i in range(300 - len(tokenizer))])
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.image_token_id = 300
    check_vocabulary(model, tokenizer)
    tokens = torch.tensor([[3, 300]])
    with pytest.raises(UnsupportedModelError, match="tokens below the 300 embeddings of Llama"):
        generate(
            model,
            tokens,
            torch.ones_like(tokens),
            max_new_tokens=1,
            temperature=1.0,
            eos=[0],
            generator=torch.Generator(),
            backend="reference",
        )


def test_reward_models_of_fewer_embeddings(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=200,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=1,
    )
    for kind, load in (
        (BertForSequenceClassification, lambda: frozen.classifier(str(tmp_path / "r"), CPU)),
        (BertModel, lambda: frozen.Encoder(str(tmp_path / "r"), CPU)),
    ):
        kind(config).save_pretrained(tmp_path / "r")
        tiny()[1].save_pretrained(tmp_path / "r")
        with pytest.raises(UnsupportedModelError, match=f"200 embeddings of {kind.__name__}, got"):
            load()
