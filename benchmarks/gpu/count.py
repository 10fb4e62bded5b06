"""Counts of the machine code and the calls behind every GPU goal.

    python -m benchmarks.gpu.count            count again, and write counts.json
    python -m benchmarks.gpu.count --print    the counts, to stdout
    python -m benchmarks.gpu.count --triton   the kernels of this process's Triton alone
    python -m benchmarks.gpu.count --nvcc     those of nvcc alone

counts.json holds the kernels for sm_90 by compiler ("triton 3.6.0", "nvcc 13.0"), and by goal and
provider what a call launches, multiplies and copies. What is not counted anew is kept, so that a
machine counts with the compilers that it has. No GPU is needed.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from benchmarks.gpu import nvcc
from benchmarks.gpu.machine_code import (
    Code,
    Instruction,
    Loop,
    Resources,
    machine_code,
    resources,
)
from benchmarks.gpu.native import NativeLaunch, launches
from benchmarks.gpu.tally import moved, residency, tally, until_arrival
from benchmarks.gpu.trace import Native, Product, Step, Triton, traced
from benchmarks.ops.case import Case
from benchmarks.ops.op import Goal
from benchmarks.ops.registry import GOALS
from benchmarks.peers import providers_of

COUNTS = Path(__file__).with_name("counts.json")
ARCHITECTURE = "sm_90a"
Counts = dict[str, Any]


def exponentials(code: Sequence[Instruction]) -> int:
    """Elements of a loop that takes an exponential of each, beside those that rescale a state."""
    found = sum(x.name.startswith("MUFU.EX2") for x in code)
    return 1 << found.bit_length() - 1 if found >= 4 else 0


def scanned(code: Sequence[Instruction]) -> int:
    """Elements of a loop that reads logits of two bytes at least, and writes nothing."""
    counts, elements = tally(code), exponentials(code)
    read = moved(counts.get("loads", {})) + moved(counts.get("shared_loads", {}))
    writes = "stores" in counts or "shared_stores" in counts
    return elements if read >= 2 * elements and not writes else 0


def written(code: Sequence[Instruction]) -> int:
    """Elements of a loop that writes gradients of two bytes at least, to wherever.

    One that adds up a segment's numbers stores to shared memory too, and shuffles.
    """
    counts, elements = tally(code), exponentials(code)
    stored = moved(counts.get("stores", {})) + moved(counts.get("shared_stores", {}))
    return elements if stored >= 2 * elements and "shuffles" not in counts else 0


def compared(code: Sequence[Instruction]) -> int:
    """Elements of a loop that reads two fp32 logits of each, a student's and a teacher's."""
    return moved(tally(code).get("loads", {})) // 8 if exponentials(code) else 0


def steps(code: Sequence[Instruction]) -> int:
    """Elements of a loop that writes two fp32 for each."""
    return moved(tally(code).get("stores", {})) // 8


def blocks_steps(code: Sequence[Instruction]) -> int:
    """Elements of a loop that writes two fp32 for each, or reads as many, four at a time."""
    return steps(code) or 2 * tally(code).get("loads", {}).get("16", 0)


def tokens(code: Sequence[Instruction]) -> int:
    """Elements of a loop that writes two gradients for each, or reads five fp32 of each."""
    return steps(code) or moved(tally(code).get("loads", {})) // 20


def streamed(code: Sequence[Instruction]) -> int:
    """Elements of two bytes of a loop that reads and writes as many."""
    counts = tally(code)
    read, written = moved(counts.get("loads", {})), moved(counts.get("stores", {}))
    return written // 2 if read else 0


def products(code: Sequence[Instruction]) -> int:
    """Elements of a loop that multiplies and adds each into a sum, eight at a time or more."""
    found = sum(x.name.startswith("FFMA") for x in code)
    return found if found >= 8 and "16" in tally(code).get("loads", {}) else 0


class Role(NamedTuple):
    """A loop that a kernel takes over all its elements."""

    name: str
    elements: Callable[[Sequence[Instruction]], int]  # of a thread's turn; 0: it is not the loop


_SCAN, _GRADIENT = Role("scan", scanned), Role("gradient", written)
_STEPS, _TOKENS = (Role("tile", steps),), (Role("tile", tokens),)
_PAIRS = (Role("products", products),)
# Kernel -> the loops over its elements; none where it has a few numbers a row.
ROLES: dict[str, tuple[Role, ...]] = {
    "segments_kernel": (_SCAN,),
    "terms_kernel": (),
    "dlogits_kernel": (_GRADIENT,),
    "logits_ppo_kernel": (_SCAN, _GRADIENT),
    "ppo_kernel": _TOKENS,
    "gae_kernel": _STEPS,
    "logprobs_forward_kernel": (_SCAN,),
    "logprobs_terms_kernel": (),
    "logprobs_gradient_kernel": (_GRADIENT,),
    "logits_ppo_cluster": (_SCAN, _GRADIENT),
    "ppo_loss_kernel": _TOKENS,
    "advantage_blocks_kernel": (Role("tile", blocks_steps),),
    "gae_slabs_kernel": _STEPS,
    "scale_kernel": (Role("pass", streamed),),
    "divergence_kernel": (Role("scan", compared),),
    "divergence_terms_kernel": (),
    "divergence_grad_kernel": (Role("gradient", compared),),
    "support_kernel": (_SCAN,),
    "support_grad_kernel": (_GRADIENT,),
    "pair_logits_kernel": _PAIRS,
    "pair_sums_kernel": _PAIRS,
    "pair_parts_kernel": _PAIRS,
}


def gpu_goals() -> list[Goal]:
    """The goals that are device times."""
    return [goal for goal in GOALS if goal.case.device == "cuda" and not goal.memory]


def providers(goal: Goal) -> list[Any]:
    """Triton's and CUDA C++'s, in place where the goal is."""
    names = {goal.provider, goal.provider.replace("triton", "cuda")}
    names |= {goal.provider.replace("cuda", "triton")}
    return [p for p in providers_of(goal.case) if p.name in names]


def call_key(case: Case, provider: str) -> str:
    return f"{case.name} | {provider}"


# --- kernels
def kernel_counts(
    name: str, code: Sequence[Instruction], about: Resources, threads: int, shared: int
) -> Counts:
    """Counts of one kernel."""
    if name not in ROLES:
        raise ValueError(f"count: ROLES has no kernel {name!r}; known: {', '.join(ROLES)}")
    graph = Code(code)
    path = graph.once()
    before = until_arrival(path)
    after = path[len(before) :]
    found: Counts = {
        "threads": threads,
        "registers": about.registers,
        "stack": about.stack,
        "shared": about.shared + shared,
        "resident": residency(about, threads, shared),
        "instructions": len(code),
        "once": tally(before),
    }
    if after:
        found["last_block"] = tally(after)
    late = graph.behind(("ATOM", "ATOMG"))  # the last block's alone
    loops = [loop for loop in graph.every_loop() if loop.head not in late]
    for role in ROLES[name]:
        found.setdefault("loops", {})[role.name], loop = _role(name, role, graph, loops)
        around = [x for x in loops if loop and x.head != loop.head and loop.blocks <= x.blocks]
        if around:  # as far as to the arrival of a row's slice: the last one's work is a row's
            turns = [until_arrival(graph.turn(x)) for x in around]
            found["around"] = tally([i for turn in turns for i in turn])
    return found


def _role(name: str, role: Role, graph: Code, loops: list[Loop]) -> tuple[Counts, Loop | None]:
    """A role's counts a turn, and its loop, the one that takes the most elements; None where a
    block takes all of its elements at once.
    """
    turns = [(graph.turn(loop), loop) for loop in loops] + [(until_arrival(graph.once()), None)]
    fitting = [
        (loop is not None, role.elements(turn), -len(turn), turn, loop)
        for turn, loop in turns
        if role.elements(turn)
    ]
    _, elements, _, turn, loop = max(fitting, key=lambda found: found[:3], default=(0,) * 5)
    if not elements:
        raise ValueError(f"count: {name} has no loop for {role.name!r}, of {len(turns)}")
    counts = {"elements": elements} | tally(turn)
    fewer = [x for x in fitting if x[0] and x[1] < elements]
    if fewer:  # what a row leaves for a loop of fewer elements a turn: the cheapest of these
        _, elements, _, turn, _ = min(fewer, key=lambda found: len(found[3]) / found[1])
        counts["rest"] = {"elements": elements} | tally(turn)
    return counts, loop


def triton_name() -> str:
    import triton

    return f"triton {triton.__version__.split('+')[0]}"


def triton_counts(launch: Any) -> Counts:
    """Counts of a Triton kernel as a launch asks for it."""
    import triton

    variant = launch.variant
    names = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
    options = {k: variant.options[k] for k in names if variant.options.get(k) is not None}
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    compiled = triton.compile(variant.source(), target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        ((_, code),) = machine_code(Path(file.name)).items()
        (about,) = resources(Path(file.name)).values()
    return kernel_counts(
        variant.kernel, code, about, 32 * variant.num_warps, compiled.metadata.shared
    )


@functools.cache
def nvcc_name() -> str:
    found = re.search(r"release (\S+),", nvcc.version())
    return f"nvcc {found[1] if found else 'unknown'}"


def native_counts(launch: NativeLaunch) -> Counts:
    """Counts of a kernel of csrc/cuda."""
    (source,) = (path for path in nvcc.SOURCES if path.stem == launch.stem)
    built = nvcc.compiled_for(source, ARCHITECTURE.removeprefix("sm_"))
    if built.status:
        raise RuntimeError(f"count: nvcc fails on {source.name}:\n{built.log[-2000:]}")
    every = machine_code(built.object, ARCHITECTURE)
    found = [name for name in every if re.search(launch.pattern, name)]
    if len(found) != 1:
        raise ValueError(f"count: {len(found)} kernels of {source.name} match {launch.pattern!r}")
    about = resources(built.object, ARCHITECTURE)[found[0]]
    return kernel_counts(launch.kernel, every[found[0]], about, launch.threads, launch.shared)


# --- calls
class Named:
    """Kernels by name, a number behind it where one has several variants."""

    def __init__(self) -> None:
        self.keys: dict[Any, str] = {}
        self.launch: dict[str, Any] = {}

    def name(self, kernel: str, key: Any, launch: Any) -> str:
        if key not in self.keys:
            number = sum(name.split("#")[0] == kernel for name in self.keys.values())
            self.keys[key] = f"{kernel}#{number + 1}" if number else kernel
            self.launch[self.keys[key]] = launch
        return self.keys[key]


def _is_idle(kernel: str, constants: Counts) -> bool:
    """True of a multiplication in place by the 1 that a goal's backward brings, and by nothing."""
    return (
        kernel == "scale_kernel"
        and constants.get("IN_PLACE") is True
        and constants.get("scale_ptr", 0) is None
    )


def _of_pairs(launch: Any) -> Counts:
    """Elements, starts by warps, and bytes of a kernel over the pairs (row, id) of supports.

    Every pair's vector is counted as read from DRAM, though ids that rows share may be in the L2.
    The shares of long rows are counted with the others, as if there were none.
    """
    x, blocks, warps = launch.arguments, launch.grid[0], launch.variant.num_warps
    tensors = {name: y for name, y in x.items() if isinstance(y, Tensor)}
    if launch.kernel == "pair_parts_kernel":
        return {"elements": 0, "rows": blocks * warps, "bytes": 0}
    vectors = tensors.pop("weight_ptr", tensors.pop("x_ptr", None))
    tensors.pop("parts_ptr", None)
    streamed = sum(y.numel() * y.element_size() for y in tensors.values())
    if vectors is None:  # the softmax over a row's pairs
        return {"elements": x["logits_ptr"].numel(), "rows": blocks * warps, "bytes": streamed}
    pairs = tensors["ids_ptr" if "ids_ptr" in tensors else "index_ptr"].numel()
    # A turn of the outer loop of the sums takes LANES columns.
    tiles = -(-x["width"] // x["LANES"])
    starts = 0 if launch.kernel == "pair_logits_kernel" else blocks * warps * tiles
    read = pairs * x["width"] * vectors.element_size()
    return {"elements": pairs * x["width"], "rows": starts, "bytes": streamed + read}


def _triton_step(step: Triton, named: Named) -> Counts:
    launch = step.launch
    variant = launch.variant
    name = named.name(launch.kernel, (variant.kernel, variant.key), launch)
    if ROLES.get(launch.kernel) == _PAIRS or launch.kernel.startswith("support_"):
        return {"kernel": name, "blocks": launch.grid[0]} | _of_pairs(launch)
    tensors = [x for x in launch.arguments.values() if isinstance(x, Tensor)]
    sizes = sorted((x.numel() * x.element_size() for x in tensors), reverse=True)
    loops = ROLES.get(launch.kernel)
    # A few numbers a row of the largest: logits, and those beside them.
    kept = sizes if loops else [size for size in sizes if size < sizes[0]]
    main = max(tensors, key=Tensor.numel)
    rows = main.numel() // main.shape[-1]
    idle = _is_idle(variant.kernel, variant.constants)
    return {
        "kernel": name,
        "blocks": launch.grid[0] * launch.grid[1] * launch.grid[2],
        "elements": 0 if idle else main.numel(),
        "rows": rows * variant.num_warps,
        "bytes": 0 if idle else sum(kept),
    }


def _native_steps(step: Native, named: Named) -> Iterator[Counts]:
    every = launches(step)
    for launch in every:
        elements = 1
        for n in max(step.shapes, key=lambda shape: (len(shape), shape)):
            elements *= n
        # In place, and this backend's losses are divided already: the factor is 1.
        streams = bool(ROLES.get(launch.kernel)) and step.op != "scaled_"
        yield {
            "kernel": named.name(launch.kernel, launch[:5], launch),
            "blocks": launch.blocks,  # None: as many as are resident
            "elements": elements if step.op != "scaled_" else 0,
            "rows": launch.rows,
            "bytes": step.moved - (0 if launch.writes else step.written) if streams else 0,
        }


def call_counts(steps: list[Step], named: Named) -> list[Counts]:
    """The steps of a call in order, equal ones next to each other counted."""
    found: list[Counts] = []
    for step in steps:
        if isinstance(step, Triton):
            new = [_triton_step(step, named)]
        elif isinstance(step, Native):
            new = list(_native_steps(step, named))
        elif isinstance(step, Product):
            new = [{"product": list(step[:3]), "itemsize": step.itemsize, "adds": step.adds}]
        else:
            new = [{"torch": step.op, "bytes": step.moved}]
        for counts in new:
            same = next((x for x in found if {**x, "times": 1} == {**counts, "times": 1}), None)
            if same is not None:
                same["times"] += 1
            else:
                found.append(counts | {"times": 1})
    return found


def calls(native: bool, triton: bool) -> tuple[dict[str, list[Counts]], Named, Named]:
    """Each goal's calls, the Triton kernels they launch, and those of csrc/cuda."""
    found, of_triton, of_nvcc = {}, Named(), Named()
    for goal in gpu_goals():
        for provider in providers(goal):
            mine = "cuda" in provider.name
            if (native if mine else triton) and call_key(goal.case, provider.name) not in found:
                steps = traced(goal.case, provider)
                found[call_key(goal.case, provider.name)] = call_counts(
                    steps, of_nvcc if mine else of_triton
                )
    return found, of_triton, of_nvcc


def count(native: bool = True, triton: bool = True) -> Counts:
    """All counts that this process can make."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fake tensor's address is not one
        steps, of_triton, of_nvcc = calls(native, triton)
    kernels: Counts = {}
    # A call of csrc/cuda can launch Triton's kernels too, and one of Triton's can't the other way.
    if of_triton.launch:
        kernels[triton_name()] = {k: triton_counts(x) for k, x in of_triton.launch.items()}
    if of_nvcc.launch:
        kernels[nvcc_name()] = {k: native_counts(x) for k, x in of_nvcc.launch.items()}
    return {"kernels": kernels, "calls": steps}


def committed() -> Counts:
    """The counts of counts.json."""
    found: Counts = json.loads(COUNTS.read_text())
    return found


def merged(old: Counts, new: Counts) -> Counts:
    """The new counts, and of the old ones what was not counted anew."""
    return {part: dict(sorted((old.get(part, {}) | new[part]).items())) for part in new}


def _is_line(value: Any) -> bool:
    """True of what stands on a line of its own: a number, a stretch of code, a step."""
    if not isinstance(value, dict):
        return not isinstance(value, list)
    stretch = "instructions" in value and "registers" not in value
    return stretch or "times" in value


def to_text(counts: Counts) -> str:
    """JSON with a line for each stretch of code and each step, so that a diff shows what moved."""

    def lines(value: Any, depth: int) -> str:
        if _is_line(value):
            return json.dumps(value)
        pad, end = "  " * (depth + 1), "  " * depth
        if isinstance(value, list):
            return "[\n" + ",\n".join(pad + lines(x, depth + 1) for x in value) + f"\n{end}]"
        body = (f"{pad}{json.dumps(k)}: {lines(x, depth + 1)}" for k, x in value.items())
        return "{\n" + ",\n".join(body) + f"\n{end}}}"

    return lines(counts, 0) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--print", action="store_true", help="to stdout; write nothing")
    parser.add_argument("--triton", action="store_true", help="only the kernels of Triton")
    parser.add_argument("--nvcc", action="store_true", help="only the kernels of nvcc")
    options = parser.parse_args()
    both = options.triton == options.nvcc
    native = (both or options.nvcc) and nvcc.nvcc() is not None
    found = count(native, both or options.triton)
    if options.print:
        print(to_text(found), end="")
        return 0
    COUNTS.write_text(to_text(merged(committed() if COUNTS.exists() else {}, found)))
    return 0


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    sys.exit(main())
