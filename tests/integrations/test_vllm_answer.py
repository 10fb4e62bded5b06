"""docs/support.md's way from vLLM's answer to a Support and to rows of transitions."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pages
import pytest
import torch

import ppo_fast
from ppo_fast.loop.data.transitions import Limits, read_transitions
from ppo_fast.support import BREAK_EVEN

ANSWER = pages.ROOT / "tests/helpers/vllm_answer.json"
MASKS = ([[2, 7], [3], [0, 5, 9, 11]], [[1, 5, 6], [12, 4]])
VOCAB = 13


@pytest.fixture
def page() -> dict[str, Any]:
    """The page's two functions, compiled as they stand there."""
    scope: dict[str, Any] = {"torch": torch, "ppo_fast": ppo_fast}
    exec(pages.block("support.md", "def rows_of"), scope)
    return scope


@pytest.fixture
def answer() -> dict[str, Any]:
    return json.loads(ANSWER.read_text(encoding="utf-8"))


def test_the_support_has_the_ids_of_every_token(
    page: dict[str, Any], answer: dict[str, Any]
) -> None:
    """Row by row, over padded tokens; log-probabilities are over them by hand."""
    support = page["support_of"](answer, 4)
    ends = support.offsets.tolist()
    rows = [support.ids[a:b].tolist() for a, b in pairwise(ends)]
    assert rows == [*MASKS[0], [0], *MASKS[1], [0], [0]]
    tokens = torch.tensor([[7, 3, 11, 0], [5, 12, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    assert not bool(support.missed(tokens).any()) and not bool(support.whole.any())
    logits = torch.randn(2, 4, VOCAB, generator=torch.Generator().manual_seed(0)).double()
    got = ppo_fast.token_logprobs(logits, tokens, mask=mask, support=support).logprobs
    for b, kept in enumerate(MASKS):
        for t, ids in enumerate(kept):
            total = math.fsum(math.exp(logits[b, t, i]) for i in ids)
            want = float(logits[b, t, tokens[b, t]]) - math.log(total)
            assert abs(float(got[b, t]) - want) < 1e-12  # some fp64 roundings of numbers near 1


def test_the_rows_are_those_that_transitions_read(
    page: dict[str, Any], answer: dict[str, Any], tmp_path: Path
) -> None:
    rows = list(page["rows_of"](answer, [1, 2], [0.5, -1.0]))
    path = tmp_path / "samples.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = read_transitions(path, lambda text: [], Limits(vocabulary=VOCAB, context=8))
    assert found.faults == []
    assert [row.tokens for row in found.rows] == [[7, 3, 11], [5, 12]]
    assert [row.logprobs for row in found.rows] == [[-0.25, 0.0, -1.5], [-0.75, -0.125]]
    assert [row.rewards for row in found.rows] == [[0.0, 0.0, 0.5], [0.0, -1.0]]
    assert [row.truncated for row in found.rows] == [False, True]
    for row, kept in zip(found.rows, MASKS, strict=True):
        assert row.support is not None
        ends = row.support.offsets.tolist()
        ids = [row.support.ids[a:b].tolist() for a, b in pairwise(ends)]
        assert ids == kept


@pytest.mark.parametrize("missing", [None, "absent"])
def test_an_answer_without_masks_is_no_support(
    page: dict[str, Any], answer: dict[str, Any], missing: str | None
) -> None:
    """vLLM's null, and a server without the option: no row is taken for a whole vocabulary."""
    choice = answer["choices"][1]
    if missing:
        del choice["sampling_mask"]
    else:
        choice["sampling_mask"] = None
    with pytest.raises((TypeError, KeyError)):
        page["support_of"](answer, 4)
    with pytest.raises((TypeError, KeyError)):
        list(page["rows_of"](answer, [1, 2], [0.5, -1.0]))


def test_the_first_example_is_what_the_page_says() -> None:
    """The kept mass is the ratio of the two softmaxes, and the first ratio is 1."""
    scope: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(pages.block("support.md", "topk(20)"), scope)
    p = scope["logits"].double().softmax(-1)
    want = p.gather(-1, scope["kept"]).sum(-1)
    # Logits up to 2^3 in fp32, beside 32 and a thousand additions.
    assert bool(((scope["mass"].double() - want).abs() <= 64 * 2.0**-23 * want).all())
    assert float(want.max()) < 0.9
    assert scope["stats"].compute()["ratio_mean"] == 1.0


def test_the_page_says_the_constants() -> None:
    text = (pages.ROOT / "docs/support.md").read_text(encoding="utf-8")
    assert f"c = {BREAK_EVEN['cpu']} on a CPU" in text
    assert f"{BREAK_EVEN['cuda']} on a GPU" in text
