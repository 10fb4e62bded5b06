"""Options from the command line and from a file: the nearest name is given for one that is not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from loop_helpers import trainer

from ppo_fast.__main__ import main
from ppo_fast.loop import TrainConfig
from ppo_fast.loop.options import ConfigError, parse


def saved(folder: Path, text: str) -> str:
    path = folder / "options.json"
    path.write_text(text)
    return str(path)


def test_an_unknown_option_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--kl-coeff", "0.1"])
    error = capsys.readouterr().err
    assert "Unrecognized options: --kl-coeff" in error and "--kl-coef FLOAT" in error


def test_the_configuration_of_a_former_run_is_read_back(tmp_path: Path) -> None:
    t = trainer(tmp_path, kl_target=6.0, variant="gspo", tensorboard=False)
    path = str(tmp_path / "config.json")
    assert dataclasses.replace(parse(["--config", path])) == t.config
    assert parse([f"--config={path}", "--batch", "64"]).batch == 64  # by hand goes before
    assert parse(["--batch", "64", "--config", path]).batch == 64


def test_later_files_and_defaults(tmp_path: Path) -> None:
    one, two = tmp_path / "1.json", tmp_path / "2.json"
    one.write_text('{"lr": 0.5, "seed": 3, "quick": true}')
    two.write_text('{"lr": 0.25, "kl_stop": null}')
    config = parse(["--config", str(one), "--config", str(two)])
    assert config == TrainConfig(lr=0.25, seed=3, quick=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"kl_coeff": 0.1}', "unknown option 'kl_coeff'; did you mean 'kl_coef'?"),
        ('{"xyzzy": 1}', "unknown option 'xyzzy'$"),
        ('{"lr": [1]}', r"lr must be a single value, got \[1\]"),
        ("[1, 2]", r"must hold an object of options, got \[1, 2\]"),
        ('{"lr": 1', "Expecting ',' delimiter"),
    ],
)
def test_a_file_that_cannot_be_options(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"options.json: .*{message}"):
        parse(["--config", saved(tmp_path, text)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": "many"}, "Error parsing --batch: invalid literal for int"),
        ({"variant": "ppo"}, "--variant"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
    ],
)
def test_a_wrong_value_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict, message: str
) -> None:
    with pytest.raises(SystemExit):
        parse(["--config", saved(tmp_path, json.dumps(options))])
    assert message in capsys.readouterr().err


def test_the_command_says_why_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--config", str(tmp_path / "none.json")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("ppo-fast train: ") and "No such file" in line
