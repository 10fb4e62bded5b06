"""The Hugging Face Trainer of docs/compat.md, against the same one with plain PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pages
import pytest
import torch
from control import Weights, assert_near, weights
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="needs `pip install ppo_fast[train]`")
pytest.importorskip("accelerate", reason="needs `pip install ppo_fast[train]`")

ROWS, LENGTH, VOCAB, STEPS = 12, 9, 41, 3


def fast() -> type:
    scope: dict[str, Any] = {}
    exec(pages.block("compat.md", "class PolicyTrainer"), scope)
    return scope["PolicyTrainer"]


class Plain(transformers.Trainer):
    """Log-softmax, ratio, clip and masked mean, spelled out."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(inputs["input_ids"], attention_mask=inputs["attention_mask"])
        every = outputs.logits[:, :-1].log_softmax(-1)
        logprobs = every.gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
        ratio, advantages = (logprobs - inputs["old_logprobs"]).exp(), inputs["advantages"]
        terms = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
        keep = inputs["response_mask"]
        loss = (terms * keep).sum() / keep.sum()
        return (loss, outputs) if return_outputs else loss


def model() -> Any:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCAB,
            n_positions=16,
            n_embd=32,
            n_layer=2,
            n_head=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def batches() -> list[dict[str, Tensor]]:
    """Old log-probabilities of the model itself, off by up to what a clip catches."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCAB, (ROWS, LENGTH), generator=g)
    with torch.no_grad():
        every = model()(ids).logits[:, :-1].log_softmax(-1)
    gap = 0.3 * torch.randn(ROWS, LENGTH - 1, generator=g)
    columns = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "old_logprobs": every.gather(-1, ids[:, 1:, None])[..., 0] + gap,
        "advantages": torch.randn(ROWS, LENGTH - 1, generator=g),
        "response_mask": torch.arange(LENGTH - 1).expand(ROWS, -1) >= 3,
    }
    return [{name: x[i] for name, x in columns.items()} for i in range(ROWS)]


def train(kind: type, folder: Path) -> tuple[Weights, list[float]]:
    trainer = kind(
        model=model(),
        train_dataset=batches(),
        args=transformers.TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=4,
            max_steps=STEPS,
            seed=0,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            remove_unused_columns=False,
            disable_tqdm=True,
        ),
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return weights(trainer.model), losses


def test_trains_as_plain_pytorch_does(tmp_path: Path) -> None:
    start = weights(model())
    theirs, plain_losses = train(Plain, tmp_path)
    ours, losses = train(fast(), tmp_path)
    assert any(not torch.equal(theirs[name], start[name]) for name in start)
    assert_near(ours, theirs)
    assert len(losses) == STEPS and losses == pytest.approx(plain_losses, rel=1e-4, abs=1e-5)
