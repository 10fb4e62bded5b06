"""bf16 runs, layers recomputed in the backward, and heads that are tied or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from loop_helpers import TEXTS, batch_of, gradients, tiny, trainer
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import ppo_fast
from ppo_fast.loop import TrainConfig, Trainer
from ppo_fast.loop.model.weights import chosen_dtype
from ppo_fast.loop.rewards import letters
from ppo_fast.loop.score import score
from ppo_fast.loop.update import accumulate

QUIET = Console(quiet=True)
TOKENS = torch.arange(24).view(2, 12)
SETTINGS: list[dict[str, Any]] = [
    {"train_layers": 1},
    {"train_layers": 1, "head": "logits"},
    {"train_layers": 1, "critic": "separate"},
    {"train_layers": 0},
    {"train_layers": 1, "lora_rank": 4},
]


def bf16(out: Path, **options: Any) -> Trainer:
    """A bf16 trainer of the tiny model."""
    defaults: dict[str, Any] = {
        "batch": 8,
        "minibatches": 2,
        "micro_batch": 2,
        "max_new_tokens": 6,
        "lr": 1e-3,
        "warmup": 0,
        "model": "tiny",
        "device": "cpu",
    }
    if "lora_rank" in options:
        pytest.importorskip("peft")
    config = TrainConfig(out=out, dtype="bfloat16", **(defaults | options))
    return Trainer(config, *tiny(), TEXTS, letters)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_bf16_trains_fp32_weights_from_a_ratio_of_one(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    t = bf16(tmp_path, **options)
    seen = {torch.float32}
    for model in (t.agent.policy.model, t.agent.critic):
        for p in model.parameters():
            assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16)
            seen.add(p.dtype)
    assert (torch.bfloat16 in seen) == (options["train_layers"] > 0)
    _, batch, plan = batch_of(t)
    stats = accumulate(t.agent, batch, plan[0], 0.0, t.backend, unchanged=True)
    assert stats is not None
    assert stats.compute()["ratio_min"] == stats.compute()["ratio_max"] == 1.0
    moments = gradients(t)
    assert moments and all(g.dtype == torch.float32 and g.isfinite().all() for g in moments)
    for state in t.agent.optimizer.state.values():
        assert state["exp_avg"].dtype == torch.float32


def test_bf16_computes_near_fp32(tmp_path: Path) -> None:
    """bf16 has 8 bits: log-probs of this size move by a few 2**-8, and not by nothing."""
    _, half, _ = batch_of(bf16(tmp_path / "bf16", train_layers=1))
    t = trainer(tmp_path / "fp32")
    parts = [torch.arange(8)]
    whole = score(t.agent, half.seqs, parts, t.backend)
    gap = (half.scored.ref - whole.ref)[half.seqs.mask].abs()
    assert 1e-4 < gap.mean() < 0.05


def test_bf16_learns(tmp_path: Path) -> None:
    t = bf16(
        tmp_path, train_layers=0, updates=20, batch=16, micro_batch=8, lr=1e-2, max_new_tokens=8
    )
    done = t.run(QUIET)
    assert done.last > done.first + 0.1
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert all(p.isfinite().all() for p in saved.parameters())


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("half", [False, True])
def test_recomputed_layers_give_the_same_gradients(
    tmp_path: Path, options: dict[str, Any], half: bool
) -> None:
    if "lora_rank" in options:
        pytest.importorskip("peft")
    found = []
    for recomputed in (False, True):
        make = bf16 if half else trainer
        t = make(tmp_path / str(recomputed), gradient_checkpointing=recomputed, **options)
        runs: list[int] = []
        # before the layer's first map: the second run ends where the backward has what it needs
        first = t.agent.policy.layers[-1].input_layernorm
        first.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        _, batch, plan = batch_of(t)
        runs.clear()
        accumulate(t.agent, batch, plan[0], 0.0, t.backend, unchanged=True)
        assert len(runs) == (4 if recomputed else 2)  # two micro-batches, each once or twice
        found.append(gradients(t))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("tied", [True, False])
def test_heads_that_are_tied_or_not_train_and_save(tmp_path: Path, tied: bool) -> None:
    model, tokenizer = tiny()
    config = model.config
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    options = TrainConfig(
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
        updates=2,
    )
    with torch.no_grad():
        start = model(TOKENS).logits
    t = Trainer(options, model, tokenizer, TEXTS, letters)
    t.run(QUIET)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    inner, outer = saved.get_input_embeddings().weight, saved.get_output_embeddings().weight
    assert (inner.data_ptr() == outer.data_ptr()) is tied
    with torch.no_grad():
        assert torch.equal(saved(TOKENS).logits, model(TOKENS).logits)
        assert not torch.equal(saved(TOKENS).logits, start)


@pytest.mark.parametrize("amx, avx512", [(True, False), (False, True), (False, False)])
def test_auto_is_bf16_where_the_cpu_multiplies_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, amx: bool, avx512: bool
) -> None:
    able = {"amx_bf16": amx, "avx512_bf16": avx512}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    chosen = amx or avx512
    config = TrainConfig(out=tmp_path, dtype="auto", train_layers=1, model="tiny", device="cpu")
    t = Trainer(config, *tiny(), TEXTS, letters)
    assert t.config.dtype == t.identity()["dtype"] == ("bfloat16" if chosen else "float32")
    assert t.agent.precision == (torch.bfloat16 if chosen else torch.float32)
    assert chosen_dtype("float32", torch.device("cpu")) == "float32"
    assert chosen_dtype("auto", torch.device("meta")) == "float32"


def test_samples_drawn_in_bf16_are_weighed(tmp_path: Path) -> None:
    """By weights near 1, with the option's cap where it is given; fp32 ones only with it."""
    record = bf16(tmp_path / "a", train_layers=1).step()
    assert record["is_mean"] == pytest.approx(1.0, abs=0.1) and record["is_ess"] > 0.9
    assert bf16(tmp_path / "b", train_layers=1).correction == ppo_fast.Correction(
        "token", high=2.0
    )
    assert bf16(
        tmp_path / "c", train_layers=1, correction_high=1.5
    ).correction == ppo_fast.Correction("token", high=1.5)
    assert "is_mean" not in trainer(tmp_path / "d").step()
