"""LoRA: the reference is the adapter switched off, and only adapters and value head train."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from head_helpers import Allocations
from loop_helpers import TEXTS, batch_of, gradients, tiny, trainer, weights
from rich.console import Console
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import ppo_fast
from ppo_fast.loop import TrainConfig, Trainer, UnsupportedModelError
from ppo_fast.loop.checkpoint.state import trainable
from ppo_fast.loop.data.sequences import Sequences
from ppo_fast.loop.model.adapters import add_adapters
from ppo_fast.loop.model.head import output_head
from ppo_fast.loop.model.tower import Tower
from ppo_fast.loop.ranks.ranks import processes
from ppo_fast.loop.rewards import letters
from ppo_fast.loop.score import score

QUIET = Console(quiet=True)
# layers, head, critic
SETTINGS = [(1, "linear", "shared"), (0, "logits", "shared"), (1, "linear", "separate")]
TOKENS = torch.arange(24).view(2, 12)


@pytest.fixture(autouse=True)
def _peft() -> None:
    pytest.importorskip("peft")


def base_weights(t: Any) -> dict[str, torch.Tensor]:
    named = t.agent.policy.model.named_parameters()
    return {name: p.detach().clone() for name, p in named if "lora_" not in name}


@pytest.mark.parametrize(("layers", "head", "critic"), SETTINGS)
def test_the_reference_is_the_base_model(
    tmp_path: Path, layers: int, head: Any, critic: Any
) -> None:
    """Before any update and after three, when the policy has moved away from it."""
    options = {"train_layers": layers, "head": head, "critic": critic}
    plain = trainer(tmp_path / "plain", **options)
    t = trainer(tmp_path / "lora", lora_rank=4, **options)
    _, batch, plan = batch_of(t)
    _, want, _ = batch_of(plain)
    assert torch.equal(batch.seqs.tokens, want.seqs.tokens)
    assert torch.equal(batch.scored.ref, want.scored.ref)
    assert torch.equal(batch.scored.old, want.scored.ref)  # the product starts at zero
    parts = [rows for part in plan for rows in part]
    assert t.step()["kl"] == 0.0
    t.step(), t.step()
    again = score(t.agent, batch.seqs, parts, t.backend)
    assert torch.equal(again.ref, want.scored.ref)
    assert (again.old - again.ref).abs().max() > 1e-3


@pytest.mark.parametrize(("layers", "head", "critic"), SETTINGS)
def test_only_adapters_and_value_head_train(
    tmp_path: Path, layers: int, head: Any, critic: Any
) -> None:
    t = trainer(tmp_path, lora_rank=4, train_layers=layers, head=head, critic=critic)
    names = list(trainable(t.agent))
    assert all("lora_" in name or name.startswith("critic.head.") for name in names)
    # two matrices at each of Llama's seven linear maps
    policy = [name for name in names if name.startswith("policy.")]
    assert len(policy) == 14 * (layers or 2)
    base, before = base_weights(t), weights(t)
    record = t.step()
    assert record["steps"] == 4 and record["grad_norm"] > 0
    assert all(torch.equal(p, base[name]) for name, p in base_weights(t).items())
    moved = [not torch.equal(a, b) for a, b in zip(before, weights(t), strict=True)]
    assert all(moved)


def test_saved_adapter_and_merged_model_are_the_policy(tmp_path: Path) -> None:
    from peft import PeftModel

    t = trainer(tmp_path, lora_rank=4, lr=1e-2)
    assert t.run(QUIET).model == tmp_path / "model"
    base = tiny()[0]
    with torch.no_grad():
        policy, start = t.agent.policy.model(TOKENS).logits, base(TOKENS).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(TOKENS).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()(TOKENS).logits
    assert torch.equal(adapted, policy)
    assert (policy - start).abs().max() > 0.01
    torch.testing.assert_close(merged, policy, rtol=1e-5, atol=1e-5)


def test_without_merging_only_the_adapter_is_saved(tmp_path: Path) -> None:
    t = trainer(tmp_path, lora_rank=4, lora_merge=False, updates=1)
    assert t.run(QUIET).model == tmp_path / "adapter"
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    assert not (tmp_path / "model").exists()


def test_layers_of_conv1d_take_adapters() -> None:
    """GPT-2's linear layers are of another class, with their weights transposed."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=2, n_positions=32)
    model = GPT2LMHeadModel(config).eval()
    before = model(TOKENS).logits
    adapted, split = add_adapters(model, 2, 1)
    assert split == 2 and torch.equal(model(TOKENS).logits, before)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 8 and all(".h.2." in f".{name}" for name in names)
    adapted.merge_and_unload()


def last_record(folder: Path) -> dict[str, Any]:
    """The last line of a run's log, without its times."""
    record = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    return {k: v for k, v in record.items() if k not in ("seconds", "tokens_per_second")}


def test_a_resumed_run_ends_bitwise_equal(tmp_path: Path) -> None:
    options: dict[str, Any] = {"lora_rank": 4, "updates": 4, "save_every": 1, "batch": 8}
    whole = trainer(tmp_path, **options, keep_checkpoints=4)
    whole.run(QUIET)
    before = last_record(tmp_path)
    for number in (3, 4):
        shutil.rmtree(tmp_path / "checkpoints" / f"update-{number:06d}")
    t = trainer(tmp_path, **options, resume=True)
    torch.manual_seed(99)
    t.run(QUIET)
    assert t.updates == 4
    assert all(map(torch.equal, weights(t), weights(whole)))
    assert last_record(tmp_path) == before


def test_gradient_checkpointing_keeps_the_bits_and_the_saved_model(tmp_path: Path) -> None:
    found = []
    for recomputed in (False, True):
        t = trainer(
            tmp_path / str(recomputed), lora_rank=4, gradient_checkpointing=recomputed, updates=2
        )
        t.run(QUIET)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / str(recomputed) / "model")
        found.append([*weights(t), *model.parameters()])
    assert not gradients(t)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_without_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    message = r"peft.*lora_rank needs: pip install 'ppo_fast\[lora\]'"
    with pytest.raises(ModuleNotFoundError, match=message):
        trainer(tmp_path, lora_rank=4)


def test_more_layers_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train_layers must be at most 2, got 3"):
        trainer(tmp_path, lora_rank=4, train_layers=3)


def test_fsdp2_takes_no_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = TrainConfig(lora_rank=4, parallel="fsdp2")
    message = "lora_rank must be 0 with parallel='fsdp2': use 'ddp'"
    with pytest.raises(ValueError, match=message), processes(config):
        pass


def with_adapters_on_the_head(*names: str, **options: Any) -> Any:
    """The tiny model, its head untied, with random adapters on the head and in the layers."""
    from peft import LoraConfig, get_peft_model

    model, _ = tiny(torch.float64)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    lora = LoraConfig(
        r=4,
        target_modules=["q_proj", "lm_head"],
        task_type="CAUSAL_LM",
        init_lora_weights=False,
        **options,
    )
    adapted = get_peft_model(model, lora, adapter_name=names[0])
    for name in names[1:]:
        adapted.add_adapter(name, lora)
    adapted.base_model.set_adapter(list(names))
    return adapted.double().eval()


def head_and_own(tower: Tower) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of four tokens by the linear head and by the model's own logits."""
    seqs = Sequences(TOKENS, torch.ones_like(TOKENS), torch.ones(2, 4, dtype=torch.bool))
    logits, hidden = tower.logits(seqs)
    tokens = seqs.flat(seqs.response)
    own = logits.double().log_softmax(-1).gather(-1, tokens[:, None]).squeeze(1)
    head = tower.head(hidden)
    return ppo_fast.linear_token_logprobs(hidden, tokens=tokens, **head).logprobs, own


@pytest.mark.parametrize(
    ("names", "options"),
    [(("a",), {}), (("a", "b"), {"use_rslora": True}), (("a",), {"lora_bias": True})],
)
def test_adapters_on_the_head_are_in_the_linear_head(
    names: tuple[str, ...], options: dict[str, Any]
) -> None:
    model = with_adapters_on_the_head(*names, **options)
    tower = Tower(model, 0)
    linear, own = head_and_own(tower)
    torch.testing.assert_close(linear, own, rtol=0, atol=1e-12)
    weights = [p for n, p in model.named_parameters() if "lm_head.lora" in n]
    grads = [torch.autograd.grad(x.sum(), weights, retain_graph=True) for x in (linear, own)]
    assert len(weights) >= 2 * len(names)
    for a, b in zip(*grads, strict=True):
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
    off, own_off = head_and_own(Tower(model, 0, model.disable_adapter))
    torch.testing.assert_close(off, own_off, rtol=0, atol=1e-12)
    assert (off - linear).abs().max() > 1e-2


@pytest.mark.parametrize("names", [("a",), ("a", "b")])
def test_no_dense_head_is_formed(names: tuple[str, ...]) -> None:
    """Loss and gradients are those of weight + scale·B·A, which a micro-batch does not make."""
    model = with_adapters_on_the_head(*names)
    tower, tokens = Tower(model, 0), torch.arange(6)
    hidden = torch.randn(6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    leaves = [p for n, p in model.named_parameters() if "lm_head.lora" in n]
    given = {"tokens": tokens, "old_logprobs": torch.full((6,), -5.0).double()}
    advantages = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def loss_and_grads(head: dict[str, Any], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = ppo_fast.linear_ppo_loss(x, advantages=advantages, **given, **head)
        return out.loss, *torch.autograd.grad(out.loss, [x, *leaves])

    tower.product()  # which is measured once
    x = hidden.clone().requires_grad_()
    want = loss_and_grads(tower.head(), x)
    x = hidden.clone().requires_grad_()
    with Allocations() as seen:
        got = loss_and_grads(tower.head(x), x)
    assert len(got) == 2 + 2 * len(names) and len(tower.head(x)["extra"]) == 2
    for a, b in zip(got, want, strict=True):
        assert b.any()
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert all(shape.numel() < 300 * 32 for shape in seen.shapes)


def test_dropout_of_an_adapter_on_the_head() -> None:
    """In training mode u is of what the dropout leaves of the hidden states."""
    model = with_adapters_on_the_head("a", lora_dropout=0.5).train()
    hidden = torch.randn(6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(1)
    want = model.get_output_embeddings()(hidden)
    torch.manual_seed(1)
    extra = output_head(model).extra(hidden)
    assert extra is not None
    u, b = extra
    head = output_head(model.eval())
    still = head.extra(hidden)
    assert still is not None and not torch.equal(u, still[0])
    torch.testing.assert_close(hidden @ head.weight.T + u @ b.T, want, rtol=0, atol=1e-12)


def other_adapters(kind: str) -> Any:
    """The tiny model with adapters on its head that are no LoRA."""
    import peft

    model, _ = tiny(torch.float64)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    given: dict[str, Any] = {"target_modules": ["q_proj", "lm_head"], "task_type": "CAUSAL_LM"}
    if kind == "IA3":
        given["feedforward_modules"] = []
    if kind == "AdaLora":
        given["total_step"] = 10
    return peft.get_peft_model(model, getattr(peft, f"{kind}Config")(**given)).double().eval()


@pytest.mark.parametrize(
    ("kind", "named"), [("IA3", "ia3.layer.Linear"), ("AdaLora", "adalora.layer.SVDLinear")]
)
def test_adapters_of_other_kinds_are_refused_by_name(kind: str, named: str) -> None:
    model = other_adapters(kind)
    with pytest.raises(UnsupportedModelError, match=f"'default' on the output head .*{named}"):
        Tower(model, 0).head()
    with torch.no_grad():
        off = Tower(model, 0, model.disable_adapter)
        torch.testing.assert_close(*head_and_own(off), rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{"modules_to_save": ["lm_head"]}, {"trainable": [7, 9]}])
def test_a_head_that_is_trained_whole_or_for_some_tokens(options: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model

    model, _ = tiny(torch.float64)
    options = dict(options)
    if "trainable" in options:
        options = {"trainable_token_indices": options["trainable"]}
    else:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
    model = get_peft_model(model, lora).double().eval()
    for name, p in model.named_parameters():
        if p.requires_grad and "lora" not in name:
            p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(5))
    linear, own = head_and_own(Tower(model, 0))
    torch.testing.assert_close(linear, own, rtol=0, atol=1e-12)
    off, own_off = head_and_own(Tower(model, 0, model.disable_adapter))
    torch.testing.assert_close(off, own_off, rtol=0, atol=1e-12)
    assert (off - linear).abs().max() > 1e-3


def test_merged_adapters_on_the_head_count_once() -> None:
    model = with_adapters_on_the_head("a")
    tower = Tower(model, 0)
    apart, _ = head_and_own(tower)
    model.merge_adapter()
    merged, own = head_and_own(tower)
    torch.testing.assert_close(merged, own, rtol=0, atol=1e-12)
    torch.testing.assert_close(merged, apart, rtol=0, atol=1e-8)


def test_another_adapter_on_the_head_is_refused(tmp_path: Path) -> None:
    model = with_adapters_on_the_head("a", use_dora=True)
    config = TrainConfig(
        out=tmp_path,
        model="mine",
        device="cpu",
        batch=4,
        micro_batch=4,
        max_new_tokens=4,
        train_layers=0,
        warmup=0,
        save_every=0,
        compare=0,
    )
    message = r"adapter 'a' on the output head .*lm_head \(Linear\) of PeftModel.*--head logits"
    with pytest.raises(UnsupportedModelError, match=message):
        Trainer(config, model, tiny()[1], TEXTS, letters)
    logits = dataclasses.replace(config, head="logits")
    assert Trainer(logits, model, tiny()[1], TEXTS, letters).step()["steps"] == 4


def test_a_run_trains_the_adapters_on_the_head(tmp_path: Path) -> None:
    model = with_adapters_on_the_head("a").float()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    config = TrainConfig(
        out=tmp_path,
        model="mine",
        device="cpu",
        batch=4,
        micro_batch=4,
        max_new_tokens=4,
        train_layers=0,
        warmup=0,
        save_every=0,
        compare=0,
    )
    record = Trainer(config, model, tiny()[1], TEXTS, letters).step()
    assert record["rollout_gap_max"] < 1e-4
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all("lora_" in n for n in moved) and any("lm_head" in n for n in moved)
