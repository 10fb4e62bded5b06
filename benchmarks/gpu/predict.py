"""Times of the GPU goals, predicted from counts.json: `python -m benchmarks.gpu.predict`.

A prediction is no measurement: it is what the counted instructions, bytes, waves and launches take
on an H200 under the assumptions below. A kernel takes as long as its slowest resource; a block is
not done sooner than its own chain of instructions, barriers and loads; a last block's work comes
after all others. `--save` writes predictions.json, from which the benchmarks' page is made.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu import count

PREDICTIONS = Path(__file__).with_name("predictions.json")

# The GPU. NVIDIA H100 Tensor Core GPU Architecture (white paper, 2022), whose multiprocessors an
# H200 has.
MULTIPROCESSORS = 132
ISSUES = 4  # warp instructions a clock
MUFU_LANES = 16  # CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions"
FP64_LANES = 64  # the same
SHARED_BYTES = 128  # a clock, of shared memory and of L1: one wavefront
# Rates measured on an H200: a copy's, in bytes of both directions, and a large bf16 product's.
DRAM = 4.3e12
PRODUCTS = 790e12
# Assumed.
CLOCK = 1.83e9  # under load
L2_RATE = 5.5e12  # bytes a second
ISSUE_SHARE = 0.85  # of the issue slots that a kernel of enough warps fills
LATENCY = 4.5  # cycles from an instruction to the next one that needs its result
INDEPENDENT = (
    1.5  # instructions that a warp has ready at a time outside of the loops over elements
)
MOST_INDEPENDENT = 4  # and in them at most; else one of each element of a turn
LOAD = 0.7e-6  # seconds from a global load to its use
# The same of a last block: other blocks have just written what it reads, so the L2 has it. More
# than is stated for Hopper, 200 cycles (Ultrasonics Sonochemistry 99, 106546, table 3), and is
# measured on an L40, 222 to 339 by multiprocessor (arXiv:2606.22588).
LOAD_L2 = 0.2e-6
BARRIER = 30  # cycles
START = 1.0e-6  # seconds between kernels of a graph
FIRST = 1.0e-6  # seconds until a graph's first block runs
TORCH = 1.5e-6  # seconds of a small kernel of PyTorch's beside the gap before it
TILE = (256, 128)  # rows and columns of the result that a block of a matrix product forms


class Cost(NamedTuple):
    """Seconds of one launch and the resource they are spent on."""

    seconds: float
    limit: str


def _wavefronts(counts: dict[str, Any]) -> float:
    """Those of a warp's accesses that lie side by side: 128 bytes each, and one at least."""
    names = ("loads", "stores", "shared_loads", "shared_stores")
    return sum(
        many * max(1.0, int(wide) * 32 / SHARED_BYTES)
        for name in names
        for wide, many in counts.get(name, {}).items()
    )


def _chain(counts: dict[str, Any], load: float = LOAD) -> float:
    """Seconds of one warp alone."""
    ready = max(INDEPENDENT, min(counts.get("elements", 0), MOST_INDEPENDENT))
    cycles = counts["instructions"] * LATENCY / ready + counts.get("barriers", 0) * BARRIER
    return cycles / CLOCK + counts.get("rounds", 0) * load


def _resources(counts: dict[str, Any]) -> dict[str, float]:
    """Cycles of a multiprocessor per warp, by resource."""
    return {
        "issue slots": counts["instructions"] / (ISSUES * ISSUE_SHARE),
        "MUFU": counts.get("mufu", 0) * 32 / MUFU_LANES,
        "fp64": counts.get("fp64", 0) * 32 / FP64_LANES,
        "shared memory and L1": _wavefronts(counts),
    }


def _turns(
    loops: Iterable[dict[str, Any]], step: dict[str, Any], blocks: int, warps: int
) -> Iterator[tuple[dict[str, Any], float]]:
    """Loops and the turns that a block makes of each. A row's last turn is whole, or is left to a
    loop of fewer elements; a block of fewer elements than a turn makes one.
    """
    starts = step["rows"] or blocks * warps  # of a row, or a slice of one, by a warp
    lane = step["elements"] / (32 * starts)
    each = starts / (blocks * warps)
    for loop in loops:
        if "rest" in loop:
            full = lane // loop["elements"]
            left = math.ceil((lane - full * loop["elements"]) / loop["rest"]["elements"])
            yield loop, each * full
            yield loop["rest"], each * left
        else:
            yield loop, max(1.0, each * math.ceil(lane / loop["elements"]))


def kernel_cost(kernel: dict[str, Any], step: dict[str, Any]) -> Cost:
    """One launch, without the gap before it."""
    resident, threads = kernel["resident"], kernel["threads"]
    warps = math.ceil(threads / 32)
    places = resident * MULTIPROCESSORS
    blocks = step["blocks"] or places
    loops = kernel.get("loops", {})
    chain = _chain(kernel["once"])
    cycles = _resources(kernel["once"])
    for loop, turns in _turns(loops.values(), step, blocks, warps):
        chain += math.ceil(turns) * _chain(loop)
        for what, taken in _resources(loop).items():
            cycles[what] += turns * taken
    if "around" in kernel:  # what a warp does once a row, or once a slice of one
        begun = step["rows"] / (blocks * warps)
        chain += math.ceil(begun) * _chain(kernel["around"] | {"rounds": 0})
        for what, taken in _resources(kernel["around"]).items():
            cycles[what] += begun * taken
    # Blocks follow each other on a place: full waves at the rate of the slowest resource, and the
    # last one, however few its blocks, at least for the chain of one.
    waves = max(1, math.ceil(blocks / places))
    busiest = math.ceil(blocks / MULTIPROCESSORS) if blocks < places else blocks / MULTIPROCESSORS
    of = {what: busiest * warps * taken / CLOCK for what, taken in cycles.items()}
    of["latency"] = waves * chain if waves <= 4 else blocks / places * chain
    of["DRAM"] = step["bytes"] / DRAM + LOAD
    of["L2"] = _l2_bytes(kernel, step) / L2_RATE + LOAD
    limit = max(of, key=lambda what: of[what])
    # Its arrival is a fence, an atomic and a fence, each at least a way to the L2 and back.
    tail = _chain(kernel["last_block"], LOAD_L2) + LOAD if "last_block" in kernel else 0.0
    return Cost(of[limit] + tail, limit)


def _l2_bytes(kernel: dict[str, Any], step: dict[str, Any]) -> float:
    """Bytes through the L2: what DRAM gives, and rows that are read a second time from it."""
    return step["bytes"] * (1.5 if rereads(kernel) else 1.0)


def rereads(kernel: dict[str, Any]) -> bool:
    """True of a kernel that scans a row and reads it again from global memory."""
    loops = kernel.get("loops", {})
    return "scan" in loops and bool(loops.get("gradient", {}).get("loads"))


def product_cost(shape: list[int], itemsize: int, adds: bool) -> Cost:
    """A matrix product, by whole waves of tiles; its result may be waited for."""
    m, n, k = shape
    tiles = math.ceil(m / TILE[0]) * math.ceil(n / TILE[1])
    tiles = min(tiles, math.ceil(m / TILE[1]) * math.ceil(n / TILE[0]))
    waves = math.ceil(tiles / MULTIPROCESSORS)
    each = 2 * TILE[0] * TILE[1] * k / (PRODUCTS / MULTIPROCESSORS)
    # What is added to what is there reads and writes it, which the last k-step may not hide.
    moved = (m * k + n * k) * 2 + m * n * itemsize * (2 if adds else 1)
    of = {"matrix units": waves * each, "DRAM": moved / DRAM}
    limit = max(of, key=lambda what: of[what])
    return Cost(of[limit] + (m * n * itemsize / DRAM if adds else 0.0), limit)


def torch_cost(step: dict[str, Any]) -> Cost:
    """One of PyTorch's kernels: a pass over its bytes."""
    seconds = step["bytes"] / DRAM
    return Cost(seconds + TORCH, "DRAM" if seconds > TORCH else "launches")


class Prediction(NamedTuple):
    """A call's time, what most of it is spent on, and how many kernels it launches."""

    microseconds: float
    limit: str
    launches: int
    parts: dict[str, float]  # microseconds by kind of step


def predicted(call: list[dict[str, Any]], kernels: dict[str, Any]) -> Prediction:
    """A call's prediction from its steps and the counts of one compiler's kernels."""
    parts: dict[str, float] = {}
    limits: dict[str, float] = {}
    launches = 0
    for step in call:
        if "kernel" in step:
            if step["kernel"] not in kernels:
                raise ValueError(f"predict: no counts of {step['kernel']!r}; count again")
            cost, part = kernel_cost(kernels[step["kernel"]], step), step["kernel"].split("#")[0]
        elif "product" in step:
            cost = product_cost(step["product"], step["itemsize"], step["adds"])
            part = "products"
        else:
            cost, part = torch_cost(step), "PyTorch"
        times = step["times"]
        launches += times
        parts[part] = parts.get(part, 0.0) + times * cost.seconds * 1e6
        limits[cost.limit] = limits.get(cost.limit, 0.0) + times * cost.seconds * 1e6
    parts["launches"] = (FIRST + (launches - 1) * START) * 1e6
    limits["launches"] = limits.get("launches", 0.0) + parts["launches"]
    limit = max(limits, key=lambda what: limits[what])
    return Prediction(sum(parts.values()), limit, launches, parts)


def compilers(counts: dict[str, Any], provider: str) -> list[str]:
    """The compilers whose kernels a provider's call launches."""
    kind = "triton" if "triton" in provider else "nvcc"
    return [name for name in counts["kernels"] if name.startswith(kind)]


def predictions(counts: dict[str, Any]) -> list[dict[str, Any]]:
    """Every goal's predictions, one a provider and compiler, as the page shows them."""
    rows = []
    for goal in count.gpu_goals():
        row: dict[str, Any] = {"goal": goal.case.to_json(), "provider": goal.provider}
        # The default backend, where the goal is not one kernel's.
        judged = "triton" if "triton" in goal.provider else "cuda"
        row |= {"must": goal.must, "aim": goal.aim, "judged": judged}
        row["predicted"] = []
        for provider in count.providers(goal):
            call = counts["calls"].get(count.call_key(goal.case, provider.name))
            for compiler in compilers(counts, provider.name) if call else ():
                found = predicted(call, counts["kernels"][compiler])
                row["predicted"].append(
                    {
                        "provider": provider.name,
                        "compiler": compiler,
                        "microseconds": float(f"{found.microseconds:.4g}"),
                        "limit": found.limit,
                        "launches": found.launches,
                        "parts": {k: float(f"{v:.4g}") for k, v in found.parts.items()},
                        "counted": counted(call, counts["kernels"][compiler]),
                    }
                )
        rows.append(row)
    return rows


def counted(call: list[dict[str, Any]], kernels: dict[str, Any]) -> str:
    """Counts of the kernel that moves most of a call's bytes."""
    steps = [step for step in call if "kernel" in step and kernels[step["kernel"]].get("loops")]
    if not steps:
        return "-"
    kernel = kernels[max(steps, key=lambda step: step["times"] * step["bytes"])["kernel"]]
    loops = [
        f"{name} {loop['instructions'] / loop['elements']:.3g}"
        for name, loop in kernel["loops"].items()
    ]
    return (
        f"{', '.join(loops)} instructions an element; {kernel['registers']} registers,"
        f" {kernel['resident']} blocks of {kernel['threads']} threads a multiprocessor"
    )


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines for a terminal."""
    lines = []
    for row in rows:
        case = row["goal"]
        dims = "x".join(map(str, case["shape"]["dims"]))
        bounds = f"must {row['must']:g} µs, aim {row['aim']:g}"
        name = f"{case['op']} {case['direction']} {dims}"
        lines.append(f"{name}: {bounds}; judged on {row['judged']}")
        for found in row["predicted"]:
            met = "meets must" if found["microseconds"] <= row["must"] else "MISSES must"
            met = "meets aim" if found["microseconds"] <= row["aim"] else met
            parts = ", ".join(f"{name} {value:g}" for name, value in found["parts"].items())
            lines += [
                f"  {found['provider']} ({found['compiler']}): {found['microseconds']:g} µs,"
                f" {met}; {found['limit']}; {found['launches']} launches",
                f"    {parts}",
                f"    {found['counted']}",
            ]
    return lines


def to_text(rows: list[dict[str, Any]]) -> str:
    return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--save", action="store_true", help="write predictions.json")
    options = parser.parse_args()
    rows = predictions(count.committed())
    print("\n".join(table(rows)))
    if options.save:
        PREDICTIONS.write_text(to_text(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
