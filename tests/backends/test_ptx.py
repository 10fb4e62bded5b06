"""Compiled Triton kernels, run as PTX: a sample of the ops' tests, planted faults, accesses.

`make test-ptx` runs all the ops' tests so.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from typing import Any

import aot
import pytest

PTX = aot.ROOT / "tests/ptx"


def child(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A Python process in which Triton compiles."""
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    kept["PYTHONPATH"] = os.pathsep.join([str(aot.ROOT), str(PTX)])
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, env=kept | env, cwd=aot.ROOT
    )


def json_of(*args: str) -> Any:
    done = child(*args)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# File -> tests of it that run here, and of how many one is taken: a few of every op.
SAMPLE = {
    "ops/test_logprobs.py": ("within_budget", 9),
    "ops/test_logits_ppo_loss.py": ("every_backend_within_budget", 3),
    "ops/test_linear_ppo_loss.py": ("every_backend_within_budget", 3),
    "ops/test_ppo_loss.py": ("precisions", 2),
    "ops/test_value_loss.py": ("precisions", 2),
    "ops/test_gae.py": ("within_budget", 7),
    "ops/test_rlhf_advantages.py": ("within_budget", 3),
    "ops/test_whiten.py": ("within_budget", 4),
    "ops/test_linear_token_stats.py": ("precisions or banned or segments", 4),
    "backends/test_sparse_head_kernel.py": ("not registered", 6),
    "backends/test_divergence_kernel.py": ("not (budget or bits or in_place)", 29),
}


@pytest.mark.parametrize("file", SAMPLE)
def test_compiled_kernels_pass_the_ops_tests(file: str) -> None:
    select, stride = SAMPLE[file]
    options = ("-p", "ptx_plugin", "-p", "no:cacheprovider", "-q", "-m", "not long")
    only = ("-k", f"triton and {select}", f"tests/{file}")
    done = child("-m", "pytest", *options, *only, PTX_STRIDE=str(stride))
    assert done.returncode == 0, done.stdout[-3000:]
    ran = re.search(r"PTX: (\d+) launches", done.stdout)
    assert ran is not None and int(ran[1]) > 0, "the kernels were not run as PTX"


# The arrival counter's reset, of 32 bits that are 0 in the upper half; a barrier between a block's
# accesses to the logits, of which the interpreter watches the shared memory's alone.
NOT_FOUND = {("gae_kernel", "half a store"): 1, ("dlogits_kernel", "no barrier"): 1}


@pytest.mark.parametrize("kernel", ["gae_kernel", "moments_kernel", "dlogits_kernel"])
@pytest.mark.parametrize("most", [3, pytest.param(1000, marks=pytest.mark.long)])
def test_planted_faults_are_found(kernel: str, most: int) -> None:
    """Barriers, stores and accesses that the call reaches; a block that counts on its order."""
    found = json_of(str(PTX / "planted.py"), kernel, str(most))[kernel]
    assert sum(map(len, found.values())) > 3
    for fault, verdicts in found.items():
        missed = [place for place, verdict in verdicts.items() if verdict == "not found"]
        assert len(missed) <= NOT_FOUND.get((kernel, fault), 0), (fault, missed)
    if kernel == "gae_kernel":
        assert all(len(verdicts) > 0 for verdicts in found.values())


@functools.cache
def accesses() -> dict[str, dict[str, dict[str, int]]]:
    return json_of(str(PTX / "accesses.py"))


# Most accesses of threads to global memory in the calls of accesses.py.
MOST = {
    "token_logprobs": 11344,
    "logits_ppo_loss": 31595,
    "gae": 15040,
    "ppo_loss": 19417,
    "value_loss": 9985,
    "whiten": 19685,
    "linear_token_logprobs over a support": 35818,
}


@pytest.mark.parametrize("op", MOST)
def test_accesses_are_within_their_budget(op: str) -> None:
    found = accesses()[op]
    assert 0 < sum(sum(widths.values()) for widths in found.values()) <= MOST[op], found


# Kernels of rows of bf16: bytes that an access has at least, for most of the bytes.
WIDTHS = {
    "segments_kernel": 16,
    "dlogits_kernel": 16,
    "logits_ppo_kernel": 8,
    "pair_logits_kernel": 16,
}


def narrow(found: dict[str, dict[str, int]]) -> list[str]:
    """Kernels that access more than a quarter of their bytes in narrower pieces."""
    out = []
    for kernel in WIDTHS.keys() & found.keys():
        moved = {int(width): int(width) * n for width, n in found[kernel].items()}
        wide = sum(n for width, n in moved.items() if width >= WIDTHS[kernel])
        if wide < 0.75 * sum(moved.values()):
            out.append(kernel)
    return out


ROWS = ["token_logprobs", "logits_ppo_loss", "linear_token_logprobs over a support"]


@pytest.mark.parametrize("op", ROWS)
def test_rows_are_accessed_in_wide_pieces(op: str) -> None:
    assert narrow(accesses()[op]) == []
    unaligned = accesses()[f"{op} offset"]
    assert set(narrow(unaligned)) == WIDTHS.keys() & unaligned.keys(), "2 bytes go unnoticed"
