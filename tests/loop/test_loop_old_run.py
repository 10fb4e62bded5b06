"""A run folder that an older version wrote: it resumes, and ends where that version ended.

`old_run/run` is the folder of a run after 2 of 4 updates, `old_run/base` its model, and `end.*`
hold log, samples and trained weights of the same run, resumed and ended by the version that wrote
it.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loop_helpers import TEXTS
from loop_seeded import Learned
from rich.console import Console
from safetensors.torch import load_file

from ppo_fast.loop import TrainConfig, Trainer
from ppo_fast.loop.checkpoint.checkpoints import DEFAULTS
from ppo_fast.loop.checkpoint.folder import TENSORS, read
from ppo_fast.loop.config import RENAMED
from ppo_fast.loop.model.load import load_model

OLD = Path(__file__).parent / "old_run"
OPTIONS: dict[str, Any] = {
    "model": "tiny",
    "device": "cpu",
    "backend": "reference",
    "updates": 4,
    "batch": 6,
    "minibatches": 2,
    "micro_batch": 2,
    "max_new_tokens": 6,
    "train_layers": 1,
    "lr": 1e-3,
    "warmup": 3,
    "variant": "penalty",
    "kl_target": 0.5,
    "kl_horizon": 50.0,
    "critic": "separate",
    "save_every": 1,
    "keep_checkpoints": 1,
}
# Processors sum in different orders. A gradient here is a sum of a few hundred fp64 terms, so two
# of them differ by less than 300 * 2**-53 |g|; Adam divides by |g| + 1e-5, and the 8 steps of
# lr 1e-3 are each off by less than 1e-13.
WEIGHTS = 1e-12
# Logged numbers are sums of at most 300 terms of weights that far apart.
LOGGED = 300 * WEIGHTS


def resumed(out: Path) -> Trainer:
    model, tokenizer = load_model(str(OLD / "base"), [], torch.device("cpu"))
    config = TrainConfig(out=out, resume=True, **OPTIONS)
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    return Trainer(config, model.double(), tokenizer, TEXTS, Learned())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_near(got: Any, want: Any, name: str) -> None:
    """Texts and counts are equal, numbers near."""
    if isinstance(want, dict):
        assert set(got) >= set(want), name
        for key, value in want.items():
            assert_near(got[key], value, f"{name}.{key}")
    elif isinstance(want, float):
        assert got == pytest.approx(want, rel=LOGGED, abs=LOGGED), name
    else:
        assert got == want, name


def test_an_old_run_folder_resumes_and_ends_as_it_did(tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(OLD / "run", out)
    outcome = resumed(out).run(Console(quiet=True))
    assert len(outcome.rewards) == 4 and not outcome.interrupted
    end = json.loads((OLD / "end.json").read_text())
    for name in ("log", "samples"):
        found = lines(out / f"{name}.jsonl")
        assert len(found) == len(end[name]) > 2
        for i, (got, want) in enumerate(zip(found, end[name], strict=True)):
            assert_near(got, want, f"{name}[{i}]")
    state = read(out / "checkpoints" / "update-000004")["state"]
    want = load_file(OLD / "end.safetensors")
    assert state["weights"].keys() == want.keys()
    for name, weight in want.items():
        torch.testing.assert_close(state["weights"][name], weight, rtol=0, atol=WEIGHTS)


def test_the_old_run_holds_what_a_checkpoint_holds(tmp_path: Path) -> None:
    """Every part of the state is in it, so that the test above reads them all."""
    out = tmp_path / "run"
    shutil.copytree(OLD / "run", out)
    before = read(out / "checkpoints" / "update-000002")
    resumed(out).run(Console(quiet=True))
    after = read(out / "checkpoints" / "update-000004")
    # An option that the older version did not have stands at its default, and one that it had
    # under another name has its value.
    former = {RENAMED.get(name, name): value for name, value in before["identity"].items()}
    younger = after["identity"].keys() - former.keys()
    assert younger - DEFAULTS.keys() == {"the columns' sha256"}
    added = {name: after["identity"][name] for name in younger}
    assert {name: DEFAULTS.get(name, added[name]) for name in younger} == added
    assert after["identity"] == former | added
    assert before["state"].keys() == after["state"].keys()
    assert before["state"]["weights"].keys() == after["state"]["weights"].keys()
    assert (OLD / "run" / "checkpoints" / "update-000002" / TENSORS).stat().st_size < 200_000
