"""Engine of the ahead-of-time checks: cases of the Triton kernels, compiled for absent GPUs.

`aot_<stem>.py` holds `AOT`, the table of the entry kernels of `kernels/<stem>.py`, in the terms of
`aot_axes.py`. Interpreted and compiled mode cannot share a process: compilations need one without
TRITON_INTERPRET, which Triton reads when it is imported, so tables are imported late.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aot_axes import Aot

ROOT = Path(__file__).resolve().parents[2]
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
Case = dict[str, Any]


def table(stem: str) -> tuple[Aot, ...]:
    """The table of `kernels/<stem>.py`; nothing for a file without one."""
    name = f"aot_{stem}"
    return importlib.import_module(name).AOT if importlib.util.find_spec(name) else ()


def registry(stems: Iterable[str] = ()) -> dict[str, Aot]:
    """The tables of the kernel files named (default: all): "stem.kernel" -> its Aot."""
    entries = {}
    for path in sorted((ROOT / "kernels").glob("*.py")):
        if stems and path.stem not in stems:
            continue
        for entry in table(path.stem):
            name = f"{path.stem}.{entry.kernel.__name__}"
            if name in entries:
                raise ValueError(f"{name} is registered twice")
            entries[name] = entry
    return entries


def product(entry: Aot) -> list[Case]:
    """Every valid combination of the alternatives."""
    axes = {k: v if isinstance(v, tuple) else (v,) for k, v in entry.axes.items()}
    cases = []
    for values in itertools.product(*axes.values()):
        case: Case = {}
        for name, value in zip(axes, values, strict=True):
            case.update(value if isinstance(value, dict) else {name: value})
        if entry.valid(case):
            cases.append(case)
    return cases


def pairs(cases: list[Case]) -> list[Case]:
    """A subset of the cases with every pair of values that occurs in them (greedy cover)."""
    varying = [k for k in cases[0] if len({repr(c[k]) for c in cases}) > 1]
    keys = list(itertools.combinations(varying, 2)) or [(k, k) for k in varying]
    bits: dict[tuple[str, ...], int] = {}  # a pair of values -> its bit
    covers = []
    for case in cases:
        texts = {k: repr(case[k]) for k in varying}
        found = ((a, texts[a], b, texts[b]) for a, b in keys)
        covers.append(sum(1 << bits.setdefault(pair, len(bits)) for pair in found))
    missing = (1 << len(bits)) - 1
    chosen = [] if missing else [cases[0]]
    while missing:
        best = max(range(len(cases)), key=lambda i: (covers[i] & missing).bit_count())
        chosen.append(cases[best])
        missing &= ~covers[best]
    return chosen


def source_of(kernel: Any, case: Case) -> tuple[Any, dict[str, Any]]:
    """The ASTSource and the launch options of a case."""
    from triton.compiler import ASTSource

    from ppo_fast.kernels.common import LAUNCH

    names = kernel.arg_names
    missing = set(names) - set(case)
    if missing:
        raise ValueError(f"{kernel.__name__}: no alternatives for {sorted(missing)}")
    signature, constants, attrs = {}, {}, {}
    for i, name in enumerate(names):
        value = case[name]
        if kernel.params[i].is_constexpr or not isinstance(value, str):
            signature[name] = "constexpr"
            constants[(i,)] = value
            continue
        signature[name], _, divisor = value.partition(":")
        if divisor:
            attrs[(i,)] = [["tt.divisibility", int(divisor)]]
    options = LAUNCH | {
        k: v for k, v in case.items() if k in ("num_warps", "num_stages", "maxnreg")
    }
    return ASTSource(kernel, signature, constants, attrs), options


def resources(compiled: Any) -> dict[str, int]:
    """Registers, spilled bytes and shared memory, from the cubin or the AMD assembly."""
    found = {"shared": compiled.metadata.shared}
    if "cubin" in compiled.asm:
        import triton

        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            text = subprocess.run(
                [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
            ).stdout
        found["registers"] = int(re.findall(r"REG:(\d+)", text)[-1])
        found["spilled"] = int(re.findall(r"STACK:(\d+)", text)[-1])
    else:
        text = compiled.asm["amdgcn"]
        found["registers"] = int(re.findall(r"\.vgpr_count:\s*(\d+)", text)[-1])
        found["spilled"] = 4 * int(re.findall(r"\.vgpr_spill_count:\s*(\d+)", text)[-1])
    return found


def compile_case(job: tuple[str, Case, str]) -> dict[str, Any]:
    """Compile one case for one target; never raises."""
    import triton
    from triton.backends.compiler import GPUTarget

    name, case, target = job
    start = time.perf_counter()
    result: dict[str, Any] = {"kernel": name, "target": target, "case": case}
    try:
        source, options = source_of(registry([name.split(".")[0]])[name].kernel, case)
        compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
        result |= resources(compiled)
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
    return result | {"seconds": round(time.perf_counter() - start, 3)}


def text_of(name: str, target: str, kind: str, wanted: Case) -> str:
    """The "ptx", "ttgir" or "amdgcn" text of the first case with the values wanted."""
    import triton
    from triton.backends.compiler import GPUTarget

    entry = registry([name.split(".")[0]])[name]
    case = next(c for c in product(entry) if wanted.items() <= c.items())
    source, options = source_of(entry.kernel, case)
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options).asm[kind]
