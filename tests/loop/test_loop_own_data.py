"""Prompts of a user's own: files of every kind, their bad rows, chats, and the command."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from loop_helpers import TEXTS, tiny, trainer

from ppo_fast.__main__ import main
from ppo_fast.loop import CheckpointError, DataError, RewardError, TrainConfig
from ppo_fast.loop.data.chat import rendered
from ppo_fast.loop.data.own import read_prompts
from ppo_fast.loop.data.packages import TaskError
from ppo_fast.loop.data.prompts import Row, as_rows, columns_of
from ppo_fast.loop.run import load_trainer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ROWS = [{"prompt": text, "answer": f"{i}", "level": "easy"} for i, text in enumerate(TEXTS)]
TEMPLATE = "{% for m in messages %}<{{m.role}}>{{m.content}}{% endfor %}<bot>"
OPTIONS: dict[str, Any] = {
    "model": "tiny",
    "updates": 2,
    "batch": 4,
    "max_new_tokens": 4,
    "train_layers": 1,
    "device": "cpu",
}


def written(folder: Path, suffix: str) -> Path:
    path = folder / f"rows{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(ROWS[0]))
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        import pyarrow

        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


def read(path: Path, field: str = "prompt") -> tuple[list[Row], list[str]]:
    said: list[str] = []
    return read_prompts(str(path), field, "train", said.append), said


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    path = written(tmp_path, suffix)
    rows, said = read(path)
    assert rows == [Row(row["prompt"], {"answer": row["answer"], "level": "easy"}) for row in ROWS]
    assert said == [f"{path}: 8 prompts, 0 bad rows left out"]


def test_another_field_may_be_the_prompt(tmp_path: Path) -> None:
    rows, _ = read(written(tmp_path, ".jsonl"), "answer")
    assert rows[1] == Row("1", {"prompt": TEXTS[1], "level": "easy"})


def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [
        '{"prompt": "fine"}',
        "",
        "{not json",
        "[1]",
        '{"question": "x", "n": 1}',
        '{"prompt": 7}',
        '{"prompt": []}',
        '{"prompt": [{"role": "user"}]}',
        '{"prompt": "half \\ud800"}',
    ]
    path.write_text("\n".join(lines))
    rows, said = read(path)
    assert rows == [Row("fine", {})]
    wanted = [
        "dropped {}:3: not a line of JSON: ",
        "dropped {}:4: a row must be an object with fields, got [1]",
        "dropped {}:5 must have the field 'prompt', got a row with the fields question, n",
        "dropped {}:6: prompt must be a text, got 7",
        "dropped {}:7: prompt must have at least one message, got []",
        "dropped {}:8: prompt[0]['content'] must be a text, got None",
        "dropped {}:9: prompt must be a text of whole characters",
        "{}: 1 prompts, 7 bad rows left out",
    ]
    assert len(said) == len(wanted)
    for line, start in zip(said, wanted, strict=True):
        assert line.startswith(start.format(path))


def test_records_of_csv_are_counted_by_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('prompt,answer\n"two\nlines",1\nno answer\none,2,3\nlast,4\n')
    rows, said = read(path)
    assert rows == [Row("two\nlines", {"answer": "1"}), Row("last", {"answer": "4"})]
    assert said[:2] == [
        f"dropped {path}:4: must have the 2 fields of the first line, got 1",
        f"dropped {path}:5: must have the 2 fields of the first line, got 3",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jsonl", None, "data must be a file that exists, got .*gone.jsonl"),
        ("empty.jsonl", "", "empty.jsonl: no rows"),
        ("bad.jsonl", "1\n2\n", "all 2 rows are bad, the first: .*bad.jsonl:1: a row must be"),
        ("open.csv", 'prompt\nfine\n"open', r"open.csv:3: not a record of CSV"),
        ("bad.parquet", "no", "bad.parquet: not a parquet file"),
    ],
)
def test_a_file_without_a_good_row_is_refused(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_a_saved_data_set_is_read_by_its_library(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "saved"
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(folder)
    rows, said = read(folder)
    assert [row.prompt for row in rows] == TEXTS
    assert said == [f"{folder}: 8 prompts, 0 bad rows left out"]
    with pytest.raises(DataError, match="split 'test'"):
        read_prompts(str(folder), "prompt", "test", print)


def test_texts_and_messages_in_a_template() -> None:
    _, tokenizer = tiny()
    chat = [{"role": "system", "content": "own"}, {"role": "user", "content": "b"}]
    rows = as_rows(["a", {"prompt": chat}])
    with pytest.raises(TaskError, match=r"^a prompt of messages needs a tokenizer with a chat"):
        rendered(rows, tokenizer, chat=False, system=None)
    tokenizer.chat_template = TEMPLATE

    def texts(chat: bool, system: str | None) -> list[str]:
        return [prompt.text for prompt in rendered(rows, tokenizer, chat, system)]

    own = "<system>own<user>b<bot>"
    assert texts(False, None) == ["a", own]
    assert texts(True, None) == ["<user>a<bot>", own]
    assert texts(False, "be brief") == ["<system>be brief<user>a<bot>", own]


@pytest.mark.parametrize(
    ("chat", "system", "name"), [(True, None, "chat"), (False, "be brief", "system")]
)
def test_a_tokenizer_without_a_template_is_named(
    chat: bool, system: str | None, name: str
) -> None:
    with pytest.raises(TaskError, match=f"^{name} needs a tokenizer with a chat template"):
        rendered(as_rows(["a"]), tiny()[1], chat, system)


def test_what_a_template_refuses_is_named() -> None:
    _, tokenizer = tiny()
    tokenizer.chat_template = "{{ raise_exception('no system message') }}"
    with pytest.raises(TaskError, match=r"prompts\[0\]: the chat template raised .*no system"):
        rendered(as_rows(["a"]), tokenizer, True, None)


def test_no_second_bos_is_written() -> None:
    _, tokenizer = tiny()
    tokenizer.chat_template = "<eos>{{messages[0].content}}"
    tokenizer.bos_token = "<eos>"
    rows = as_rows(["a"])
    assert rendered(rows, tokenizer, True, None)[0].text == "<eos>a"  # nothing adds one

    class Adding:
        """A tokenizer that begins every text with its BOS."""

        bos_token, bos_token_id, chat_template = "<eos>", 0, tokenizer.chat_template
        apply_chat_template = tokenizer.apply_chat_template

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [0, *tokenizer(text)["input_ids"]]}

    assert rendered(rows, Adding(), True, None)[0].text == "a"


def test_a_reward_gets_the_plain_prompts_and_its_columns(tmp_path: Path) -> None:
    """Under chat too, while the model and the log have what the template makes of them."""
    seen: list[tuple[Any, ...]] = []

    def reward(prompts: list[str], texts: list[str], answer: list[str]) -> list[float]:
        seen.append((prompts, answer))
        return [float(number) for number in answer]

    model, tokenizer = tiny()
    tokenizer.chat_template = TEMPLATE
    t = trainer(tmp_path, reward, prompts=ROWS, chat=True, model_of=(model, tokenizer))
    record = t.step()
    t.close()
    ((prompts, answers),) = seen
    assert sorted(prompts) == sorted(TEXTS)
    assert answers == [str(TEXTS.index(prompt)) for prompt in prompts]
    assert record["reward"] == pytest.approx(3.5)
    shown = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert shown[0]["prompt"] == f"<user>{prompts[0]}<bot>"


def test_a_column_that_is_not_there_is_named_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reward(prompts: list[str], texts: list[str], solution: list[str]) -> list[float]:
        return [0.0] * len(prompts)

    message = "takes solution, which must be columns of the data; there are answer, level"
    with pytest.raises(RewardError, match=message):
        trainer(tmp_path, reward, prompts=ROWS)
    data, out = str(written(tmp_path, ".jsonl")), tmp_path / "run"
    config = TrainConfig(data=data, reward="rouge", model="tiny", out=out)
    monkeypatch.setattr("ppo_fast.loop.run.load_weights", None)
    pytest.importorskip("rouge_score")
    with pytest.raises(RewardError, match=r"takes reference, .* there are answer, level"):
        load_trainer(config, lambda line: None)


def test_the_command_learns_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a reward in a file of the current folder, which `ppo-fast` does not begin with."""
    written(tmp_path, ".jsonl")
    (tmp_path / "own_judge.py").write_text(
        "def judge(prompts, completions, answer, **rest):\n"
        "    assert list(rest) == ['level']\n"
        "    return [float(a) for a in answer]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in __import__("sys").path if p])
    small = [f"--{k.replace('_', '-')}={v}" for k, v in OPTIONS.items()]
    run = ["train", "--data", "rows.jsonl", "--reward", "own_judge:judge", "--compare", "0"]
    assert main([*run, *small, "--out", "run"]) == 0
    assert "rows.jsonl: 8 prompts, 0 bad rows left out" in capsys.readouterr().out
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert sum(line["reward"] for line in log) / 2 == pytest.approx(3.5)  # one pass in two updates
    assert main(["train", "--data", "rows.jsonl", *small, "--out", "other"]) == 2
    assert "reward 'task' is that of a task, and data has none" in capsys.readouterr().err


def test_a_run_on_other_data_is_not_resumed(tmp_path: Path) -> None:
    path = written(tmp_path, ".jsonl")
    config = {**OPTIONS, "out": tmp_path / "run", "data": str(path), "reward": "answer"}
    t = load_trainer(TrainConfig(**config, save_every=1), lambda line: None)
    t.begin()
    t.step()
    t.checkpoints.finish(t)
    t.close()
    path.write_text(path.read_text().replace('"answer": "1"', '"answer": "2"'))
    again = load_trainer(TrainConfig(**config, resume=True), lambda line: None)
    with pytest.raises(CheckpointError, match="the columns' sha256"):
        again.begin()


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a tiny model of its own prompts' words."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import own_task

    model, tokenizer = tiny()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    data = EXAMPLES / "own_task.jsonl"
    own_task.main(str(data), str(tmp_path / "base"), str(tmp_path / "run"), updates=2)
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["dropped"] for line in log] == [{}, {}]
    rows, _ = read(data)
    prompts, answers = [row.prompt for row in rows], columns_of(rows)["answer"]
    assert own_task.first_letter(prompts, [f" {a}" for a in answers], answers) == [1.0] * len(rows)


def test_data_and_transitions_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data must be absent with transitions"):
        TrainConfig(data="rows.jsonl", transitions=tmp_path / "rows.jsonl")
