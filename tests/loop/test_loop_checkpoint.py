"""A run that goes on from a checkpoint is the run that never stopped, to the bit."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loop_helpers import TEXTS, tiny
from loop_seeded import Learned, seeded
from rich.console import Console

from ppo_fast.loop import CheckpointError, TrainConfig, Trainer
from ppo_fast.loop.checkpoint.folder import TENSORS, VALUES, read
from ppo_fast.loop.checkpoint.state import FREE

QUIET = Console(quiet=True)
ENDED = "update-000004"


def disturbed() -> None:
    """Move every global stream away from where a run left it."""
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)


def resumed(out: Path) -> Trainer:
    """A fresh trainer that has run to the end from the newest checkpoint of `out`."""
    t = seeded(out, resume=True)
    disturbed()
    t.run(QUIET)
    return t


def values_of(
    thing: Any, path: str = "", seen: dict[int, Any] | None = None
) -> Iterator[tuple[str, Any]]:
    """Every number, string, tensor and random stream that an object leads to, by its path."""
    seen = {} if seen is None else seen  # by their ids, which stay theirs while they are held
    if isinstance(thing, torch.Tensor):
        yield path, (thing.dtype, thing.detach().flatten().tolist())
    elif isinstance(thing, torch.Generator):
        yield path, thing.get_state().tolist()
    elif isinstance(thing, random.Random):
        yield path, thing.getstate()
    elif isinstance(thing, int | float | str | bytes | Path | None):
        yield path, repr(thing)
    elif id(thing) not in seen:
        seen[id(thing)] = thing
        if isinstance(thing, Mapping):
            for i, (key, value) in enumerate(thing.items()):
                yield from values_of(value, f"{path}.{key if isinstance(key, str) else i}", seen)
        elif isinstance(thing, list | tuple | set | array):
            for i, value in enumerate(thing):
                yield from values_of(value, f"{path}.{i}", seen)
        elif not callable(thing) or hasattr(thing, "state_dict"):
            yield from values_of(getattr(thing, "__dict__", {}), path, seen)


# What a resumed trainer may differ in: times, its place on the disk, and what only reports read.
ELSEWHERE = (
    ".checkpoints",
    ".config.out",
    ".config.resume",
    ".config.updates",
    ".last_batch",
    ".recorder.",
    ".lock.",
    ".agent.config.out",
    ".agent.config.resume",
    ".agent.config.updates",
)


def everything(t: Trainer) -> dict[str, Any]:
    """The state that steps depend on, found by walking the trainer instead of asking `capture`."""
    walked = {k: v for k, v in values_of(vars(t)) if not k.startswith(ELSEWHERE)}
    timed = ("seconds", "tokens_per_second", ".dropped")
    return {k: v for k, v in walked.items() if not any(word in k for word in timed)}


def log_of(out: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")} for r in records
    ]


def assert_same_end(a: Path, b: Path, name: str = ENDED) -> None:
    """Weights, optimiser, random streams, coefficients, prompts, reward, log and samples."""
    for file in (TENSORS, VALUES):
        ours, theirs = ((x / "checkpoints" / name / file).read_bytes() for x in (a, b))
        assert ours == theirs
    assert (a / "samples.jsonl").read_bytes() == (b / "samples.jsonl").read_bytes()
    assert log_of(a) == log_of(b)
    model = "model/model.safetensors"
    assert (a / model).read_bytes() == (b / model).read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trainer]:
    """A run of 4 updates that nothing stopped."""
    out = tmp_path_factory.mktemp("whole")
    t = seeded(out)
    t.run(QUIET)
    return out, t


@pytest.mark.case("R1")
@pytest.mark.parametrize("done", [1, 3])
def test_resumed_run_ends_bitwise_equal(tmp_path: Path, whole: Any, done: int) -> None:
    out, uninterrupted = whole
    seeded(tmp_path, updates=done).run(QUIET)
    t = resumed(tmp_path)
    assert t.history.column("update").tolist() == [0, 1, 2, 3]
    assert_same_end(out, tmp_path)
    assert everything(t) == everything(uninterrupted)


def test_nothing_that_steps_change_is_forgotten(tmp_path: Path) -> None:
    """The walk sees what a step moves, so a new stateful member shows in the test above."""
    t = seeded(tmp_path)
    before = everything(t)
    t.step()
    after = everything(t)
    moved = {k.split(".")[1] for k in after if before.get(k) != after[k]}
    assert moved == {  # first_batch: what a resumed run checks again
        "agent",
        "begun",
        "first_batch",
        "history",
        "kl_coef",
        "loss_kl_coef",
        "prompts",
        "reward",
        "sampler",
        "shuffling",
        "updates",
    }


def test_steps_after_the_last_checkpoint_are_done_again(tmp_path: Path, whole: Any) -> None:
    """Log and samples of later updates, even a torn line, are cut off."""
    t = seeded(tmp_path, save_every=2)
    for _ in range(3):
        t.step()
        t.checkpoints.after_step(t, pytest.fail)
    t.close()
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"update": 3, "rew')
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["update-000002"]
    resumed(tmp_path)
    assert_same_end(whole[0], tmp_path)


def damages() -> dict[str, Any]:
    def flip(folder: Path, name: str) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    def cut(folder: Path, name: str) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    def link(folder: Path, name: str) -> None:
        (folder / name).rename(folder / "elsewhere")
        (folder / name).symlink_to("elsewhere")

    return {
        "flip": flip,
        "cut": cut,
        "link": link,
        "empty": lambda folder, name: (folder / name).write_bytes(b""),
        "absent": lambda folder, name: (folder / name).unlink(),
    }


@pytest.mark.case("R2")
@pytest.mark.parametrize("name", [TENSORS, VALUES, "manifest.json"])
@pytest.mark.parametrize("damage", damages())
def test_a_damaged_checkpoint_is_skipped(
    tmp_path: Path, whole: Any, damage: str, name: str
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    newest = out / "checkpoints" / ENDED
    damages()[damage](newest, name)
    told: list[str] = []
    fresh = seeded(out, resume=True)
    fresh.begin(told.append)
    assert told[0].startswith(f"checkpoint {newest} skipped: ") and "update 3" in told[1]
    assert fresh.updates == 3 and log_of(out)[-1]["update"] == 2


def test_without_a_whole_checkpoint_the_run_stops(tmp_path: Path) -> None:
    seeded(tmp_path, updates=1).run(QUIET)
    (tmp_path / "checkpoints" / "update-000001" / VALUES).unlink()
    model = (tmp_path / "model" / "model.safetensors").read_bytes()
    fresh = seeded(tmp_path, resume=True)
    with pytest.raises(CheckpointError, match=r"none of the 1 checkpoints in .* is whole"):
        fresh.run(QUIET)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == model


def test_resuming_nothing_starts_anew(tmp_path: Path, whole: Any) -> None:
    """Also where a run was killed before its first checkpoint."""
    (tmp_path / "checkpoints" / "partial").mkdir(parents=True)
    (tmp_path / "log.jsonl").write_text('{"update": 0}\n')
    seeded(tmp_path, resume=True).run(QUIET)
    assert_same_end(whole[0], tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "update-000002",
        "update-000003",
        "update-000004",
    ]


def test_a_lost_log_is_told(tmp_path: Path) -> None:
    seeded(tmp_path, updates=2).run(QUIET)
    (tmp_path / "log.jsonl").unlink()
    told: list[str] = []
    fresh = seeded(tmp_path, resume=True)
    fresh.begin(told.append)
    assert fresh.updates == 2
    assert told[-1] == "warning: the log lacks some of the first 2 updates"


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    seeded(tmp_path, keep_checkpoints=1).run(QUIET)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [ENDED]
    seeded(tmp_path / "none", save_every=0).run(QUIET)
    assert not (tmp_path / "none" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"lr": 0.5}, r"lr is 0.5, the checkpoint's is 0.001"),
        ({"critic": "shared"}, r"critic is 'shared', the checkpoint's is 'separate'"),
        ({"seed": 7}, "seed is 7, the checkpoint's is 0"),
        ({"updates": 1}, "updates must be at least the 2 that the checkpoint has, got 1"),
    ],
)
def test_a_different_run_is_refused(tmp_path: Path, option: dict[str, Any], message: str) -> None:
    seeded(tmp_path, updates=2).run(QUIET)
    fresh = seeded(tmp_path, resume=True, **option)
    with pytest.raises(CheckpointError, match="resume: " + message):
        fresh.run(QUIET)


def test_other_prompts_and_another_base_are_refused(tmp_path: Path) -> None:
    t = seeded(tmp_path, updates=1)
    t.run(QUIET)
    config = dataclasses.replace(t.config, resume=True, updates=2)
    model, tokenizer = tiny()
    with pytest.raises(CheckpointError, match="the prompts' sha256"):
        Trainer(config, model, tokenizer, TEXTS[:-1], Learned()).run(QUIET)
    model, tokenizer = tiny()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    with pytest.raises(CheckpointError, match="the frozen weights' sha256"):
        Trainer(config, model, tokenizer, TEXTS, Learned()).run(QUIET)


def test_every_option_is_held_or_free() -> None:
    """A new option is held until it is listed as one that moves nothing."""
    names = {f.name for f in dataclasses.fields(TrainConfig)}
    assert names >= FREE and {"lr", "kl_coef", "seed", "batch", "model"} <= names - FREE


def test_a_checkpoint_has_no_pickle(tmp_path: Path) -> None:
    seeded(tmp_path, updates=1).run(QUIET)
    folder = tmp_path / "checkpoints" / "update-000001"
    assert {p.name for p in folder.iterdir()} == {TENSORS, VALUES, "manifest.json"}
    for name in (VALUES, "manifest.json"):
        assert isinstance(json.loads((folder / name).read_bytes()), dict)
    tree = read(folder)
    assert set(tree["state"]["weights"]) == set(tree["state"]["optimizer"])
    assert {"exp_avg", "exp_avg_sq", "step"} == set(tree["state"]["optimizer"]["critic.head.bias"])
    trained = sum(w.numel() for w in tree["state"]["weights"].values())
    assert trained < sum(p.numel() for p in tiny()[0].parameters())  # frozen ones are not in it


def test_skipped_steps_and_halved_micro_batches_are_remembered(tmp_path: Path) -> None:
    t = seeded(tmp_path)
    t.step()
    t.agent.skips, t.agent.memory.halved = 2, True
    t.checkpoints.save(t)
    fresh = seeded(tmp_path, resume=True)
    assert (fresh.agent.skips, fresh.agent.memory.halved) == (0, False)
    fresh.begin(lambda text: None)
    assert (fresh.agent.skips, fresh.agent.memory.halved) == (2, True)
