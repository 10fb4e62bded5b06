"""The reader of machine code, and the model that makes times of its counts, by hand-made cases."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.gpu import count, predict, tally
from benchmarks.gpu.machine_code import Code, Instruction, Resources, innermost, parse, width
from benchmarks.gpu.predict import CLOCK, DRAM, FIRST, LOAD, MULTIPROCESSORS, START, TORCH
from benchmarks.gpu.trace import Native


def listing(*lines: str) -> list[Instruction]:
    """Instructions as cuobjdump prints them, 16 bytes each."""
    text = "".join(f"        /*{16 * i:04x}*/      {line} ;\n" for i, line in enumerate(lines))
    (code,) = parse(f"\t\tFunction : k\n{text}").values()
    assert len(code) == len(lines)
    return code


# A loop of 16-byte loads with a narrow way beside it, inside a loop over rows.
NESTED = listing(
    "S2R R0, SR_TID.X",  # 0
    "IMAD.WIDE R2, R0, 0x4, R2",  # 10: the rows' loop
    "ISETP.GE.AND P0, PT, R0, R5, PT",  # 20: the columns' loop
    "@P0 BRA 0x60",  # 30
    "LDG.E.128 R8, [R2.64]",  # 40
    "BRA 0x80",  # 50
    "LDG.E R8, [R2.64]",  # 60: rows that are not aligned
    "LDG.E R9, [R2.64+0x4]",  # 70
    "MUFU.EX2 R8, R8",  # 80
    "@P1 BRA 0x20",  # 90
    "@P2 BRA 0x10",  # a0
    "STG.E [R2.64], R8",  # b0
    "EXIT",  # c0
    "BRA 0xd0",  # d0: padding
)


def test_loops_are_found_with_the_wide_way_through_them() -> None:
    code = Code(NESTED)
    rows, columns = code.every_loop()
    assert rows.inner == (columns,) and code.loops == (rows,)
    assert [x.address for x in code.turn(columns)] == [0x20, 0x30, 0x40, 0x50, 0x80, 0x90]
    assert [x.address for x in code.turn(rows)] == [0x10, 0xA0]
    assert [x.address for x in code.once()] == [0x00, 0xB0, 0xC0]
    (inside,) = innermost(NESTED)
    assert inside.count("LDG.E") == 2 and inside.count("LDG.E.128") == 1 and len(inside) == 8


@pytest.mark.parametrize(("access", "kept"), [("LDG.E.U8", False), ("LDG.E.U16", True)])
def test_a_way_through_flags_is_an_optional_mask_s(access: str, kept: bool) -> None:
    lines = ("@P0 BRA 0x20", f"{access} R2, [R4.64]", "LDG.E R3, [R6.64]", "EXIT")
    names = [x.name for x in Code(listing(*lines)).once()]
    assert (access in names) == kept and names[-2:] == ["LDG.E", "EXIT"]


def test_a_narrow_way_alone_is_counted() -> None:
    """The way that moves something is taken where nothing moves 16 bytes."""
    code = Code(listing("@P0 BRA 0x30", "LDG.E R2, [R4.64]", "NOP", "EXIT"))
    assert [x.name for x in code.once()] == ["BRA", "LDG.E", "NOP", "EXIT"]


def test_a_converging_branch_goes_on_behind_it() -> None:
    code = Code(
        listing("BSSY B0, 0x50", "@P0 BRA 0x30", "BSYNC B0", "LDG.E R1, [R2]", "BSYNC B0", "EXIT")
    )
    assert code.loops == ()
    assert [x.name for x in code.once()] == ["BSSY", "BRA", "LDG.E", "BSYNC", "EXIT"]


def test_of_ways_that_move_the_same_the_shorter_is_counted() -> None:
    """An option that is absent, or the slow way of a division, is not what a goal's call takes."""
    slow = ("FADD R1, R1, R1", "CALL.REL 0x50")
    code = Code(listing("@P0 BRA 0x30", *slow, "LDG.E R2, [R4]", "EXIT", "RET.REL R6"))
    assert [x.name for x in code.once()] == ["BRA", "LDG.E", "EXIT"]


def test_a_loop_may_be_the_last_thing() -> None:
    """It is left by an EXIT under a condition, and nothing follows."""
    lines = ("NOP", "@P2 EXIT", "LDG.E R1, [R2]", "STG.E [R4], R1", "@P0 EXIT", "BRA 0x20")
    code = Code(listing(*lines))
    (loop,) = code.loops
    assert [x.address for x in code.turn(loop)] == [0x20, 0x30, 0x40, 0x50]
    assert [x.name for x in code.once()] == ["NOP", "EXIT"]


def test_the_way_through_a_loop_is_taken() -> None:
    """Not the one past it, though it is shorter."""
    code = Code(listing("@P0 BRA 0x40", "NOP", "LDG.E R1, [R2]", "@P1 BRA 0x20", "EXIT"))
    (loop,) = code.loops
    assert [x.address for x in code.turn(loop)] == [0x20, 0x30]
    assert [x.name for x in code.once()] == ["BRA", "NOP", "EXIT"]


def test_the_last_block_s_loops_are_told_from_all_blocks() -> None:
    """An arrival in one thread alone: not every way leads over it."""
    code = Code(
        listing(
            "FADD R1, R1, R1",  # 0: a loop of every block
            "@P0 BRA 0x0",
            "@P1 BRA 0x40",
            "ATOMG.E.ADD R2, [R4]",  # 30
            "BAR.SYNC 0x0",  # 40
            "@P2 EXIT",
            "LDG.E R3, [R6]",  # 60: a loop of the last
            "@P3 BRA 0x60",
            "EXIT",
        )
    )
    assert [code.blocks[loop.head][0].address for loop in code.loops] == [0x0, 0x60]
    late = code.behind(("ATOMG",))
    assert [loop.head in late for loop in code.loops] == [False, True]
    before = tally.until_arrival(code.once())
    assert [x.name for x in before] == ["BRA", "ATOMG.E.ADD"]


def test_widths_and_units_are_told_apart() -> None:
    code = listing(
        "LDG.E.128 R4, [R2.64]",
        "LDG.E.U16 R8, [R2.64]",
        "@!P0 STG.E.64 [R2.64], R4",
        "LDS.U8 R9, [R1]",
        "STS.128 [R1], R4",
        "MUFU.EX2 R4, R4",
        "F2F.F64.F32 R10, R4",
        "DADD R10, R10, R10",
        "BAR.SYNC.DEFER_BLOCKING 0x0",
        "SHFL.BFLY PT, R5, R4, 0x1, 0x1f",
        "EXIT",
    )
    assert [width(x) for x in code[:5]] == [16, 2, 8, 1, 16]
    assert code[2].guard == "@!P0"
    assert tally.tally(code) == {
        "instructions": 11,
        "mufu": 2,
        "fp64": 1,
        "barriers": 1,
        "shuffles": 1,
        "loads": {"16": 1, "2": 1},
        "stores": {"8": 1},
        "shared_loads": {"1": 1},
        "shared_stores": {"16": 1},
        "rounds": 1,
    }


LOAD4 = "LDG.E R4, [R2.64]"
IF4 = "ISETP.NE.AND P0, PT, R4, RZ, PT"
USE5 = "FADD R5, R5, R5"


@pytest.mark.parametrize(
    ("lines", "rounds"),
    [
        ((LOAD4, "LDG.E R5, [R6.64]", "FADD R4, R4, R5"), 1),
        ((LOAD4, "LDG.E R5, [R4]", USE5), 2),
        # A result that nothing waits for: the next turn's, loaded ahead.
        ((LOAD4, "FADD R5, R6, R6"), 0),
        # Overwritten before it is used.
        ((LOAD4, "MOV R4, R6", "LDG.E R5, [R4]", USE5), 1),
        # Through the second word of an address, a predicate, a branch and shared memory.
        (("LDG.E.64 R4, [R2.64]", "IADD3 R9, R5, R6, RZ", "LDG.E R5, [R8.64]", USE5), 2),
        ((LOAD4, IF4, "@P0 LDG.E R5, [R6.64]", USE5), 2),
        ((LOAD4, IF4, "@P0 BRA 0x40", "NOP", "LDG.E R5, [R6.64]", USE5), 2),
        ((LOAD4, "STS [R1], R4", "BAR.SYNC 0x0", "LDS R6, [R1]", "LDG.E R5, [R6]", USE5), 2),
    ],
)
def test_loads_that_wait_for_loads(lines: tuple[str, ...], rounds: int) -> None:
    assert tally.rounds(listing(*lines)) == rounds


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "blocks"),
    [
        (96, 128, 0, 5),  # 65536 / (96 · 32) = 21 warps, in fours: 20
        (104, 128, 0, 4),
        (199, 128, 0, 2),
        (139, 256, 0, 1),  # 144 a thread: 14 warps, in fours 12
        (32, 1024, 0, 2),  # 64 warps
        (16, 32, 0, 32),  # blocks
        (79, 256, 114688, 2),  # 228 KB, of which a block's 1 KB is the system's
        (79, 256, 116736, 1),
    ],
)
def test_residency(registers: int, threads: int, shared: int, blocks: int) -> None:
    assert tally.residency(Resources(registers, 0, 1024), threads, shared) == blocks


def test_a_loop_that_only_reads_four_steps_has_them() -> None:
    load, store = "LDG.E.128 R4, [R2.64]", "STG.E.128 [R2.64], R4"
    assert count.blocks_steps(listing(load, load)) == 4  # rewards and values, for a chunk's map
    assert count.blocks_steps(listing(load, load, store, store)) == 4
    assert count.blocks_steps(listing("LDG.E.64 R4, [R2.64]")) == 0  # maps of chunks


def test_the_first_of_two_passes_writes_no_step() -> None:
    """16 long sequences: a block a chunk, twice; the outputs' 8 bytes a step are the second's."""
    call = Native("gae", ((16, 65536),), 4, moved=16 << 20, written=8 << 20, time_major=False)
    maps, whole = list(count._native_steps(call, count.Named()))
    assert (maps["blocks"], whole["blocks"]) == (1024, 1024)
    assert (maps["bytes"], whole["bytes"]) == (8 << 20, 16 << 20)
    assert maps["kernel"] != whole["kernel"]


def kernel(**parts: Any) -> dict[str, Any]:
    return {"threads": 128, "resident": 4, "once": {"instructions": 0}} | parts


def step(**parts: Any) -> dict[str, Any]:
    return {"blocks": 528, "elements": 0, "bytes": 0, "rows": 0} | parts


def test_bytes_limit_a_kernel_that_computes_little() -> None:
    cost = predict.kernel_cost(kernel(), step(bytes=4_300_000_000))
    assert cost.limit == "DRAM" and cost.seconds == pytest.approx(1e-3 + LOAD)


def test_issue_slots_limit_a_kernel_of_many_instructions() -> None:
    """528 blocks of 4 warps fill the GPU once: 16 warps a multiprocessor, 4 slots a clock."""
    loop = {"elements": 8, "instructions": 1000}
    work = step(elements=528 * 128 * 8 * 100)  # 100 turns
    cost = predict.kernel_cost(kernel(loops={"scan": loop}), work)
    cycles = 16 * 100 * 1000 / (4 * predict.ISSUE_SHARE)
    assert cost.limit == "issue slots" and cost.seconds == pytest.approx(cycles / CLOCK)


@pytest.mark.parametrize(
    ("counts", "limit", "cycles"),
    [
        ({"mufu": 100}, "MUFU", 2 * 100),
        ({"fp64": 100}, "fp64", 0.5 * 100),
        ({"shared_loads": {"16": 100}}, "shared memory and L1", 4 * 100),
        ({"loads": {"2": 100}}, "shared memory and L1", 100),  # a wavefront at least
    ],
)
def test_each_unit_can_limit(counts: dict[str, Any], limit: str, cycles: float) -> None:
    cost = predict.kernel_cost(
        kernel(resident=16, loops={"scan": {"elements": 1, "instructions": 1} | counts}),
        step(blocks=16 * MULTIPROCESSORS, elements=16 * MULTIPROCESSORS * 128 * 1000),
    )
    assert cost.limit == limit
    assert cost.seconds == pytest.approx(16 * 4 * 1000 * cycles / CLOCK)


def test_few_blocks_take_their_own_chain() -> None:
    """One block of a turn: 900 instructions one after the other, two loads and three barriers."""
    once = {"instructions": 900, "barriers": 3, "rounds": 2}
    cost = predict.kernel_cost(kernel(once=once), step(blocks=1))
    cycles = 900 * predict.LATENCY / predict.INDEPENDENT + 3 * predict.BARRIER
    assert cost.limit == "latency" and cost.seconds == pytest.approx(cycles / CLOCK + 2 * LOAD)


def test_waves_are_whole_and_the_last_block_comes_last() -> None:
    once = {"instructions": 90, "rounds": 2}
    one = predict.kernel_cost(kernel(once=once), step(blocks=4 * MULTIPROCESSORS)).seconds
    two = predict.kernel_cost(kernel(once=once), step(blocks=4 * MULTIPROCESSORS + 1)).seconds
    assert two == pytest.approx(2 * one)
    late = predict.kernel_cost(kernel(once=once, last_block={"instructions": 300}), step())
    cycles = 300 * predict.LATENCY / predict.INDEPENDENT
    assert late.seconds == pytest.approx(one + cycles / CLOCK + LOAD)


def test_a_last_block_s_loads_find_the_l2() -> None:
    """Two rounds of what other blocks have just written; one's own loads come from DRAM."""
    last = {"instructions": 300}
    none = predict.kernel_cost(kernel(last_block=last), step()).seconds
    some = predict.kernel_cost(kernel(last_block=last | {"rounds": 2}), step()).seconds
    assert some - none == pytest.approx(2 * predict.LOAD_L2)
    once = {"instructions": 0, "rounds": 2}
    own = predict.kernel_cost(kernel(once=once, last_block=last), step()).seconds
    assert own - none == pytest.approx(LOAD)  # of two, DRAM's own latency hides one


def test_what_a_row_costs_is_in_it() -> None:
    around = {"instructions": 400}
    rows = 4 * 528 * 10  # ten of each warp
    cost = predict.kernel_cost(kernel(around=around), step(rows=rows))
    cycles = 10 * max(
        400 * 16 / (4 * predict.ISSUE_SHARE), 400 * predict.LATENCY / predict.INDEPENDENT
    )
    assert cost.seconds == pytest.approx(cycles / CLOCK)


def test_what_a_row_leaves_is_a_whole_turn_or_another_loop_s() -> None:
    """Rows of 100 elements a lane: 3 turns of 32 and 4 elements more, for each of 10 rows."""
    loop = {"elements": 32, "instructions": 3200}
    work = step(elements=4 * 528 * 32 * 100 * 10, rows=4 * 528 * 10)
    whole = predict.kernel_cost(kernel(loops={"scan": loop}), work)
    cycle = 16 / (4 * predict.ISSUE_SHARE) / CLOCK
    assert whole.seconds == pytest.approx(10 * 4 * 3200 * cycle)
    rest = {"elements": 4, "instructions": 400}
    left = predict.kernel_cost(kernel(loops={"scan": loop | {"rest": rest}}), work)
    assert left.seconds == pytest.approx(10 * (3 * 3200 + 400) * cycle)


def test_a_product_takes_whole_waves_of_tiles() -> None:
    """1536 rows to 4096 columns are 192 tiles of 256 · 128: two waves of 132."""
    cost = predict.product_cost([1536, 4096, 151936], 2, False)
    wave = 2 * 256 * 128 * 151936 / (predict.PRODUCTS / MULTIPROCESSORS)
    assert cost.limit == "matrix units" and cost.seconds == pytest.approx(2 * wave)
    added = predict.product_cost([1536, 4096, 151936], 4, True).seconds
    assert added == pytest.approx(2 * wave + 1536 * 4096 * 4 / DRAM)


def test_a_call_is_the_sum_of_its_steps_and_gaps() -> None:
    calls = [
        {"kernel": "k", "times": 2} | step(bytes=430_000_000),
        {"torch": "mul", "bytes": 43_000_000, "times": 1},
    ]
    found = predict.predicted(calls, {"k": kernel()})
    assert found.launches == 3 and found.limit == "DRAM"
    seconds = 2 * (1e-4 + LOAD) + 1e-5 + TORCH + FIRST + 2 * START
    assert found.microseconds == pytest.approx(1e6 * seconds)
    with pytest.raises(ValueError, match="no counts of 'k'; count again"):
        predict.predicted(calls, {})


def test_each_goal_is_judged_by_its_default_backend() -> None:
    """Dispatch by shapes; logits_ppo_loss has a goal for each, as their kernels differ."""
    chosen = {(goal.case.op, goal.case.shape.name, goal.provider) for goal in count.gpu_goals()}
    native = {(op, shape) for op, shape, provider in chosen if "cuda" in provider}
    assert {("gae", "envs-8"), ("gae", "long-16x64k"), ("token_logprobs", "qwen-m64")} < native
    assert ("logits_ppo_loss", "qwen-r1", "ppo_fast-triton-inplace") in chosen
    assert ("logits_ppo_loss", "qwen-r1", "ppo_fast-cuda-inplace") in chosen
    assert ("gae", "rlhf-512x8k", "ppo_fast-triton") in chosen
    rows = predict.predictions(count.committed())
    judged = {row["must"]: row["judged"] for row in rows if row["goal"]["op"] == "logits_ppo_loss"}
    assert judged == {1400: "cuda", 1740: "triton"}


def test_a_new_kernel_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"ROLES has no kernel 'new_kernel'; known: .*gae_kernel"):
        count.kernel_counts("new_kernel", NESTED, Resources(32, 0, 0), 128, 0)


def test_a_lost_loop_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="dlogits_kernel has no loop for 'gradient', of"):
        count.kernel_counts("dlogits_kernel", NESTED, Resources(32, 0, 0), 128, 0)


def test_counts_not_made_here_are_kept() -> None:
    old = {"kernels": {"triton 3.6.0": {"k": 1}, "triton 3.9.0": {"k": 2}}, "calls": {"a": []}}
    new = {"kernels": {"triton 3.9.0": {"k": 3}}, "calls": {"b": []}}
    assert count.merged(old, new) == {
        "kernels": {"triton 3.6.0": {"k": 1}, "triton 3.9.0": {"k": 3}},
        "calls": {"a": [], "b": []},
    }


def test_the_committed_counts_are_what_the_command_writes() -> None:
    text = count.COUNTS.read_text()
    assert count.to_text(json.loads(text)) == text
    assert max(map(len, text.splitlines())) < 400


def test_the_committed_predictions_follow_from_the_counts() -> None:
    """`python -m benchmarks.gpu.predict --save` after a count."""
    assert predict.PREDICTIONS.read_text() == predict.to_text(
        predict.predictions(count.committed())
    )
