"""Teachers by name, and those of which no run can be made: refused before weights are loaded."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_helpers import TEXTS, tiny, tiny_teacher, trainer

from ppo_fast.loop import OptionError, TrainConfig, preflight
from ppo_fast.loop.model import load
from ppo_fast.loop.run import load_trainer

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": "x"}, "teacher must be absent without distill, got x"),
        ({"distill_coef": 0.5}, "distill_coef must be 1.0 without distill, got 0.5"),
        ({"reward_coef": 0.0}, "reward_coef must be 1.0 without distill, got 0.0"),
        ({"distill": "pg", "distill_coef": 0.0}, "distill_coef must be positive, got 0.0"),
        ({"distill": "pg", "reward_coef": -1.0}, "reward_coef must be at least 0, got -1.0"),
        (
            {"distill": "pg", "distill_beta": 0.1},
            "distill_beta must be 0.5, which does not count, with distill pg, got 0.1",
        ),
        (
            {"distill": "jsd", "distill_beta": 1.0},
            r"distill_beta must be in \(0, 1\) with distill jsd, got 1.0",
        ),
        (
            {"distill": "mixed", "distill_beta": 1.5},
            r"distill_beta must be in \[0, 1\], got 1.5",
        ),
        (
            {"distill": "pg", "distill_temperature": 0.0},
            "distill_temperature must be positive, got 0.0",
        ),
        (
            {"distill": "pg", "reward_coef": 0.0, "kl_target": 1.0},
            "kl_target must be absent with reward_coef 0, got 1.0",
        ),
        (
            {"distill": "pg", "reward_coef": 0.0, "kl_coef": 0.1},
            "kl_coef must be 0 with reward_coef 0, got 0.1",
        ),
        ({"distill": "reverse", "head": "logits"}, "distill must be pg with head logits, got rev"),
        (
            {"z_loss_coef": 0.1, "head": "logits"},
            "z_loss_coef must be 0 with head logits, got 0.1",
        ),
        ({"z_loss_coef": -0.1}, "z_loss_coef must be at least 0, got -0.1"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=f"^TrainConfig: {message}"):
        TrainConfig(**options)


def test_the_backend_without_kernels_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = "^backend must be triton, cpu or reference with distill jsd, got 'cuda'$"
    config = TrainConfig(distill="jsd", teacher="tiny", out=tmp_path, model="tiny").resolved()
    with monkeypatch.context() as patch:
        patch.setattr(preflight, "select", lambda *_: "cuda")
        with pytest.raises(OptionError, match=message):
            preflight.check(config, CPU, first=True)
        preflight.check(dataclasses.replace(config, distill="pg"), CPU, first=True)
    monkeypatch.setattr("ppo_fast.loop.ppo.select", lambda *_: "cuda")
    with pytest.raises(OptionError, match=message):
        trainer(tmp_path, distill="jsd", teacher=tiny_teacher())


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    wanted = (
        "^teacher must have the vocabulary of the model, 300 tokens, got LlamaForCausalLM with"
    )
    with pytest.raises(OptionError, match=wanted + " 310$"):
        trainer(tmp_path, distill="pg", teacher=tiny_teacher(vocab=310))


def test_a_teacher_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        OptionError, match=r"^teacher must be given with distill pg, got NoneType$"
    ):
        trainer(tmp_path, distill="pg")
    with pytest.raises(OptionError, match=r"^teacher must be absent without distill, got Llama"):
        trainer(tmp_path, teacher=tiny_teacher())
    with pytest.raises(OptionError, match=r"^teacher: model must be a transformers causal LM"):
        trainer(tmp_path, distill="pg", teacher=torch.nn.Linear(2, 2))
    with pytest.raises(OptionError, match=r"^teacher must be on cpu, got one on meta$"):
        trainer(tmp_path, distill="pg", teacher=tiny_teacher().to("meta"))
    model, tokenizer = tiny()
    with pytest.raises(OptionError, match=r"^teacher must be another model than the one that is"):
        trainer(tmp_path, distill="pg", teacher=model, model_of=(model, tokenizer))


def test_a_context_that_is_too_short_is_refused(tmp_path: Path) -> None:
    teacher = tiny_teacher()
    teacher.config.max_position_embeddings = 9
    t = trainer(tmp_path, distill="pg", teacher=teacher)
    wanted = (
        r"^teacher must read the \d+ tokens of the longest prompt and completion, got one with"
    )
    with pytest.raises(OptionError, match=wanted + " a context of 9$"):
        t.step()


class TestNamed:
    """Teachers by name, as the command line takes them."""

    @pytest.fixture
    def rows(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A folder with prompts, in which the run is made."""
        lines = (json.dumps({"prompt": text}) + "\n" for text in TEXTS)
        (tmp_path / "rows.jsonl").write_text("".join(lines))
        monkeypatch.chdir(tmp_path)
        return tmp_path

    def config(self, teacher: object, **options: Any) -> TrainConfig:
        fixed = {"model": "tiny", "data": "rows.jsonl", "reward": "letters", "device": "cpu"}
        fixed |= {"updates": 1, "max_new_tokens": 4, "out": Path("run"), "distill": "pg"}
        return TrainConfig(
            **fixed | {"teacher": None if teacher is None else str(teacher)} | options
        )

    def saved(self, place: Path, tokenizer: bool = True, **sizes: int) -> Path:
        """A folder with a teacher and, or not, the tokenizer that "tiny" has here."""
        tiny_teacher(**sizes).save_pretrained(place)
        if tokenizer:
            load.load_tokenizer("tiny", TEXTS).save_pretrained(place)
        return place

    @pytest.mark.parametrize("within", ["", "run-of-a-teacher"])
    def test_a_model_or_a_run_is_taken(self, rows: Path, within: str) -> None:
        if within:
            self.saved(rows / within / "model")
            (rows / within / "log.jsonl").write_text("{}\n")
        else:
            self.saved(rows / "teacher")
        said: list[str] = []
        t = load_trainer(self.config(within or "teacher"), said.append)
        assert t.agent.teacher is not None
        assert t.agent.teacher.model.config.hidden_size == 48
        (line,) = [x for x in said if "tokenizer" in x]
        assert line.endswith(": its tokenizer is the model's, 294 tokens")

    def test_one_without_a_tokenizer_is_taken_at_its_ids(self, rows: Path) -> None:
        self.saved(rows / "teacher", tokenizer=False)
        said: list[str] = []
        load_trainer(self.config("teacher"), said.append)
        assert sum("it has no tokenizer of its own" in x for x in said) == 1

    def test_another_tokenizer_is_refused(
        self, rows: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.saved(rows / "teacher", tokenizer=False)
        load._tiny_tokenizer([text[::-1] for text in TEXTS]).save_pretrained(rows / "teacher")
        _unloaded(monkeypatch)
        wanted = r"^teacher must have the tokenizer of the model, got 'teacher', whose id of .* is"
        with pytest.raises(OptionError, match=wanted + r" .* \(\d+ tokens differ\)$"):
            load_trainer(self.config("teacher"), lambda _: None)

    @pytest.mark.parametrize(
        ("teacher", "message"),
        [
            (None, "teacher must be given with distill pg, got None"),
            ("none/of/these", "teacher must be 'smollm2', 'tiny', a folder .* does not exist"),
            (
                "smollm2",
                "teacher must have the vocabulary of the model, 300 tokens, got 'smollm2'",
            ),
            ("empty-run", "teacher must be a run with a model in it, got 'empty-run'"),
        ],
    )
    def test_it_is_refused_before_anything_is_loaded(
        self, rows: Path, monkeypatch: pytest.MonkeyPatch, teacher: str | None, message: str
    ) -> None:
        (rows / "empty-run").mkdir()
        (rows / "empty-run" / "log.jsonl").write_text("{}\n")
        (rows / "empty-run" / "config.json").write_text("{}\n")
        _unloaded(monkeypatch)
        with pytest.raises(OptionError, match=f"^{message}"):
            load_trainer(self.config(teacher), lambda _: None)
        assert not (rows / "run").exists()

    def test_both_sizes_are_named_before_anything_is_loaded(
        self, rows: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.saved(rows / "teacher", vocab=310)
        _unloaded(monkeypatch)
        with pytest.raises(OptionError, match=r"300 tokens, got 'teacher' with 310$"):
            load_trainer(self.config("teacher"), lambda _: None)

    def test_its_context_counts(self, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        place = self.saved(rows / "teacher")
        written = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps(written | {"max_position_embeddings": 12}))
        _unloaded(monkeypatch)
        with pytest.raises(
            OptionError, match="below the 12 tokens of the model's context, got 12"
        ):
            load_trainer(self.config("teacher", max_new_tokens=12), lambda _: None)
        with pytest.raises(OptionError, match=r"prompts\[\d\] must have at most 8 tokens"):
            load_trainer(self.config("teacher"), lambda _: None)


def _unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_weights(*_: Any) -> None:
        raise AssertionError("weights were loaded before the options were checked")

    for module in ("run", "distill"):
        monkeypatch.setattr(f"ppo_fast.loop.{module}.load_weights", load_weights)
