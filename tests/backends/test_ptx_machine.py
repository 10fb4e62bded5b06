"""The interpreter of PTX on small texts: results, and every error that it is there to find."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from ptx_machine import Decoded
from ptx_memory import GlobalMemory, GpuError
from ptx_parse import parse

WORDS = 64  # of the output, which is what `%rd1` points to; `%rd2` is each thread's own word of it
HEAD = """
.visible .entry k(.param .u64 .ptr .global .align 1 k_param_0, .param .u32 k_param_1)
.reqntid {threads}
{{
  .reg .b32 %r<99>;
  ld.param.b64 %rd1, [k_param_0];
  mov.u32 %r1, %tid.x;
  mul.wide.u32 %rd3, %r1, 4;
  add.s64 %rd2, %rd1, %rd3;
  {body}
  ret;
$L__func_end0:
}}
"""


def run(
    body: str, threads: int = 32, blocks: int = 1, shared: int = 256, seed: int = 0
) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """The output, of words 7 at first, after a launch."""
    out = np.full(WORDS, 7, np.uint32)
    memory = GlobalMemory([(out.ctypes.data, out.view(np.uint8), "out")])
    decoded = Decoded(parse(HEAD.format(threads=threads, body=body)))
    values = {"k_param_0": out.ctypes.data, "k_param_1": 5, "global_smem": 0}
    decoded.run(blocks, values, memory, shared, random.Random(seed))
    return out


def one(body: str) -> Any:
    """The word that thread 0 leaves in %r9."""
    return run(body + "\n st.global.b32 [%rd2], %r9;")[0]


def f32(x: float) -> str:
    return f"0f{np.float32(x).view(np.uint32):08X}"


def f64(x: float) -> str:
    return f"0d{np.float64(x).view(np.uint64):016X}"


def word(x: float) -> int:
    return int(np.float32(x).view(np.uint32))


NAN = float("nan")
TINY = 2.0**-130
INTEGERS = {
    "add.s32 %r9, 2147483647, 1;": 1 << 31,
    "sub.s32 %r9, 3, 5;": 0xFFFFFFFE,
    "mul.lo.s32 %r9, 65537, 65537;": 131073,
    "mul.hi.u32 %r9, 4294967295, 16;": 15,
    "mul.hi.s32 %r9, -1, 16;": 0xFFFFFFFF,
    "div.s32 %r9, -7, 2;": 0xFFFFFFFD,
    "rem.s32 %r9, -7, 2;": 0xFFFFFFFF,
    "div.u32 %r9, 7, 2;": 3,
    "max.s32 %r9, -1, 1;": 1,
    "max.u32 %r9, -1, 1;": 0xFFFFFFFF,
    "shl.b32 %r9, 1, 40;": 0,
    "shr.u32 %r9, -1, 40;": 0,
    "shr.s32 %r9, -2, 40;": 0xFFFFFFFF,
    "bfe.u32 %r9, 172, 2, 4;": 11,
    "bfe.s32 %r9, 65536, 16, 1;": 0xFFFFFFFF,
    "bfe.s32 %r9, 65536, 15, 3;": 2,
    "popc.b32 %r9, 7;": 3,
    "prmt.b32 %r9, 0x33221100, 0x77665584, 0xc340U;": 0xFF338400,
    "prmt.b32 %r9, 0x33221100, 0x77665584, 0x7654U;": 0x77665584,
    "mad.wide.s32 %rd5, -2, 3, 10; cvt.u32.u64 %r9, %rd5;": 4,
    "mov.b64 %rd5, {1, 2}; mov.b64 {%r8, %r9}, %rd5;": 2,
    "mov.b64 %rd5, -1; cvt.u32.u64 %r9, %rd5;": 0xFFFFFFFF,
    "setp.lt.s32 %p1, -1, 0; selp.b32 %r9, 4, 5, %p1;": 4,
    "setp.lt.u32 %p1, -1, 0; selp.b32 %r9, 4, 5, %p1;": 5,
    "setp.eq.s32 %p1, 1, 1; setp.ne.and.s32 %p2, 1, 1, %p1; selp.b32 %r9, 4, 5, %p2;": 5,
    "mov.b32 %r9, 3; setp.eq.s32 %p1, 1, 2; @%p1 mov.b32 %r9, 4;": 3,
    "mov.b32 %r9, 3; setp.eq.s32 %p1, 1, 2; @!%p1 mov.b32 %r9, 4;": 4,
    "ld.param.b32 %r9, [k_param_1];": 5,
    "cvt.s64.s32 %rd5, -3; shr.s64 %rd6, %rd5, 32; cvt.u32.u64 %r9, %rd6;": 0xFFFFFFFF,
    f"cvt.rzi.s32.f32 %r9, {f32(-2.7)};": 0xFFFFFFFE,
    f"cvt.rni.s32.f32 %r9, {f32(2.5)};": 2,
    f"cvt.rzi.s32.f32 %r9, {f32(1e20)};": 0x7FFFFFFF,
    f"cvt.rzi.s32.f32 %r9, {f32(NAN)};": 0,
}
FLOATS = {
    f"add.rn.f32 %r9, {f32(1)}, {f32(2**-25)};": 1.0,
    f"fma.rn.f32 %r9, {f32(1 + 2**-12)}, {f32(1 - 2**-12)}, {f32(-1)};": -(2.0**-24),
    f"max.f32 %r9, {f32(NAN)}, {f32(1)};": 1.0,
    f"max.NaN.f32 %r9, {f32(NAN)}, {f32(1)};": NAN,
    f"add.ftz.f32 %r9, {f32(TINY)}, {f32(0)};": 0.0,
    f"add.f32 %r9, {f32(TINY)}, {f32(0)};": TINY,
    f"ex2.approx.ftz.f32 %r9, {f32(-130)};": 0.0,
    f"ex2.approx.f32 %r9, {f32(3)};": 8.0,
    f"neg.f32 %r9, {f32(2)};": -2.0,
    f"cvt.rn.f32.f64 %r9, {f64(1 + 2**-30)};": 1.0,
    f"setp.ne.f32 %p1, {f32(NAN)}, {f32(1)}; selp.f32 %r9, {f32(1)}, {f32(2)}, %p1;": 2.0,
    f"setp.neu.f32 %p1, {f32(NAN)}, {f32(1)}; selp.f32 %r9, {f32(1)}, {f32(2)}, %p1;": 1.0,
    f"cvt.rn.bf16.f32 %rs1, {f32(1 + 2**-8)}; cvt.f32.bf16 %r9, %rs1;": 1.0,
    f"cvt.rn.bf16.f32 %rs1, {f32(1 + 3 * 2**-8)}; cvt.f32.bf16 %r9, %rs1;": 1 + 2**-6,
    f"cvt.rn.f16.f32 %rs1, {f32(70000)}; cvt.f32.f16 %r9, %rs1;": float("inf"),
    f"cvt.rn.bf16x2.f32 %r8, {f32(3)}, {f32(5)}; mov.b32 {{%rs1, %rs2}}, %r8;"
    " cvt.f32.bf16 %r9, %rs1;": 5.0,
}


@pytest.mark.parametrize("body", INTEGERS)
def test_integers(body: str) -> None:
    assert one(body) == INTEGERS[body]


@pytest.mark.parametrize("body", FLOATS)
def test_floats(body: str) -> None:
    got, want = np.uint32(one(body)).view(np.float32), np.float32(FLOATS[body])
    assert (np.isnan(got) and np.isnan(want)) or got.view("u4") == want.view("u4")


def test_vectors_are_loaded_and_stored() -> None:
    out = run("st.global.v4.b32 [%rd1], {1, 2, 3, 4}; ld.global.v2.b32 {%r2, %r3}, [%rd1+8];"
              " st.global.b32 [%rd1+16], %r3; st.global.b8 [%rd1+21], %r2;")  # fmt: skip
    assert out[:6].tolist() == [1, 2, 3, 4, 4, 7 + (3 << 8)]


def test_parted_threads_meet_again() -> None:
    """A loop of as many turns as the thread's number, then a shuffle of the whole warp."""
    out = run("""
  mov.b32 %r2, 0;
$L__BB0_1:
  setp.ge.s32 %p1, %r2, %r1;
  @%p1 bra $L__BB0_2;
  add.s32 %r2, %r2, 1;
  bra.uni $L__BB0_1;
$L__BB0_2:
  shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1;
  st.global.b32 [%rd2], %r3;""")
    assert out[:32].tolist() == [i ^ 1 for i in range(32)]


SHUFFLES = {
    "up.b32 %r3, %r1, 3, 0, -1": [i if i < 3 else i - 3 for i in range(32)],
    "down.b32 %r3, %r1, 3, 31, -1": [i if i > 28 else i + 3 for i in range(32)],
    "idx.b32 %r3, %r1, 5, 31, -1": [5] * 32,
}


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_shuffles(shuffle: str) -> None:
    out = run(f"shfl.sync.{shuffle}; st.global.b32 [%rd2], %r3;")
    assert out[:32].tolist() == SHUFFLES[shuffle]


def test_reductions_of_a_warp() -> None:
    out = run("redux.sync.max.s32 %r3, %r1, -1; st.global.b32 [%rd2], %r3;", threads=64)
    assert out.tolist() == [31] * 32 + [63] * 32


def test_matrices_are_loaded_and_stored_by_warps() -> None:
    """Thread t gives the address of row t % 8 and has the word t of a matrix of 8 rows of 4."""
    body = """
  mov.b32 %r2, global_smem; shl.b32 %r3, %r1, 4; and.b32 %r3, %r3, 127; add.s32 %r4, %r2, %r3;
  stmatrix.sync.aligned.m8n8.x2.shared.b16 [%r4], {%r1, %r1};
  ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r5}, [%r4];
  shl.b32 %r6, %r1, 2; add.s32 %r6, %r6, %r2; ld.shared.b32 %r7, [%r6];
  add.s32 %r8, %r5, %r7; st.global.b32 [%rd2], %r8;"""
    assert run(body)[:32].tolist() == [2 * i for i in range(32)]


COUNT = "atom.global.gpu.acq_rel.add.u32 %r3, [%rd1+128], 1;"


def test_blocks_come_in_random_order() -> None:
    """Each block writes the number of blocks before it; the order differs, the set does not."""
    body = f"setp.eq.u32 %p1, %r1, 0; @%p1 {COUNT} mov.u32 %r4, %ctaid.x;"
    body += "mul.wide.u32 %rd5, %r4, 4; add.s64 %rd6, %rd1, %rd5; @%p1 st.global.b32 [%rd6], %r3;"
    found = [run(body, blocks=32, seed=seed)[:32] - 7 for seed in range(3)]
    assert all(sorted(x) == list(range(32)) for x in found)
    assert (found[0] != found[1]).any() and (found[1] != found[2]).any()


# Each thread's shared word, then its neighbour's in the other warp.
WRITE = "shl.b32 %r2, %r1, 2; mov.b32 %r3, global_smem; add.s32 %r4, %r3, %r2;"
WRITE += "xor.b32 %r5, %r4, 128; st.shared.b32 [%r4], %r1;"
READ = "ld.shared.b32 %r6, [%r5];"


def test_shared_memory_is_a_block_s_own() -> None:
    body = f"{WRITE} bar.sync 0; {READ} st.global.b32 [%rd2], %r6;"
    assert run(body, threads=64, blocks=9).tolist() == [i ^ 32 for i in range(64)]


SKIP = "setp.lt.u32 %p1, %r1, 32; @%p1 bra $L__BB0_9;"
ERRORS = {
    "ld.global.b32 %r2, [%rd1+256];": "outside of every tensor",
    "st.global.b32 [%rd1+-4], 1;": "outside of every tensor",
    "st.global.v4.b32 [%rd2], {1, 2, 3, 4};": "not aligned to 16 bytes",
    "ld.global.b32 %r2, [%rd1+2];": "not aligned to 4 bytes",
    "ld.shared.b32 %r2, [global_smem];": "nothing has written",
    "st.shared.b32 [global_smem+256], 1;": "of 256 bytes",
    "st.shared.b64 [global_smem+4], 1;": "not aligned to 8 bytes",
    f"{WRITE} {READ}": "race: read",
    f"{WRITE} bar.sync 0; {READ} st.shared.b32 [%r4], 1;": "over what another warp read",
    f"{WRITE} st.shared.b32 [%r5], 77;": "over what another warp wrote",
    "st.shared.b32 [global_smem], %r1;": "race: two warps",
    f"{SKIP} bar.sync 0; $L__BB0_9:": "others that have ended",
    f"{SKIP} bar.sync 0; ret; $L__BB0_9: bar.sync 0;": "different barriers",
    "setp.lt.u32 %p1, %r1, 7; @%p1 bra $L__BB0_9; shfl.sync.up.b32 %r3, %r1, 1, 0, -1;"
    " $L__BB0_9:": "a part of a warp",
    f"st.global.b32 [%rd2], 1; setp.eq.u32 %p1, %r1, 0; @%p1 {COUNT}": "race: a release",
}  # fmt: skip


@pytest.mark.parametrize("body", ERRORS)
def test_errors_are_found(body: str) -> None:
    with pytest.raises(GpuError, match=ERRORS[body]):
        run(body.replace("$L__BB0_9:", "\n$L__BB0_9:\n"), threads=64)


# What is in order, and the first words that each half of the threads leaves.
RIGHT = {
    f"{WRITE} bar.sync 0; {READ} bar.sync 0; st.shared.b32 [%r4], 1;": [7, 7],
    "st.shared.b32 [global_smem], 1; bar.sync 0; ld.shared.b32 %r2, [global_smem];": [7, 7],
    f"st.global.b32 [%rd2], 1; bar.sync 0; setp.eq.u32 %p1, %r1, 0; @%p1 {COUNT}": [1, 2],
    "setp.lt.u32 %p1, %r1, 32; @%p1 ld.global.b32 %r2, [%rd2+128];": [7, 7],
}


@pytest.mark.parametrize("body", RIGHT)
def test_what_is_ordered_passes(body: str) -> None:
    assert run(body, threads=64)[[0, 32]].tolist() == RIGHT[body]


UNKNOWN = {
    "wgmma.fence.sync.aligned;": "not known",
    "bar.sync 1;": "barrier 0",
    "add.sat.f32 %r9, %r1, %r1;": "not known",
    "atom.global.max.u32 %r3, [%rd1], 1;": "only integers are added",
    "@@ nonsense": "not a PTX instruction",
}


@pytest.mark.parametrize("body", UNKNOWN)
def test_unknown_instructions_are_refused(body: str) -> None:
    with pytest.raises(ValueError, match=UNKNOWN[body]):
        run(body)


def test_accesses_are_counted_by_width() -> None:
    out = np.zeros(WORDS, np.uint32)
    memory = GlobalMemory([(out.ctypes.data, out.view(np.uint8), "out")])
    body = "ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd1]; st.global.b16 [%rd2], 1;"
    decoded = Decoded(parse(HEAD.format(threads=32, body=body)))
    decoded.run(2, {"k_param_0": out.ctypes.data, "k_param_1": 0}, memory, 0, random.Random(0))
    assert memory.accesses == {16: 64, 2: 64}
