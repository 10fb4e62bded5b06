"""Model folders: the loop reads tensors from them, and runs nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from loop_helpers import tiny
from safetensors.torch import load_file

from ppo_fast.loop.model.load import load_model

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The tiny model as it is saved."""
    model, tokenizer = tiny()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_safetensors_are_read(folder: Path) -> None:
    model, _ = load_model(str(folder), [], CPU)
    held = load_file(folder / "model.safetensors")["model.norm.weight"]
    assert torch.equal(model.model.norm.weight, held)


def test_pickled_weights_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(OSError, match="safetensors"):
        load_model(str(folder), [], CPU)


def test_code_beside_the_weights_is_not_run(folder: Path) -> None:
    ran = folder / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(str(folder), [], CPU)
    assert not ran.exists()
