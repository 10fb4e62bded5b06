"""Checkpoints that hold something else: no files, JSON without an end, values of no run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_loop_checkpoint import seeded

from ppo_fast.loop import CheckpointError
from ppo_fast.loop.checkpoint.folder import TENSORS, VALUES

QUIET = Console(quiet=True)
ENDED = "update-000002"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 updates with a checkpoint of each."""
    out = tmp_path_factory.mktemp("whole")
    seeded(out, updates=2).run(QUIET)
    return out


def put(path: Path, thing: str) -> str:
    """Put something in a file's place; what is said of it."""
    path.unlink()
    if thing == "deep JSON":
        path.write_text("[" * 200_000)
        return "recursion" if path.name == "manifest.json" else "is not what manifest.json says"
    if thing == "a FIFO":
        os.mkfifo(path)
    else:
        path.mkdir()
    return f"{path} must be a file, got {thing}"


@pytest.mark.parametrize("name", [TENSORS, VALUES, "manifest.json"])
@pytest.mark.parametrize("thing", ["a FIFO", "a folder", "deep JSON"])
def test_what_is_no_file_of_a_checkpoint_is_skipped(
    tmp_path: Path, whole: Path, thing: str, name: str
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    said = put(out / "checkpoints" / ENDED / name, thing)
    told: list[str] = []
    fresh = seeded(out, resume=True)
    fresh.begin(told.append)
    assert said in told[0] and "skipped: " in told[0] and fresh.updates == 1


def forged(folder: Path, change: Callable[[Any], Any]) -> None:
    """Change the values of a checkpoint and vouch for them."""
    values = json.dumps(change(json.loads((folder / VALUES).read_bytes())))
    (folder / VALUES).write_text(values)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["sha256"][VALUES] = hashlib.sha256(values.encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tree: [tree], "state.json has no identity or no state of a run"),
        (lambda tree: {"state": tree["state"]}, "state.json has no identity or no state"),
        (lambda tree: tree | {"state": {}}, "state.json has no number of updates"),
        (lambda tree: tree | {"x": {"tensor": "y"}}, "tensors.safetensors has no 'y'"),
    ],
)
def test_a_checkpoint_of_something_else_is_skipped(
    tmp_path: Path, whole: Path, change: Any, reason: str
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    forged(out / "checkpoints" / ENDED, change)
    told: list[str] = []
    fresh = seeded(out, resume=True)
    fresh.begin(told.append)
    assert told[0].partition(" skipped: ")[2].startswith(reason) and fresh.updates == 1


@pytest.mark.parametrize("key", ["prompts", "random", "lr", "weights"])
def test_a_state_that_lacks_something_stops_the_run(tmp_path: Path, whole: Path, key: str) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    newest = out / "checkpoints" / ENDED
    forged(newest, lambda tree: tree["state"].pop(key) and tree)
    with pytest.raises(CheckpointError, match=f"resume: {newest} has a state .*: '{key}'"):
        seeded(out, resume=True).run(QUIET)
