"""The emulated device that runs csrc/cuda on a CPU: its collectives, and the mistakes it finds."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from ppo_fast import _cflags

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("emulation") / "emulation.so"
    sources = [str(ROOT / "tests/helpers/emulation.cpp"), str(ROOT / "csrc/emulate/engine.cpp")]
    command = ["g++", *_cflags.EMULATE_FLAGS, "-fPIC", "-shared", *sources, "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


def run(device: ctypes.CDLL, name: str, size: int = 256) -> torch.Tensor | str:
    """The kernel's output, or the message that it failed with."""
    out, said = torch.full((size,), -1.0), ctypes.create_string_buffer(500)
    failed = device.run_case(name.encode(), ctypes.c_void_p(out.data_ptr()), said, len(said))
    return said.value.decode() if failed else out


def result(device: ctypes.CDLL, name: str) -> torch.Tensor:
    out = run(device, name)
    assert isinstance(out, torch.Tensor), out
    return out


def test_block_reductions(device: ctypes.CDLL) -> None:
    assert result(device, "sums")[:192].tolist() == [96 * 97 / 2] * 192


def test_shuffles(device: ctypes.CDLL) -> None:
    lanes = range(32)
    want = [
        max(i - 1, 0) + 100 * (i + 3 if i + 3 < 32 else i) + 10000 * (i // 8 * 8 + 5) + 0.5
        for i in lanes
    ]
    assert result(device, "shuffles")[:32].tolist() == want


def test_the_last_block_sees_what_the_others_wrote(device: ctypes.CDLL) -> None:
    for _ in range(2):  # the counter is back at 0
        assert result(device, "last_block")[:6].tolist() == [15, 1, 2, 3, 4, 5]


def test_clusters_read_each_other_s_shared_memory(device: ctypes.CDLL) -> None:
    assert result(device, "neighbours")[:6].tolist() == [2, 3, 1, 2, 3, 1]


def test_bulk_copies_come_late(device: ctypes.CDLL) -> None:
    """Data read before the wait is NaN; data overwritten too early shows in the copy."""
    out = result(device, "copies")
    assert out[:16].tolist() == [2 * i for i in range(16)] and out[16].isnan()
    assert result(device, "reused_source")[:2].tolist() == [2, 1]


def test_shared_memory_is_poisoned(device: ctypes.CDLL) -> None:
    assert bool(result(device, "uninitialised")[:32].isnan().all())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("deadlock", "thread (0, 0, 0) of block (0, 0, 0) waits for __syncthreads"),
        ("deadlock", "63 threads wait, 1 have ended"),
        ("divergence", "divergent: __syncthreads in line"),
        ("warp_divergence", "divergent: __syncwarp in line"),
        ("outside", "wrote outside its 256 bytes of shared memory"),
        ("unwaited_store", "ended before their bulk copies were complete"),
        ("misaligned", "a bulk store of 64 bytes: addresses and size must be multiples of 16"),
        ("never_arrives", "waits for an mbarrier"),
        ("beyond_the_cluster", "no block 2 in its cluster"),
        ("counter_left", "left counter 3 at 32"),
    ],
)
def test_a_mistake_is_found_and_named(device: ctypes.CDLL, name: str, message: str) -> None:
    said = run(device, name)
    assert isinstance(said, str) and f"emulated kernel {name}: " in said and message in said
    assert result(device, "shuffles")[0] == 50300.5, "the device works on after a failed launch"
