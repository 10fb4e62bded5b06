"""Options from the command line and from a file: the nearest name is given for one that is not."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
import typing
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tyro", reason="the loop's command line needs tyro")

from loop_helpers import trainer

from ppo_fast.__main__ import main
from ppo_fast.loop import TrainConfig
from ppo_fast.loop.cli import ConfigError, parse
from ppo_fast.loop.config import Given


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
    t.begin()
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


@pytest.mark.parametrize("spelling", ["--updates 40 --lr 0.0003", "--lr=3e-4 --updates=40"])
@pytest.mark.parametrize("other", ["--quick", "--task qa", "--task translate --quick"])
def test_an_option_given_at_its_default_is_given(spelling: str, other: str) -> None:
    for line in (f"{spelling} {other}", f"{other} {spelling}"):
        config = parse(line.split()).resolved()
        assert (config.updates, config.lr) == (40, 3e-4)
        assert config.max_new_tokens < TrainConfig().max_new_tokens and not config.quick
    assert parse([*other.split(), "--max_new_tokens", "16"]).resolved().max_new_tokens == 16
    assert parse([*other.split(), "--no-shuffle"]).resolved().lr != 3e-4


def test_an_option_in_a_file_is_given(tmp_path: Path) -> None:
    """A former run's file lists every option, so that nothing stands in for any of them."""
    path = saved(tmp_path, '{"updates": 40, "quick": true}')
    assert parse(["--config", path]).resolved().updates == 40
    assert parse(["--config", path]).resolved().lr == TrainConfig(quick=True).resolved().lr
    t = trainer(tmp_path / "run", task="qa")
    t.begin()
    again = parse(["--config", str(tmp_path / "run" / "config.json"), "--quick"]).resolved()
    assert again == t.config


def test_python_options_are_given_and_stay_so() -> None:
    config = TrainConfig("qa", quick=True, updates=40)
    carried = dataclasses.replace(config, seed=3)
    for c in (config, carried, copy.deepcopy(config), pickle.loads(pickle.dumps(carried))):
        assert c.resolved().updates == c.resolved().resolved().updates == 40
        assert c.resolved().lr == 0.01 and "_given" not in dataclasses.asdict(c)
    changed = dataclasses.replace(TrainConfig(quick=True), lr=3e-4)
    assert changed.resolved().lr == 3e-4 and changed.resolved().updates == 30
    assert TrainConfig(updates=40) == TrainConfig()


def test_the_types_of_options_are_those_that_every_python_reads() -> None:
    """Python 3.10 resolves no InitVar, and tyro under 3.14 no base with type arguments."""
    assert typing.get_type_hints(TrainConfig)["_given"] is object
    assert not hasattr(Given, "__orig_bases__")


def test_options_are_checked_as_they_will_be() -> None:
    assert TrainConfig(quick=True, minibatches=32).resolved().batch == 32
    with pytest.raises(ValueError, match=r"minibatches must be in \[1, 32\], got 64"):
        TrainConfig(quick=True, minibatches=64)
    with pytest.raises(ValueError, match=r"minibatches must be in \[1, 16\], got 32"):
        TrainConfig(quick=True, batch=16, minibatches=32)


BOUNDS = ("max_grad_norm", "vf_clip", "score_clip", "correction_high", "kl_stop")  # inf is none
FLOATS = [f.name for f in dataclasses.fields(TrainConfig) if str(f.type).startswith("float")]
INTEGERS = [f.name for f in dataclasses.fields(TrainConfig) if f.type == "int"]


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e39, 1e-46, 10**400])
def test_a_number_that_fp32_does_not_hold_is_refused(name: str, value: Any) -> None:
    """Losses and rewards are computed in it, where 1e39 is infinite and 1e-46 is 0."""
    if name in BOUNDS and value == math.inf:
        assert getattr(TrainConfig(**{name: value}), name) == math.inf
        return
    with pytest.raises(ValueError, match=f"^TrainConfig: {name} must be a finite number") as found:
        TrainConfig(**{name: value})
    assert str(found.value).endswith(f", got {value}")
    assert len(FLOATS) >= 20


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [math.inf, math.nan, 2.5, "3", None])
def test_a_number_that_is_not_whole_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a whole number, got {value}"):
        TrainConfig(**{name: value})
    assert len(INTEGERS) >= 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": "0.1"}, "lr must be a number, got 0.1"),
        ({"lr": None}, "lr must be a number, got None"),
        ({"clip": 1.5}, "clip must be at most 1, got 1.5"),
        ({"timeout": 1e12}, "timeout must be at most .*, got 1000000000000.0"),
        ({"reward_timeout": 1e12}, "reward_timeout must be at most .*, got 1000000000000.0"),
        ({"seed": 2**64}, r"seed must be in \[-2\*\*63, 2\*\*64\), got 18446744073709551616"),
    ],
)
def test_a_value_that_would_fail_later(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^TrainConfig: {message}"):
        TrainConfig(**options)


@pytest.mark.parametrize("text", ["[" * 200_000, '{"updates": 1' + "0" * 5000 + "}"])
def test_a_file_beyond_what_json_reads(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"options\.json: "):
        parse(["--config", saved(tmp_path, text)])


def test_values_that_look_like_options(tmp_path: Path) -> None:
    path = saved(tmp_path, '{"out": "--runs", "loss_kl_coef": -1e-05}')
    config = parse(["--config", path])
    assert (config.out, config.loss_kl_coef) == (Path("--runs"), -1e-5)
