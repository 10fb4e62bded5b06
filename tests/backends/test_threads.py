"""Ops called from several Python threads at once: the same bits as called alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ppo_fast import testing
from ppo_fast.testing import run, same_bits

# Enough for the kernels' own threads, where there are any.
SHAPES = {"token_logprobs": (40, 30), "logits_ppo_loss": (40, 30)}
EVERY = testing.FACTORIES | testing.HEADS


@pytest.mark.case("I5")
@pytest.mark.parametrize("op", EVERY)
def test_calls_at_once(op: str) -> None:
    """Four threads share one call's tensors."""
    call = EVERY[op](SHAPES.get(op, (40, 900)))
    alone = run(call, "cpu")
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: run(call, "cpu"), range(16)))
    for result in results:
        for name, x in alone.items():
            assert same_bits(result[name], x), name


def test_threads_of_one_call() -> None:
    """However many threads share a call's work: the same bits."""
    before = torch.get_num_threads()
    calls = {op: EVERY[op](SHAPES.get(op, (40, 900))) for op in testing.FACTORIES}
    try:
        torch.set_num_threads(1)
        one = {op: run(call, "cpu") for op, call in calls.items()}
        torch.set_num_threads(4)
        four = {op: run(call, "cpu") for op, call in calls.items()}
    finally:
        torch.set_num_threads(before)
    for op, result in one.items():
        for name, x in result.items():
            assert same_bits(four[op][name], x), (op, name)
