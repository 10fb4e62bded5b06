"""Every Triton kernel compiles for GPUs that are not there, and launches only what is compiled."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import aot
import launches
import pytest
import torch

from ppo_fast import _results
from ppo_fast._boundary import schema

KERNELS = aot.ROOT / "kernels"
TABLES = aot.ROOT / "tests/aot"


def compiled(*args: str) -> str:
    """stdout of a Python process in which Triton is not interpreted."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(aot.ROOT), str(aot.ROOT / "tests/aot")])
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True, env=env)
    assert done.stdout or done.returncode == 0, done.stderr
    return done.stdout


def compile_all(*args: str) -> None:
    results = [json.loads(line) for line in compiled(str(TABLES), *args).splitlines()]
    assert results
    failed = [r for r in results if "error" in r]
    assert not failed, f"{len(failed)} of {len(results)}: {json.dumps(failed[0], indent=1)}"
    spilled = [r for r in results if r["spilled"]]
    assert not spilled, f"{len(spilled)} of {len(results)} spill: {spilled[0]}"


@pytest.mark.parametrize("target", aot.TARGETS)
def test_every_pair_of_values_compiles(target: str) -> None:
    compile_all("--jobs", "1", "--target", target)


@pytest.mark.long
@pytest.mark.parametrize("target", aot.TARGETS)
def test_every_combination_compiles(target: str) -> None:
    compile_all("--target", target, "--long")


def jit_functions(path: Path) -> set[str]:
    return {
        node.name
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
        and any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
    }


def test_every_kernel_is_registered() -> None:
    """Entry kernels are what is launched, named *_kernel and tabled; helpers are none of these."""
    source = "import aot, json; print(json.dumps(list(aot.registry())))"
    names = set(json.loads(compiled("-c", source)))
    tables = {path.stem.removeprefix("aot_") for path in TABLES.glob("aot_*.py")} - {"axes"}
    assert tables == {name.split(".")[0] for name in names}
    for path in KERNELS.glob("*.py"):
        jitted = jit_functions(path)
        launched = set(re.findall(r"(\w+)\[\(", path.read_text()))
        kernels = {name for name in jitted if name.endswith("_kernel")}
        assert {f"{path.stem}.{k}" for k in kernels} == {
            n for n in names if n.startswith(f"{path.stem}.")
        }
        assert not launched & (jitted - kernels), f"{path.name}: name it *_kernel and register it"


UNLISTED = """
import aot, collections, json
bad = []
for name, entry in aot.registry().items():
    types = collections.defaultdict(set)
    for key, values in entry.axes.items():
        for value in values if isinstance(values, tuple) else (values,):
            for k, v in (value if isinstance(value, dict) else {key: value}).items():
                types[k].add(str(v))
    for p in entry.kernel.params:
        kinds = types[p.name]
        divisible = any(kind.endswith(":16") for kind in kinds)
        if kinds & {"i32", "i64"}:
            listed = divisible and "1" in kinds
            good = listed != p.do_not_specialize
        else:
            addresses = any(kind.startswith("*") for kind in kinds)
            good = not addresses or divisible != p.do_not_specialize_on_alignment
        if not good and not p.is_constexpr:
            bad.append((name, p.name))
print(json.dumps(bad))
"""


def test_tables_hold_what_specialises() -> None:
    """An integer listed as one type does not specialise its kernel, so there are no others.

    Nor does an address that is listed as not divisible by 16 only.
    """
    assert json.loads(compiled("-c", UNLISTED)) == []


def test_codes_are_the_schema_s() -> None:
    from ppo_fast.kernels import codes

    tuples = {
        "VARIANT": schema.KERNEL_VARIANTS,
        "ESTIMATOR": schema.ESTIMATORS,
        "REDUCTION": schema.REDUCTIONS,
        "KL_WEIGHT": schema.KL_WEIGHTS,
        "FORM": schema.FORMS,
        "MASKED": schema.MASKED,
        "SCORE_AT": schema.SCORE_AT,
        "DIVERGENCE": schema.KINDS,
    }
    want = {
        f"{prefix}_{name.upper().replace('-', '_')}": code
        for prefix, names in tuples.items()
        for code, name in enumerate(names)
    }
    want |= {"N_STATS": _results.N_STATS, "N_SUMS": _results.N_SUMS}
    got = {k: v.value for k, v in vars(codes).items() if k.isupper()}
    assert got == want


def test_pairs_cover() -> None:
    """The covering design, on a constructed table with a forbidden pair."""
    table = [
        {"a": a, "b": b, "c": c} for a in range(3) for b in range(3) for c in range(4) if a or b
    ]
    chosen = aot.pairs(table)
    for x, y in (("a", "b"), ("a", "c"), ("b", "c")):
        assert {(r[x], r[y]) for r in chosen} == {(r[x], r[y]) for r in table}
    assert len(chosen) < len(table) / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [1, 16, 33, 2052, 40000])
def test_launches_are_registered(vocab: int, dtype: torch.dtype) -> None:
    """Interpreted launches of logprobs and whiten have the constants that were compiled."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter's launches are what is watched")
    from ppo_fast.kernels import logprobs, whiten

    logits = torch.randn(2, 3, vocab).to(dtype)
    tokens = torch.randint(vocab, (2, 3))
    mask = torch.ones(2, 3, dtype=torch.bool)
    with launches.watch() as launched:
        for keep, temperature in ((None, None), (mask, torch.ones(2, 3))):
            args = (keep, temperature)
            _, *saved = logprobs.logprobs_fwd(logits, tokens, *args, 1.0, -100)
            for grads in ((torch.ones(2, 3), None), (None, torch.ones(()).expand(2, 3))):
                logprobs.logprobs_bwd(*grads, logits, tokens, *args, *saved, 1.0, -100)
            moments = whiten.moments(logits[..., 0], keep)
            whiten.whiten(logits[..., 0], keep, moments, True, True, False, 1e-8)
    assert launched == {
        e.kernel.__name__
        for stem in ("logprobs", "logprobs_grad", "whiten")
        for e in aot.table(stem)
    }


def loops(ptx: str) -> list[tuple[int, int]]:
    """First and last line of every loop: from a label to the last branch back to it."""
    labels: dict[str, int] = {}
    ends: dict[int, int] = {}
    for i, line in enumerate(ptx.splitlines()):
        if label := re.match(r"(\$L__BB\w+):", line):
            labels[label[1]] = i
        branch = re.search(r"bra(?:\.uni)?\s+(\$L__BB\w+);", line)
        if branch and branch[1] in labels:
            ends[labels[branch[1]]] = i
    return list(ends.items())


def inner_loops(ptx: str) -> list[str]:
    """The bodies of the loops that hold no other loop."""
    lines, found = ptx.splitlines(), loops(ptx)
    holds = lambda a, b: a != b and a[0] <= b[0] and b[1] <= a[1]  # noqa: E731
    return ["\n".join(lines[a[0] : a[1]]) for a in found if not any(holds(a, b) for b in found)]


def main_loop(ptx: str) -> str:
    """The body of the longest loop."""
    lines = ptx.splitlines()
    start, end = max(loops(ptx), key=lambda loop: loop[1] - loop[0])
    return "\n".join(lines[start:end])


def ptx_of(name: str, **wanted: Any) -> str:
    return compiled("-c", f"import aot; print(aot.text_of({name!r}, 'sm_90', 'ptx', {wanted!r}))")


@pytest.mark.parametrize("columns", ["i32:16", "i32"])
def test_logprobs_reads_16_bytes_a_load(columns: str) -> None:
    """bf16 rows that start on 16 bytes, whatever V: the loop has nothing but full loads."""
    loop = main_loop(
        ptx_of("logprobs.segments_kernel", logits_ptr="*bf16:16", ALIGN=8, LANES=1024, V=columns)
    )
    loads = re.findall(r"ld\.global\S*", loop)
    assert loads
    assert {load for load in loads if not re.search(r"v4\.b32|b128|v2\.b64", load)} == set()
    assert "shfl" not in loop and "bar.sync" not in loop, "lanes stay apart until the segment ends"
    assert len(re.findall(r"ex2\.", loop)) == 8 * (len(loads) + 1), "one exp an element"
    elements = 8 * len(loads)
    assert len(re.findall(r"\bfma\.", loop)) == 2 * elements + 8, "scaled where it is shifted"
    assert len(re.findall(r"\b(?:shl|and)\.b32", loop)) <= elements + 8, "bf16 widens by one each"


FULL = r"v4\.b32|b128|v2\.b64"


@pytest.mark.parametrize("x, loads", [("*bf16:16", 1), ("*fp32:16", 2)])
def test_full_blocks_of_whiten_move_16_bytes(x: str, loads: int) -> None:
    """8 elements a thread; the last block's accesses, one element each, are the only others."""
    moments = ptx_of("whiten.moments_kernel", x_ptr=x, mask_ptr=None, DENSE=True)
    whiten = ptx_of("whiten.whiten_kernel", x_ptr=x, mask_ptr="*u8:16", DENSE=True)
    for text in (moments, whiten):
        found = re.findall(r"ld\.global\S*", text)
        assert sum(bool(re.search(FULL, load)) for load in found) == loads
        bits = "b16" if "bf16" in x else "b32"
        assert sum(load.endswith(f"global.{bits}") for load in found) == 8
    assert sum(bool(re.search(FULL, store)) for store in re.findall(r"st\.global\S*", whiten)) == 2
    assert len(re.findall(r"ld\.global\.(?:v2\.b32|b64)", whiten)) - 3 == 1, "mask; 3 moments"


@pytest.mark.parametrize("kernel", ["gae.gae_kernel", "rlhf_advantages.rlhf_kernel"])
def test_a_scan_has_one_layout(kernel: str) -> None:
    """Unit strides or any, one sequence a tile or several: one tree, and so the same bits."""
    layouts = set()
    for unit, wide in ((True, True), (False, True), (True, False)):
        wanted = {"UNIT": unit, "WIDE": wide}
        text = compiled(
            "-c", f"import aot; print(aot.text_of({kernel!r}, 'sm_90', 'ttgir', {wanted}))"
        )
        named = dict(re.findall(r"^(#\w+) = (.*)$", text, re.MULTILINE))
        scans = re.findall(r'"tt\.scan".*?tensor<4x128xf32, (#\w+)>', text, re.DOTALL)
        assert scans
        layouts |= {named[name] for name in scans}
    assert len(layouts) == 1


def test_logprobs_gradient_moves_16_bytes() -> None:
    loop = main_loop(
        ptx_of("logprobs_grad.dlogits_kernel", logits_ptr="*bf16:16", ALIGN=8, LANES=1024)
    )
    accesses = re.findall(r"(?:ld|st)\.global\S*", loop)
    assert len(accesses) == 8
    assert all(re.search(r"v4\.b32|b128|v2\.b64", access) for access in accesses)
    assert "setp.eq" not in loop, "the label has a store of its own"


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_scaled_gradients_move_16_bytes(dtype: str, in_place: bool) -> None:
    """Whole tiles of rows on 16 bytes; the end of a row alone is loaded under a mask."""
    pointer, align = f"*{dtype}:16", 8 if dtype == "bf16" else 4
    ptx = ptx_of("scale.scale_kernel", x_ptr=pointer, IN_PLACE=in_place, ALIGN=align)
    accesses = re.findall(r"(?:ld|st)\.global\S*", ptx)
    wide = [access for access in accesses if re.search(r"v4\.b32|b128|v2\.b64", access)]
    vectors = 1 if dtype == "bf16" else 2
    assert len(wide) == 2 * vectors, accesses


@pytest.mark.parametrize(("x", "align", "loads"), [("*bf16:16", 8, 4), ("*fp32:16", 4, 8)])
def test_the_sparse_head_reads_16_bytes_a_load(x: str, align: int, loads: int) -> None:
    """Of vectors whose ends are on 16 bytes, the last columns of them too; nothing waits for other
    warps, but for the logits' sums over the hidden size."""
    wanted = {"ALIGN": align}
    products = inner_loops(ptx_of("sparse_head.pair_logits_kernel", weight_ptr=x, **wanted))
    sums = inner_loops(ptx_of("sparse_head.pair_sums_kernel", x_ptr=x, LANES=1024, **wanted))
    for loop in (max(products, key=len), max(sums, key=len)):
        assert len([y for y in re.findall(r"ld\.global\S*", loop) if re.search(FULL, y)]) == loads
        assert not re.search(r"ld\.global\.(?:b16|v2)", loop)
        assert "bar.sync" not in loop and "shfl" not in loop


@pytest.mark.parametrize("kind", [0, 2], ids=["reverse", "jsd"])
@pytest.mark.parametrize(("x", "align", "each"), [("*bf16:16", 8, 1), ("*fp32:16", 4, 2)])
def test_divergences_move_16_bytes_an_access(x: str, align: int, each: int, kind: int) -> None:
    """Both rows in steps of two vectors a lane, whatever V, and the gradient as wide as they are;
    lanes stay apart until the segment ends."""
    wanted = {"logits_ptr": x, "ALIGN": align, "LANES": 1024, "KIND": kind}
    grad = "divergence_grad.divergence_grad_kernel"
    for name, stores in (("divergence.divergence_kernel", 0), (grad, 2 * each)):
        loops = inner_loops(ptx_of(name, **wanted))
        (loop,) = (y for y in loops if re.search(rf"ld\.global\S*?(?:{FULL})", y))
        loads, written = (re.findall(rf"{way}\.global\S*", loop) for way in ("ld", "st"))
        assert (len(loads), len(written)) == (4 * each, stores)
        assert all(re.search(FULL, access) for access in (*loads, *written))
        assert "bar.sync" not in loop and "shfl" not in loop


@pytest.mark.parametrize(("align", "width"), [(4, r"v2\.b32|b64"), (2, r"\.b32"), (1, r"\.b16")])
def test_logprobs_width_follows_alignment(align: int, width: str) -> None:
    """Rows of an odd V start anywhere: narrower loads of the same lanes, so the same bits."""
    loop = main_loop(
        ptx_of("logprobs.segments_kernel", logits_ptr="*bf16:16", ALIGN=align, LANES=1024, V="i32")
    )
    loads = re.findall(r"ld\.global\S*", loop)
    assert len(loads) == 64 // align
    assert all(re.search(width, load) for load in loads)
