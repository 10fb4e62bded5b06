"""Writer of docs/trust.md: every case of the contract, its bound, and the tests marked with it.

python docs/make_trust.py            write the page
python docs/make_trust.py --check    exit 1 if the page is out of date

A test takes part by `@pytest.mark.case("N1")`; its words and its bound are written here, once.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/trust.md"

INTRO = """\
# The cases, their bounds and their tests

Written by `python docs/make_trust.py` from its table of cases and from the marks of the tests
(`@pytest.mark.case("N1")`). N is accuracy, X extreme input, L size, D determinism, I integration,
P performance, R the loop's reliability. A test marked *gpu* needs a GPU, where
`benchmarks/gpu/run.sh` runs it. The other tests run their Triton and CUDA cases on a GPU if there
is one, elsewhere interpreted or emulated. *long*: only `make test-long` runs it.
"""

CASES = {
    "N1": "advantages over 1 to 4,096 steps",
    "N2": "advantages of 16 × 16k, 2 × 128k, 1 × 1M steps",
    "N3": "advantages from bf16 and fp16 inputs",
    "N4": "advantages from integers, to 2^19 steps",
    "N5": "λ = 1 is the return less the value, λ = 0 the TD error",
    "N6": "V-trace: ρ = c = 1 is GAE; otherwise rlax's formula",
    "N7": "V-trace across a truncation, computed by hand",
    "N8": "flags at an episode's end, or at the start of the next one",
    "N9": "truncation differs from termination",
    "N10": "log-probabilities of 12 vocabularies to 262,145, logits of scale 1, 10 and 100",
    "N11": "logits shifted by 1,000: finite, never positive",
    "N12": "entropy of uniform and one-hot rows",
    "N13": "policy loss inside and outside the clips",
    "N14": "gradients",
    "N15": "at the clip's edge, the gradient of min and clamp",
    "N16": "whitening of 2 to 10^7 values around 10^4",
    "N17": "k1, k2 and k3 for log-ratios in ±30; k3 never negative",
    "N18": "weights and rejections of another policy's samples: every level, form and statistic",
    "N19": "the same beside the code of verl and TRL",
    "X1": "one NaN reward: NaN in its episode's past alone",
    "X2": "NaN and ±inf in every masked slot: equal bits, gradients exactly 0",
    "X3": "garbage behind a terminal step",
    "X4": "forbidden tokens with logits of −inf",
    "X5": "a row of −inf; a label at −inf",
    "X6": "a NaN or +inf logit",
    "X7": "labels out of range, to 2^40, and ignored ones: a NaN row, no counter on the device",
    "X8": "a dimension of size 0",
    "X9": "one step",
    "X10": "a batch with no token, or one",
    "X11": "one empty row leaves the others unchanged",
    "X12": "log-ratios of ±89, ±10^4, ±inf",
    "X13": "dtypes and devices: as documented, or an error that names the argument",
    "X14": "constants that require a gradient get none, and there is no `strict`",
    "X15": "transposed, sliced, expanded, misaligned: equal, and not a byte copied",
    "X16": "inputs are not written; a second backward gives the same",
    "X17": "double backward raises",
    "X18": "a NaN in any argument of a loss: in its value and its own slope",
    "X19": "a NaN or infinite score: its group, or all that is whitened with it",
    "X20": "e^200 times an advantage of 0 is 0",
    "X21": "fp16 gradients 2^30 below 1, with a loss scale of 2^30",
    "X22": "forward-mode tangents: right, or refused by name",
    "X23": "tensors made in inference mode",
    "L1": "more than 2^31 logits",
    "L2": "more than 2^31 elements of the other ops (dense steps of that number: not run)",
    "L3": "more rows than a grid's second dimension holds",
    "L4": "a million steps in a row (their time is a row of the benchmarks)",
    "D1": "run to run; 250 times on a GPU",
    "D2": "rows whatever else is in the batch",
    "D3": "rows however far padded",
    "D4": "padded or packed, in any order",
    "D5": "time-major against batch-major",
    "D6": "another process, two at once, nothing compiled before",
    "D7": "backends against the reference",
    "D8": "kernels for sm_80 and sm_90, emulated; other GPUs: no bits are promised",
    "I1": "opcheck of every overload",
    "I2": "torch.compile: whole graph, shapes that change",
    "I3": "CUDA graphs",
    "I4": "CUDA streams",
    "I5": "several threads at once",
    "I6": "two GPUs in a process",
    "I7": "allocations: outputs and workspace to the byte, nothing kept",
    "I8": "autocast",
    "I9": "several ranks",
    "I10": "checkpointed activations",
    "I11": "pickle, copies, export, forked and spawned workers",
    "I12": "no GPU, no Triton",
    "I13": 'compute-sanitizer, on a GPU by `STEPS="build sanitize" benchmarks/gpu/run.sh`',
    "I14": "poisoned memory in every test of a backend; canaries",
    "I15": "a tiny model for 32 steps, 3 seeds, against the reference",
    "P1": "speed",
    "R1": "a run killed and resumed",
    "R2": "damaged checkpoints",
    "R3": "rewards of NaN, None, inf: one, a group, all",
    "R4": "a reward that raises, hangs, or has a wrong length",
    "R5": "empty generations",
    "R6": "out of memory: micro-batches halved once, then a stop",
    "R7": "a gradient that is not finite: skipped on every rank, three in a row stop",
    "R8": "a rank that dies, fails or hangs",
    "R9": "a minibatch of one token",
    "R10": "10,000 updates with faults",
    "R11": "stale or foreign log-probabilities",
}

# Bounds that are neither equality nor said by the case itself.
BOUNDS = {
    "N1": "2e-6 of the largest, twice the sequential loop's error",
    "N2": "5e-6 of the largest, twice the sequential loop's error",
    "N3": "2^-8 of the value",
    "N6": "2e-6 of the largest",
    "N10": "1e-5 from fp32, 2e-5 from bf16, relative to max(1, abs log p)",
    "N11": "2e-4",
    "N13": "1e-6",
    "N14": "gradcheck in fp64, with no tolerance between runs; bf16: twice eager's error + 1e-5",
    "N16": "1e-5",
    "N17": "1e-6",
    "N18": "8 roundings, and n in double over n tokens; masks equal beyond that of their bound",
    "N19": "the roundings of both sides; the 1e-8 that verl adds to a number of tokens",
    "D5": "2 ulp",
    "D7": "the derived budget",
    "I15": "loss and each tensor's largest weight: 1e-5; bf16, from the reference's weights: 1e-2",
}

# Cases that no test is marked with, and the reason.
WITHOUT_TEST = {
    "L3": "every grid has one dimension, and L1's 14,200 rows × segments pass 65,535 programs",
    "I6": "no machine with two GPUs was to be had; launches take their tensors' device",
    "P1": "`make bench` measures it, and checks every result before it is timed",
}


class Test(NamedTuple):
    """A marked test: its name as `file::function`, its cases, and the words beside it."""

    name: str
    cases: tuple[str, ...]
    notes: tuple[str, ...]


def marked(folder: Path) -> list[Test]:
    """Every test of the folder that has a case mark, in the order of files and lines."""
    paths = sorted(folder.rglob("test_*.py"), key=lambda p: p.name)
    return [test for path in paths for test in _of_file(path)]


def _of_file(path: Path) -> Iterator[Test]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    above = [
        mark
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
        for mark in _marks([node.value, *getattr(node.value, "elts", [])])
    ]
    for name, node in _functions(tree):
        marks = [*above, *_marks(node.decorator_list)]
        cases = tuple(arg for kind, args in marks if kind == "case" for arg in args)
        if cases:
            kinds = [kind for kind, _ in marks]
            notes = tuple(note for note in ("gpu", "long") if note in kinds)
            yield Test(f"{path.name}::{name}", cases, notes)


def _functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        if isinstance(node, ast.ClassDef):
            inner = (x for x in node.body if isinstance(x, ast.FunctionDef))
            yield from ((f"{node.name}::{x.name}", x) for x in inner)


def _marks(nodes: list[ast.expr]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Name and text arguments of each `pytest.mark.<name>` among the expressions."""
    for node in nodes:
        call = node.func if isinstance(node, ast.Call) else node
        args = node.args if isinstance(node, ast.Call) else []
        if found := re.fullmatch(r"pytest\.mark\.(\w+)", ast.unparse(call)):
            yield found[1], tuple(ast.literal_eval(x) for x in args if _is_text(x))


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def page(tests: list[Test]) -> str:
    """Text of docs/trust.md."""
    lines = [INTRO, "| id | case | bound | tests |", "|---|---|---|---|"]
    for case, words in CASES.items():
        names = [_cell(test) for test in tests if case in test.cases]
        if not names:
            names = [f"none: {WITHOUT_TEST[case]}"]
        lines.append(f"| {case} | {words} | {BOUNDS.get(case, '-')} | {' '.join(names)} |")
    return "\n".join(lines) + "\n"


def _cell(test: Test) -> str:
    return " ".join([*(f"*{note}*" for note in test.notes), f"`{test.name}`"])


def main() -> int:
    """Command line."""
    text = page(marked(ROOT / "tests"))
    if "--check" in sys.argv[1:]:
        if PAGE.read_text(encoding="utf-8") == text:
            return 0
        print("docs/trust.md is out of date: python docs/make_trust.py")
        return 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
