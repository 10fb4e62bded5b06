"""Stored transitions: what a file must hold, and how each bad row of it is named."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from transition_rows import GOOD, jsonl, parquet

from ppo_fast.loop import TransitionsError
from ppo_fast.loop.data.transitions import Limits, Transition, read_transitions

LIMITS = Limits(vocabulary=10, context=8)


def encode(text: str) -> list[int]:
    return [ord(c) % 10 for c in text]


@pytest.mark.parametrize(("write", "name"), [(jsonl, "t.jsonl"), (parquet, "t.parquet")])
def test_both_formats_give_the_same_rows(tmp_path: Path, write: Any, name: str) -> None:
    other = {**GOOD, "prompt": None, "prompt_tokens": [1], "truncated": True, "extra": "ignored"}
    path = write(tmp_path / name, [{**GOOD, "extra": "x"}, other, GOOD])
    found = read_transitions(path, encode, LIMITS)
    first = Transition("ab", [7, 8], [3, 4], [-0.5, -1.0], [0.0, 2.0], False)
    second = first._replace(prompt="", prompt_tokens=[1], truncated=True)
    assert found.rows == [first, second, first] and found.faults == []


@pytest.mark.parametrize(("write", "name"), [(jsonl, "t.jsonl"), (parquet, "t.parquet")])
def test_rewards_of_the_tokens(tmp_path: Path, write: Any, name: str) -> None:
    path = write(tmp_path / name, [{**GOOD, "reward": [0.25, -3.0]}])
    assert read_transitions(path, encode, LIMITS).rows[0].rewards == [0.25, -3.0]


OFFSETS = "support_offsets must be"
ENDS = "from 0 to the number of support_ids"
WITH_IDS = "of whole numbers where there are support_ids"
IDS = "a list of ids where there are support_offsets"
TWICE = "different for a token, got some twice at token"


def drawn(ids: Any, offsets: Any) -> dict[str, Any]:
    return {"support_ids": ids, "support_offsets": offsets}


@pytest.mark.parametrize(("write", "name"), [(jsonl, "t.jsonl"), (parquet, "t.parquet")])
def test_ids_that_tokens_were_drawn_from(tmp_path: Path, write: Any, name: str) -> None:
    """Of some rows, of some tokens, and of a token that is not among them."""
    rows = [{**GOOD, **drawn([3, 9, 0, 4], [0, 3, 4])}, GOOD, {**GOOD, **drawn([5], [0, 0, 1])}]
    found = read_transitions(write(tmp_path / name, rows), encode, LIMITS)
    assert found.faults == []
    supports = [row.support and [x.tolist() for x in row.support] for row in found.rows]
    assert supports == [[[3, 9, 0, 4], [0, 3, 4]], None, [[5], [0, 0, 1]]]


BAD = [
    ({"tokens": []}, "tokens must be a list of at least one token, got []"),
    ({"tokens": None}, "tokens must be a list of at least one token, got None"),
    ({"tokens": [3, 10]}, "tokens[1] must be a whole number in [0, 10), got 10"),
    ({"tokens": [-1, 3]}, "tokens[0] must be a whole number in [0, 10), got -1"),
    ({"tokens": [3, 4.0]}, "tokens[1] must be a whole number in [0, 10), got 4.0"),
    ({"tokens": [True, 4]}, "tokens[0] must be a whole number in [0, 10), got True"),
    ({"logprobs": [-1.0]}, "logprobs must have as many numbers as tokens, 2, got 1"),
    ({"logprobs": None}, "logprobs must be a list of 2 numbers, got None"),
    ({"logprobs": [-1.0, math.nan]}, "logprobs[1] must be a finite fp32 number, got nan"),
    ({"logprobs": [-math.inf, -1]}, "logprobs[0] must be a finite fp32 number, got -inf"),
    ({"logprobs": [-1.0, 0.5]}, "logprobs[1] must be at most 0, got 0.5"),
    ({"reward": math.nan}, "reward[0] must be a finite fp32 number, got nan"),
    ({"reward": None}, "reward[0] must be a finite fp32 number, got None"),
    ({"reward": "1"}, "reward[0] must be a finite fp32 number, got '1'"),
    ({"reward": 1e39}, "reward[0] must be a finite fp32 number, got 1e+39"),
    ({"reward": 10**400}, "reward[0] must be a finite fp32 number, got 1" + "0" * 56 + "..."),
    ({"reward": [1.0]}, "reward must have as many numbers as tokens, 2, got 1"),
    ({"prompt": 7}, "prompt must be a text where there are no prompt_tokens, got 7"),
    ({"prompt": "abcdefg"}, "prompt and tokens must fit the model's context of 8, got 9"),
    ({"prompt_tokens": [12]}, "prompt_tokens[0] must be a whole number in [0, 10), got 12"),
    ({"truncated": 1}, "truncated must be true or false, got 1"),
    ({"support_ids": [3, 4]}, f"{OFFSETS} a list {WITH_IDS}, got None"),
    ({"support_offsets": [0, 1, 2]}, f"support_ids must be {IDS}, got None"),
    (drawn("34", [0, 1, 2]), f"support_ids must be {IDS}, got '34'"),
    (drawn([3, 4], 2), f"{OFFSETS} a list {WITH_IDS}, got 2"),
    (drawn([3, 4], [0, 2]), "support_offsets must have one more than tokens, 3, got 2"),
    (drawn([3, 10], [0, 1, 2]), "support_ids[1] must be a whole number in [0, 10), got 10"),
    (drawn([3, -1], [0, 1, 2]), "support_ids[1] must be a whole number in [0, 10), got -1"),
    (drawn([3, 4.0], [0, 1, 2]), "support_ids[1] must be a whole number in [0, 10), got 4.0"),
    (drawn([3, 4], [0, 1.0, 2]), "support_offsets[1] must be a whole number, got 1.0"),
    (drawn([3, 4], [0, None, 2]), "support_offsets[1] must be a whole number, got None"),
    (drawn([3, 4], [0, 3, 2]), "support_offsets[2] must be at least the one before, 3, got 2"),
    (drawn([3, 4], [-1, 1, 2]), f"{OFFSETS} {ENDS}, 2, got -1 to 2"),
    (drawn([3, 4], [1, 1, 2]), f"{OFFSETS} {ENDS}, 2, got 1 to 2"),
    (drawn([3, 4], [0, 1, 3]), f"{OFFSETS} {ENDS}, 2, got 0 to 3"),
    (drawn([3, 4], [0, 1, 1]), f"{OFFSETS} {ENDS}, 2, got 0 to 1"),
    (drawn([3, 4, 5, 4], [0, 1, 4]), f"support_ids must be {TWICE} 1"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_a_bad_row_is_named_and_left_out(tmp_path: Path, change: Any, message: str) -> None:
    path = jsonl(tmp_path / "t.jsonl", [GOOD, {**GOOD, **change}, GOOD])
    found = read_transitions(path, encode, LIMITS)
    assert len(found.rows) == 2 and found.faults == [f"{path}:2: {message}"]


def test_lines_that_are_no_rows(tmp_path: Path) -> None:
    rows = ["{", "", "[1]", GOOD, "[" * 100_000]
    found = read_transitions(jsonl(tmp_path / "t.jsonl", rows), encode, LIMITS)
    starts = ["not a line of JSON: ", "a row must be an object with fields, got [1]"]
    assert len(found.rows) == 1 and len(found.faults) == 3
    for fault, line, start in zip(found.faults, (1, 3, 5), [*starts, starts[0]], strict=True):
        assert fault.startswith(f"{tmp_path}/t.jsonl:{line}: {start}")


def test_bad_rows_of_parquet_are_counted_from_one(tmp_path: Path) -> None:
    rows = [GOOD, GOOD, {**GOOD, "logprobs": [-1.0, math.nan]}, {**GOOD, "tokens": None}]
    found = read_transitions(parquet(tmp_path / "t.parquet", rows), encode, LIMITS)
    assert len(found.rows) == 2
    assert [fault.split(": ")[0][-2:] for fault in found.faults] == [":3", ":4"]


def test_files_from_which_nothing_can_be_learnt(tmp_path: Path) -> None:
    def refused(path: Path, message: str) -> None:
        with pytest.raises(TransitionsError, match=message):
            read_transitions(path, encode, LIMITS)

    refused(
        jsonl(tmp_path / "bad.jsonl", [{**GOOD, "tokens": []}] * 3),
        r"all 3 rows are bad, the first: .*bad.jsonl:1: tokens must be",
    )
    refused(jsonl(tmp_path / "none.jsonl", []), "none.jsonl: no rows")
    refused(tmp_path / "absent.jsonl", "must be a file that exists, got .*absent.jsonl")
    refused(jsonl(tmp_path / "t.pkl", [GOOD]), "must be a .jsonl or .parquet file, got .*t.pkl")
    refused(jsonl(tmp_path / "t.parquet", [GOOD]), "not a parquet file")


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parquet(tmp_path / "t.parquet", [GOOD])
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'ppo_fast\[transitions\]'"):
        read_transitions(path, encode, LIMITS)
