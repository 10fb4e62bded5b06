"""Every CUDA source compiles for every architecture without a GPU: no warning, no spill, no local
memory, and the hot loops move 16 bytes at a time.
"""

from __future__ import annotations

import collections
import re
from pathlib import Path

import pytest

from benchmarks.gpu import machine_code, nvcc
from benchmarks.gpu.machine_code import Instruction
from ppo_fast import _cflags

pytestmark = pytest.mark.skipif(nvcc.nvcc() is None, reason="there is no nvcc to compile with")

WITHOUT_KERNELS = {"launch"}


@pytest.mark.parametrize("source", nvcc.SOURCES, ids=lambda path: path.stem)
def test_compiles_without_spills(source: Path) -> None:
    built = nvcc.compiled(source)
    assert built.status == 0, built.log
    kernels = list(nvcc.kernels(built.log))
    expected = (
        set()
        if source.stem in WITHOUT_KERNELS
        else {f"sm_{name}" for name in _cflags.ARCHITECTURES}
    )
    assert {kernel.architecture for kernel in kernels} == expected
    assert not [kernel for kernel in kernels if kernel.stack or kernel.spilled]


def test_the_report_is_read() -> None:
    """A spill is found where there is one."""
    report = (
        "ptxas info    : Compiling entry function '_Zk' for 'sm_80'\n"
        "ptxas info    : Function properties for _Zk\n"
        "    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 0 barriers\n"
    )
    assert list(nvcc.kernels(report)) == [nvcc.Kernel("_Zk", "sm_80", 16, 20, 255)]


def code_of(stem: str, pattern: str, architecture: str) -> list[Instruction]:
    """The machine code of the one kernel whose mangled name matches."""
    (source,) = (path for path in nvcc.SOURCES if path.stem == stem)
    built = nvcc.compiled(source)
    assert built.status == 0, built.log
    if machine_code.disassembler() is None:
        pytest.skip("there is no cuobjdump to read machine code with")
    found = machine_code.machine_code(built.object, architecture)
    (code,) = (code for name, code in found.items() if re.search(pattern, name))
    return code


def hot_loops(code: list[Instruction], exponentials: int) -> list[collections.Counter[str]]:
    """The innermost loops that take at least this many exponentials a turn."""
    counted = [collections.Counter(loop) for loop in machine_code.innermost(code)]
    hot = [loop for loop in counted if loop["MUFU.EX2"] >= exponentials]
    assert hot
    return hot


def narrow(loop: collections.Counter[str], kinds: tuple[str, ...]) -> list[str]:
    """The accesses of a loop that move fewer than 16 bytes."""
    return [name for name in loop if name.startswith(kinds) and not name.endswith(".128")]


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_100"])
@pytest.mark.parametrize("dtype", ["f", r"\w*bf16E", r"\w*fp16E"], ids=["fp32", "bf16", "fp16"])
def test_logprobs_reads_16_bytes_a_load(dtype: str, architecture: str) -> None:
    """64 bytes of logits a turn in whole vectors, whatever a row's alignment; one exponential each
    and one for the rescaling; lanes stay apart."""
    code = code_of("logprobs", f"logprobs_forward_kernelI{dtype}Lb0E", architecture)
    group = 16 if dtype == "f" else 32
    for loop in hot_loops(code, group):
        assert not narrow(loop, ("LDG", "STG", "LD.", "ST."))
        assert loop["LDG.E.128"] >= 4
        assert loop["MUFU.EX2"] == group + 1
        assert not [name for name in loop if name.startswith(("SHFL", "BAR", "WARPSYNC"))]


@pytest.mark.parametrize("architecture", ["sm_90a", "sm_100"])
@pytest.mark.parametrize("dtype", ["f", r"\w*bf16E", r"\w*fp16E"], ids=["fp32", "bf16", "fp16"])
def test_logprobs_streams_through_shared_memory(dtype: str, architecture: str) -> None:
    """sm_90 and later: bulk copies in and out, 16 bytes at a time in shared memory."""
    forward = code_of("logprobs", f"logprobs_forward_kernelI{dtype}Lb1E", architecture)
    names = {x.name for x in forward}
    assert "UBLKCP.S.G" in names and "UBLKCP.G.S" not in names
    for loop in hot_loops(forward, 16 if dtype == "f" else 32):
        assert not narrow(loop, ("LDS", "LDG", "LD."))
        assert loop["LDS.128"] >= 4
    gradient = code_of("logprobs", f"logprobs_gradient_kernelI{dtype}Lb1E", architecture)
    assert {"UBLKCP.S.G", "UBLKCP.G.S", "LDS.128", "STS.128"} <= {x.name for x in gradient}


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_100"])
def test_logprobs_gradient_moves_16_bytes(architecture: str) -> None:
    code = code_of("logprobs", r"logprobs_gradient_kernelI\w*bf16ELb0E", architecture)
    for loop in hot_loops(code, 16):
        assert loop["LDG.E.128"] >= 2 and loop["STG.E.128"] >= 2


@pytest.mark.parametrize("architecture", ["sm_90a", "sm_100"])
@pytest.mark.parametrize("dtype", ["f", r"\w*bf16E", r"\w*fp16E"], ids=["fp32", "bf16", "fp16"])
def test_clusters_move_16_bytes(dtype: str, architecture: str) -> None:
    """In shared memory, for the softmax and for the gradient, which also leaves for global memory;
    narrower are only the ends of a row, an element at a time."""
    code = code_of("logits_ppo_loss", f"logits_ppo_clusterI{dtype}(f|S\\w+)E", architecture)
    loops = hot_loops(code, 16 if dtype == "f" else 32)
    element = "" if dtype == "f" else ".U16"
    for loop in loops:
        assert loop["LDS.128"] >= 4
        assert {name.removesuffix(element) for name in narrow(loop, ("LDS", "STS", "STG"))} <= {
            "LDS",
            "STS",
            "STG.E",
        }
        assert not element or not loop.keys() & {"LDS", "STS", "STG.E"}
        assert not narrow(loop, ("LD.", "ST."))
    assert {(loop["STS.128"], loop["STG.E.128"]) for loop in loops} == {(0, 0), (4, 0), (0, 4)}


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_100"])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("walk", ["warps", "blocks"])
def test_advantages_move_16_bytes(walk: str, dense: bool, architecture: str) -> None:
    """Rewards and values before the loop and in it; advantages and returns."""
    kernel = f"advantage_{walk}_kernelI\\w*GaeSourceILb0ELb{dense:d}E"
    code = code_of("gae", kernel, architecture)
    names = collections.Counter(x.name for x in code)
    assert names["LDG.E.128"] >= 4 and names["STG.E.128"] >= 2


def test_long_sequences_fill_a_multiprocessor() -> None:
    """Four blocks of 256 threads share the 65536 registers, so that 512 sequences are one wave of
    an H100's or H200's 132 multiprocessors; three on sm_100."""
    (source,) = (path for path in nvcc.SOURCES if path.stem == "gae")
    dense = {
        kernel.architecture: 65536 // (256 * kernel.registers)
        for kernel in nvcc.kernels(nvcc.compiled(source).log)
        if re.search(r"advantage_blocks_kernelI\w*GaeSourceILb0ELb1E", kernel.name)
    }
    assert dense.keys() == {f"sm_{name}" for name in _cflags.ARCHITECTURES}
    assert all(blocks >= (3 if name == "sm_100" else 4) for name, blocks in dense.items())


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_100"])
@pytest.mark.parametrize(
    ("stem", "kernel", "each"),
    [
        ("ppo_loss", "ppo_loss_kernelILNS_7VariantE0ELb1E", 16),
        ("value_loss", "value_loss_kernel", 8),
    ],
)
def test_the_last_block_waits_once_for_the_parts(
    stem: str, kernel: str, each: int, architecture: str
) -> None:
    """A thread's sums of 256 parts are all loaded before the first addition."""
    names = [x.name for x in code_of(stem, kernel, architecture)]
    arrival = next(i for i, name in enumerate(names) if name.startswith("ATOMG"))
    addition = names.index("DADD", arrival)
    assert names[arrival:addition].count("LDG.E.64") >= each


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_100"])
@pytest.mark.parametrize(
    ("stem", "kernel", "loads", "stores"),
    [
        ("ppo_loss", "ppo_loss_kernelILNS_7VariantE0ELb1E", 5, 2),
        ("ppo_loss", "ppo_loss_kernelILNS_7VariantE0ELb0E", 6, 2),
        ("value_loss", "value_loss_kernel", 3, 1),
        ("whiten", "moments_kernel", 1, 0),
        ("whiten", "whiten_kernel", 1, 1),
    ],
)
def test_tokens_move_16_bytes(
    stem: str, kernel: str, loads: int, stores: int, architecture: str
) -> None:
    """Four fp32 tokens an access, of every tensor and gradient that is laid out for it."""
    wide = collections.Counter(
        x.name.split(".")[0]
        for x in code_of(stem, kernel, architecture)
        if x.name.endswith(".128")
    )
    assert (wide["LDG"], wide["STG"]) == (loads, stores)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_100"])
@pytest.mark.parametrize("dtype", ["f", r"\w*bf16", r"\w*fp16"], ids=["fp32", "bf16", "fp16"])
def test_scaled_gradients_move_16_bytes(dtype: str, architecture: str) -> None:
    """And a factor of 1 leaves before the first of them: its return is above the loop."""
    code = [x.name for x in code_of("scale", f"scale_kernelI{dtype}E", architecture)]
    loads, stores = (
        [i for i, name in enumerate(code) if name.startswith(kind) and name.endswith(".128")]
        for kind in ("LDG", "STG")
    )
    assert loads and len(loads) == len(stores)
    assert "EXIT" in code[: loads[0]]
