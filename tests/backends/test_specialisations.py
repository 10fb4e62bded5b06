"""Kernels, launches and torch calls of every op on Triton: no more than the budgets here."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any, NamedTuple

import aot
import pytest
import torch

from ppo_fast import testing
from ppo_fast.kernels import common


class Budget(NamedTuple):
    """Most of each that an op may take; `tests/aot/variants.py` prints what it takes."""

    sizes: int  # kernels compiled for dense calls of one kind in many sizes
    arguments: int  # of these, compiled for an integer's value or a pointer's alignment
    layouts: int  # kernels compiled for these calls in other layouts and alignments too
    launches: int  # of Triton kernels in one forward and backward
    torch: int  # calls of PyTorch's ops in these, but for views and allocations; on CPU tensors


# The kernels of a row of logits are compiled for vocabularies of whole vectors, and for others.
BUDGETS = {
    "token_logprobs": Budget(11, 4, 25, 3, 0),
    "ppo_loss": Budget(5, 0, 6, 2, 1),
    "value_loss": Budget(5, 0, 6, 2, 1),
    "gae": Budget(2, 0, 4, 1, 1),
    "rlhf_advantages": Budget(2, 0, 4, 1, 1),
    "whiten": Budget(5, 0, 9, 3, 0),
    "linear_token_logprobs": Budget(12, 5, 18, 3, 44),
    "linear_logprobs_at": Budget(12, 5, 18, 3, 111),
    "linear_token_stats": Budget(5, 2, 9, 1, 50),
    "logits_ppo_loss": Budget(8, 2, 17, 3, 8),
    "linear_ppo_loss": Budget(8, 2, 13, 5, 41),
    # Some rows keep nothing, and take the dense kernels; each vector of a hidden size has its own.
    "token_logprobs over supports": Budget(9, 2, 17, 5, 77),
    "linear_token_logprobs over supports": Budget(23, 4, 35, 8, 114),
}


@functools.cache
def taken() -> dict[str, Any]:
    """Output of variants.py, in a process in which Triton is not interpreted."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(aot.ROOT / "tests/aot/variants.py")],
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_op_has_a_budget() -> None:
    assert set(BUDGETS) == set(taken()) >= {*testing.FACTORIES, *testing.HEADS}


@pytest.mark.parametrize("op", BUDGETS)
def test_op_is_within_its_budget(op: str) -> None:
    row = taken()[op]
    found = Budget(
        sum(row["sizes"].values()),
        sum(row["arguments"].values()),
        sum(row["layouts"].values()),
        len(row["launches"]),
        sum(row["torch"].values()),
    )
    over = [name for name in Budget._fields if getattr(found, name) > getattr(BUDGETS[op], name)]
    assert not over, f"{op} takes {found}: {row}"
    assert found.sizes and found.layouts and found.launches


def test_counters_are_specialised_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pointers on 16 bytes have a kernel, others another; a captured launch takes a new counter
    and may compile none."""
    event = SimpleNamespace(record=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    counters = common._Counters(torch.device("cpu")).free
    addresses = [x.data_ptr() for x in counters]
    assert len(set(addresses)) == common.COUNTERS
    assert {address % 16 for address in addresses} == {0}
    assert all(x[0] == 0 for x in counters)
    assert common.counter(torch.zeros(1)).data_ptr() % 16 == 0
