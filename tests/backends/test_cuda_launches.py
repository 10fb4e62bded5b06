"""The CUDA kernels take as few launches as they promise, counted by the emulated device."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from conftest import usable

import ppo_fast
from ppo_fast import testing

# Token reductions take one launch for loss, gradients and all statistics; what tokens need of
# their whole sequence takes one more.
LAUNCHES: list[tuple[str, dict[str, Any], int]] = [
    *(("ppo_loss", {"reduction": name}, 1) for name in ("token-mean", "seq-mean-token-sum-norm")),
    ("ppo_loss", {"reduction": "seq-mean-token-mean"}, 2),
    ("ppo_loss", {"variant": "gspo"}, 2),
    ("ppo_loss", {"shape": (41,), "packed": True}, 1),
    ("ppo_loss", {"shape": (41,), "packed": True, "reduction": "seq-mean-token-sum"}, 1),
    ("ppo_loss", {"shape": (41,), "packed": True, "variant": "gspo"}, 2),
    ("value_loss", {}, 1),
    ("value_loss", {"reduction": "seq-mean-token-mean"}, 2),
    ("whiten", {}, 2),
    # Few sequences of many chunks take one launch for the chunks' maps and one more to apply
    # them; where the next live step must be looked for, one before.
    ("gae", {}, 1),
    ("gae", {"time_major": True}, 1),
    ("gae", {"shape": (41,), "packed": True}, 1),
    ("gae", {"shape": (2, 8192)}, 1),
    ("gae", {"shape": (2, 8193), "mask": None}, 2),
    ("gae", {"shape": (2, 8193), "masked": "zero"}, 2),
    ("gae", {"shape": (2, 8193)}, 3),
    ("gae", {"shape": (8193,), "packed": True}, 3),
    ("rlhf_advantages", {}, 1),
    ("rlhf_advantages", {"shape": (2, 8193), "masked": "zero"}, 3),
]


@pytest.mark.parametrize("op, options, expected", LAUNCHES, ids=str)
def test_launches(op: str, options: dict[str, Any], expected: int) -> None:
    usable("cuda")
    libraries = [path for path in torch.ops.loaded_libraries if "ppo_fast_emulated" in path]
    if not libraries:
        pytest.skip("a GPU does not count its launches here")
    launches = ctypes.c_uint64.in_dll(ctypes.CDLL(libraries[0]), "ppo_fast_emulated_launches")
    call = testing.FACTORIES[op](**options)
    before = launches.value
    getattr(ppo_fast, op)(**call.tensors, **call.options, backend="cuda")
    assert launches.value - before == expected
