"""Kernels that a Triton launch asks for: as few as its arguments need, and none anew later."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ppo_fast.kernels import common


def test_counters_are_specialised_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles a kernel for pointers on 16 bytes and another for the rest; a captured launch
    takes a new counter and may compile none."""
    event = SimpleNamespace(record=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    counters = common._Counters(torch.device("cpu")).free
    addresses = [x.data_ptr() for x in counters]
    assert len(set(addresses)) == common.COUNTERS
    assert {address % 16 for address in addresses} == {0}
    assert all(x[0] == 0 for x in counters)
    assert common.counter(torch.zeros(1)).data_ptr() % 16 == 0
