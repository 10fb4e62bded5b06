"""A folder that holds a run: refused, resumed or overwritten, and never emptied for nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from loop_helpers import trainer
from rich.console import Console

from ppo_fast.__main__ import main
from ppo_fast.loop import RewardLengthError, RunExistsError

QUIET = Console(quiet=True)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run but its lock, which names the last trainer that took the folder."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def too_few(prompts: list[str], completions: list[str]) -> list[float]:
    return [0.0]


@pytest.mark.parametrize("updates", [1, 2], ids=["unfinished", "finished"])
def test_a_folder_that_holds_a_run_is_refused_as_it_is(tmp_path: Path, updates: int) -> None:
    t = trainer(tmp_path, updates=2)
    t.step() if updates == 1 else t.run(QUIET)
    t.checkpoints.save(t)
    t.lock.release()
    before = contents(tmp_path)
    owner = (tmp_path / ".lock").read_bytes()
    held = "log.jsonl, samples.jsonl, checkpoints" + (", model" if updates == 2 else "")
    wanted = rf"out {tmp_path} holds a run \({held}\): --resume goes on with it, --overwrite"
    with pytest.raises(RunExistsError, match=wanted):
        trainer(tmp_path, updates=2).run(QUIET)
    with pytest.raises(RunExistsError, match=wanted):
        trainer(tmp_path, updates=2).step()
    assert contents(tmp_path) == before and (tmp_path / ".lock").read_bytes() == owner
    outcome = trainer(tmp_path, updates=3, resume=True).run(QUIET)
    assert len(outcome.rewards) == 3


@pytest.mark.parametrize("left", ["log.jsonl", "checkpoints/update-000004/x", "adapter/x"])
def test_what_a_run_left_alone_is_a_run(tmp_path: Path, left: str) -> None:
    (tmp_path / left).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / left).write_text("{}\n")
    with pytest.raises(RunExistsError, match=rf"holds a run \({left.partition('/')[0]}\)"):
        trainer(tmp_path).begin()


@pytest.mark.parametrize("left", ["notes.txt", "model/", "log.jsonl", "config.json"])
def test_a_folder_without_anything_learnt_is_free(tmp_path: Path, left: str) -> None:
    """An empty log is what a run leaves that was stopped before its first update."""
    if left.endswith("/"):
        (tmp_path / left).mkdir()
    else:
        (tmp_path / left).write_text("" if left == "log.jsonl" else "{}")
    assert trainer(tmp_path).step()["update"] == 0


def test_overwrite_keeps_the_former_run_until_an_update_is_made(tmp_path: Path) -> None:
    trainer(tmp_path, updates=2, save_every=1).run(QUIET)
    before = contents(tmp_path)
    with pytest.raises(RewardLengthError):
        trainer(tmp_path, too_few, overwrite=True, seed=1).run(QUIET)
    assert contents(tmp_path) == before
    trainer(tmp_path, overwrite=True, seed=1, updates=1).run(QUIET)
    after = contents(tmp_path)
    assert json.loads(after["config.json"])["seed"] == 1
    assert [json.loads(x)["update"] for x in after["log.jsonl"].splitlines()] == [0]
    assert {n.split("/")[1] for n in after if n.startswith("checkpoints/")} == {"update-000001"}
    assert after["model/model.safetensors"] != before["model/model.safetensors"]


def test_no_model_is_written_before_an_optimiser_step(tmp_path: Path) -> None:
    def late(prompts: list[str], completions: list[str]) -> list[float]:
        raise KeyboardInterrupt

    outcome = trainer(tmp_path / "stopped", late).run(QUIET)
    assert outcome.interrupted and outcome.model is None
    with pytest.raises(RewardLengthError):
        trainer(tmp_path / "wrong", too_few).run(QUIET)
    for folder in ("stopped", "wrong"):
        assert sorted(p.name for p in (tmp_path / folder).glob("model*")) == []


def test_stored_samples_are_not_written_over(tmp_path: Path) -> None:
    kept = tmp_path / "kept.jsonl"
    kept.write_text('{"update": 0}\n')
    with pytest.raises(RunExistsError, match=f"save_transitions {kept} is there: --overwrite"):
        trainer(tmp_path / "run", save_transitions=kept).step()
    assert kept.read_text() == '{"update": 0}\n'
    trainer(tmp_path / "run", save_transitions=kept, overwrite=True).step()
    assert len(kept.read_text().splitlines()) == 8


def test_the_command_refuses_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log.jsonl").write_text('{"update": 0}\n')
    line = f"train --model no/such/model --device cpu --out {tmp_path}"
    assert main(line.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"ppo-fast train: out {tmp_path} holds a run (log.jsonl)")
    assert said.count("\n") == 1
    with pytest.raises(ValueError, match="overwrite must be off with resume, got True"):
        trainer(tmp_path, resume=True, overwrite=True)
