"""Sizes of a vocabulary's shares that a GPU's host does not look at again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ppo_fast.ops import shards
from ppo_fast.ops.shards import Shard, remembered


def test_sizes_are_looked_at_once_and_compared_on_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another rank's share that has changed since is seen there, whatever this rank's own."""
    monkeypatch.setattr(shards, "_SEEN", {})
    before, after = (torch.tensor([[13, 0], [n, 0]]) for n in (7, 9))
    sizes, changed = remembered("op", "weight", ("head",), before)
    assert sizes == [13, 7]
    assert not bool(changed)
    sizes, changed = remembered("op", "weight", ("head",), after)
    assert sizes == [13, 7]
    assert bool(changed)
    assert remembered("op", "weight", ("another head",), after)[0] == [13, 9]


@pytest.mark.parametrize(("vocab", "want"), [(0, [5, 0, 3]), (6, [5, 0, 1]), (4, [4, 0, 0])])
def test_shares_are_cut_to_the_vocabulary(
    monkeypatch: pytest.MonkeyPatch, vocab: int, want: list[int]
) -> None:
    monkeypatch.setattr(shards, "_SEEN", {})
    rows = torch.tensor([[n, vocab] for n in (5, 0, 3)])
    assert remembered("op", "weight", (), rows)[0] == want
    for rank, first in enumerate((0, want[0], want[0])):
        monkeypatch.setattr(shards.dist, "get_rank", lambda _, rank=rank: rank)
        group: Any = None
        shard = Shard(group, want)
        held = (shard.first, shard.size, shard.vocab, shard.largest)
        assert held == (first, want[rank], sum(want), want[0])


@pytest.mark.parametrize("changed", [False, True])
def test_results_of_changed_sizes_are_nan(monkeypatch: pytest.MonkeyPatch, changed: bool) -> None:
    """Log-probability, entropy, and ln Σe^z, of which divergences are formed."""
    monkeypatch.setattr(shards.dist, "get_rank", lambda _: 0)
    group: Any = None
    shard = Shard(group, [3, 2], torch.tensor(changed))
    parts = [torch.tensor([[0.5], [1.5], [-0.2], [x]]) for x in (0.0, -torch.inf)]
    out = shard._fold(parts, torch.zeros(1, dtype=torch.int64))
    for x in (out.logprobs, out.entropy, out.log_sum):
        assert bool(x.isnan()) is changed
