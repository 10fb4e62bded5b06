"""Ahead-of-time compilation of the Triton kernels for absent GPUs.

    python tests/aot [--long] [--stem logprobs ...] [--target sm_90 ...] [--jobs 2] [--report]

It runs without TRITON_INTERPRET, in `--jobs` processes, or in this one for 1. One JSON line per
compilation on stdout; the exit status is 1 if any failed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from typing import Any

from aot import ROOT, TARGETS, Case, compile_case, pairs, product, registry


def jobs_of(options: argparse.Namespace) -> list[tuple[str, Case, str]]:
    """The compilations asked for, kernels and targets interleaved so that workers share evenly."""
    jobs = []
    for name, entry in registry(options.stem).items():
        cases = product(entry)
        for case in cases if options.long else pairs(cases):
            jobs += [(name, case, target) for target in options.target]
    return jobs


def compilations(jobs: list[tuple[str, Case, str]], processes: int) -> Iterator[dict[str, Any]]:
    """The results, computed here or in so many processes of their own."""
    if processes == 1:
        yield from map(compile_case, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield from pool.map(compile_case, jobs, chunksize=1)


def report(results: list[dict[str, Any]]) -> None:
    """The worst of every kernel and target, on stderr."""
    key = lambda r: (r["kernel"], r["target"])  # noqa: E731
    for (name, target), group in itertools.groupby(sorted(results, key=key), key=key):
        rows = list(group)
        good = [r for r in rows if "error" not in r]
        kinds = ("registers", "spilled", "shared")
        worst = {k: max((r[k] for r in good), default=0) for k in kinds}
        spent = sum(r["seconds"] for r in rows)
        text = " ".join(f"{k} {v}" for k, v in worst.items())
        print(
            f"{name:36} {target:7} {len(good)}/{len(rows)} {text} {spent:.1f} s", file=sys.stderr
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--long", action="store_true", help="the whole product, not pairs")
    parser.add_argument("--stem", nargs="*", default=[], help="files of kernels/; all by default")
    parser.add_argument("--target", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="resources per kernel, to stderr")
    options = parser.parse_args()
    jobs = jobs_of(options)
    results = []
    for result in compilations(jobs, options.jobs):
        results.append(result)
        print(json.dumps(result), flush=True)
    if options.report:
        report(results)
    return int(any("error" in r for r in results))


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
