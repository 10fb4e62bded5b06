"""The report of files that are damaged, hostile or still written: a page, or the place named."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path

import pytest
from report_helpers import HOSTILE, record, write

from ppo_fast.__main__ import main
from ppo_fast.report import RunError, write_report
from ppo_fast.report.page import page
from ppo_fast.report.runs import load_run

SAMPLE = {"update": 0, "prompt": "p", "completion": "c", "reward": 0.5}


def refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The command's message on a run that it does not read."""
    assert main(["report", str(folder)]) == 1
    assert not (folder / "report.html").exists()
    said = capsys.readouterr().err
    assert said.startswith("ppo-fast report: ") and "Traceback" not in said
    return said.removeprefix("ppo-fast report: ").strip()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"reward": HOSTILE[:9]}, "reward must be a number or null, got '</script>'"),
        ({"reward": "0.5"}, "reward must be a number or null, got '0.5'"),
        ({"kl": [1]}, "kl must be a number or null, got [1]"),
        ({"ess": True}, "ess must be a number or null, got True"),
        ({"tokens_per_second": {}}, "tokens_per_second must be a number or null, got {}"),
        ({"batch": "4"}, "batch must be a number or null, got '4'"),
        ({"update": 1.0}, "update must be a whole number from 0 to 2**53, got 1.0"),
        ({"update": True}, "update must be a whole number from 0 to 2**53, got True"),
        ({"update": -1}, "update must be a whole number from 0 to 2**53, got -1"),
        ({"update": 2**53 + 1}, "whole number from 0 to 2**53, got 9007199254740993"),
        ({"update": 10**400}, "update must be a whole number from 0 to 2**53, got 1000"),
        ({"update": None}, "update must be a whole number from 0 to 2**53, got None"),
        ({"update": math.nan}, "update must be a whole number from 0 to 2**53, got nan"),
        ({"seconds": [1]}, "seconds must be an object, got [1]"),
        ({"seconds": None}, "seconds must be an object, got None"),
        ({"seconds": {"reward": "1"}}, "seconds['reward'] must be a number from 0 to 1e+12, got"),
        ({"seconds": {"update": -1}}, "seconds['update'] must be a number from 0 to 1e+12"),
        ({"seconds": {"update": None}}, "seconds['update'] must be a number from 0 to 1e+12, got"),
        ({"seconds": {"update": math.nan}}, "seconds['update'] must be a number from 0 to 1e+12"),
        ({"seconds": {"update": 1e308}}, "seconds['update'] must be a number from 0 to 1e+12"),
        ({"dropped": ["late"]}, "dropped must be an object, got ['late']"),
        ({"dropped": {"0": 7}}, "dropped['0'] must be a text, got 7"),
    ],
)
def test_a_field_of_the_wrong_type_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict, says: str
) -> None:
    folder = write(tmp_path / "a", [record(0), record(1) | changes, record(2)])
    said = refused(folder, capsys)
    assert said.startswith(f"{folder / 'log.jsonl'}, line 2: ") and says in said
    assert len(said) < len(str(folder)) + 150  # a value is not shown at any length


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"[1]", "must be a JSON object, got [1]"),
        (b"7", "must be a JSON object, got 7"),
        (b"null", "must be a JSON object, got None"),
        (b'{"reward": 1}', "update must be a whole number from 0 to 2**53, got nothing"),
        (b'{"update": 1, "reward": "\xff"}', "not JSON ('utf-8' codec can't decode byte 0xff"),
        (json.dumps(record(1)).encode("utf-16"), "not JSON ('utf-8' codec can't decode byte 0xff"),
        (b'{"update": 1}\x00', "not JSON (Extra data"),
        (b'{"update": 1', "not JSON (Expecting"),
        (b'{"update": 1, "kl": 1, "kl": 2}', "not JSON ('kl' is there more than once)"),
        (b'{"update": 1, "deep": ' + b"[" * 10**5, "it is nested too deeply"),
        (b'{"update": 1, "a": ' + b"[" * 60 + b"]" * 60 + b"}", "it is nested more than 50 deep"),
        (b'{"update": 1, "reward": ' + b"1" * 5000 + b"}", "not JSON (Exceeds the limit"),
    ],
)
def test_a_line_that_is_no_record_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: bytes, says: str
) -> None:
    folder = write(tmp_path / "a", [record(0)])
    log = folder / "log.jsonl"
    log.write_bytes(log.read_bytes() + line + b"\n")
    said = refused(folder, capsys)
    assert said.startswith(f"{log}, line 2: ") and says in said


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"update": "0"}, "update must be a whole number from 0 to 2**53, got '0'"),
        ({"update": None}, "update must be a whole number from 0 to 2**53, got None"),
        ({"prompt": None}, "prompt must be a text, got None"),
        ({"completion": ["c"]}, "completion must be a text, got ['c']"),
        ({"reward": "z"}, "reward must be a number or null, got 'z'"),
        ({"fault": 5}, "fault must be a text, got 5"),
    ],
)
def test_a_sample_of_the_wrong_type_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict, says: str
) -> None:
    folder = write(tmp_path / "a", [record(0)], [SAMPLE, SAMPLE | changes, SAMPLE])
    assert refused(folder, capsys) == f"{folder / 'samples.jsonl'}, line 2: {says}"


def test_a_sample_without_its_fields_is_named(tmp_path: Path) -> None:
    for i, (name, says) in enumerate(
        [
            ("update", "update must be a whole number from 0 to 2**53, got nothing"),
            ("completion", "completion must be a text, got nothing"),
            ("reward", "reward or fault must be there, got neither"),
        ]
    ):
        sample = {key: value for key, value in SAMPLE.items() if key != name}
        folder = write(tmp_path / str(i), [record(0)], [sample])
        with pytest.raises(RunError, match=re.escape(f"samples.jsonl, line 1: {says}")):
            load_run(folder, "a")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.json", b"[1, 2]", "must be a JSON object, got [1, 2]"),
        ("config.json", b"", "not JSON (Expecting value"),
        (
            "config.json",
            b'{"updates": "x"}',
            "updates must be a whole number from 0 to 2**53, got",
        ),
        ("config.json", b'{"updates": null}', "updates must be a whole number from 0 to 2**53"),
        ("config.json", b'{"model": "\xe9"}', "not JSON ('utf-8' codec can't decode"),
        ("config.json", b'{"a": ' + b"[" * 400 + b"]" * 400 + b"}", "not JSON that can be read"),
        ("versions.json", b"3", "must be a JSON object, got 3"),
        ("versions.json", b'{"a": ' + b'{"a": ' * 10**5, "not JSON that can be read"),
    ],
)
def test_options_and_versions_that_are_no_object_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, says: str
) -> None:
    folder = write(tmp_path / "a", [record(0)])
    (folder / name).write_bytes(content)
    assert refused(folder, capsys).startswith(f"{folder / name}: {says}")


@pytest.mark.parametrize("name", ["log.jsonl", "samples.jsonl", "config.json", "versions.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "loop"])
def test_what_is_no_file_is_not_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, kind: str
) -> None:
    folder = write(tmp_path / "a", [record(0)])
    (folder / name).unlink()
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "folder":
        (folder / name).mkdir()
    else:
        (folder / name).symlink_to("/dev/zero" if kind == "device" else name)
    said = refused(folder, capsys)
    assert said.startswith(
        f"{folder / name} " + ("cannot be read: " if kind == "loop" else "must be a regular file")
    )


def test_a_torn_last_line_is_left_out_and_said(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", [record(0), record(1)])
    for name in ("log.jsonl", "samples.jsonl"):
        with (folder / name).open("ab") as file:
            file.write(b'{"update": 2, "reward": \xc3')
    run = load_run(folder, "a")
    assert list(run.records) == [0, 1] and len(run.samples) == 2
    assert run.notes == [
        f"the last line of {name} is not whole, and left out"
        for name in ("log.jsonl", "samples.jsonl")
    ]
    assert run.notes[0] in page([run])


def test_a_last_line_that_was_ended_is_not_torn(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", [record(0)])
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"update": 1, "rew\n')
    with pytest.raises(RunError, match=r"log.jsonl, line 2: not JSON"):
        load_run(folder, "a")


def test_blank_lines_and_byte_order_marks_are_no_records(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", [record(0), record(1)])
    for name in ("log.jsonl", "samples.jsonl", "config.json", "versions.json"):
        content = (folder / name).read_bytes().replace(b"\n", b"\r\n\r\n")
        (folder / name).write_bytes(b"\xef\xbb\xbf" + content)
    run = load_run(folder, "a")
    assert list(run.records) == [0, 1] and len(run.samples) == 2 and run.config["lr"] == 0.01


@pytest.mark.parametrize("place", ["folder", "under a file", "pipe", "long"])
def test_a_page_that_cannot_be_written_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    folder = write(tmp_path / "a", [record(0)])
    out = tmp_path / "out"
    if place == "folder":
        out.mkdir()
    elif place == "pipe":
        os.mkfifo(out)  # that nobody reads
    elif place == "under a file":
        out = folder / "log.jsonl" / "page.html"
    else:
        out = tmp_path / ("x" * 300)
    assert main(["report", str(folder), "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"ppo-fast report: the page cannot be written to {out}: ")


@pytest.mark.parametrize("name", ["log.jsonl", "samples.jsonl", "config.json", "versions.json"])
def test_a_page_never_goes_over_what_a_run_left(tmp_path: Path, name: str) -> None:
    folders = [write(tmp_path / n, [record(0)], lr=i) for i, n in enumerate("ab")]
    link = tmp_path / "page.html"
    os.link(folders[1] / name, link)
    before = link.read_bytes()
    for out in (folders[1] / name, link):
        with pytest.raises(RunError, match=re.escape(f"written to {out}: it is {folders[1]}")):
            write_report(folders, out)
    assert link.read_bytes() == before


def test_a_page_goes_over_an_older_one_and_into_a_folder_that_is_new(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", [record(0)])
    out = tmp_path / "new" / "page.html"
    assert write_report([folder], out) == out
    first = out.read_text()
    out.write_text(first + "x" * 10_000)
    write_report([folder], out)
    assert out.read_text() == first


def test_a_folder_whose_name_is_no_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "a", [record(0)])
    odd = folder.rename(tmp_path / os.fsdecode(b"\xff"))
    assert main(["report", str(odd)]) == 0
    assert capsys.readouterr().out.strip() == f"page: {tmp_path}/\\udcff/report.html"
    assert main(["report", str(tmp_path / ("x" * 300))]) == 1
    assert "cannot be read: [Errno 36]" in capsys.readouterr().err
