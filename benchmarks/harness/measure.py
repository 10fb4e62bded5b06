"""One measurement of a case: bind, gate, then time every provider in one interleaved run.

It happens in this process; `worker` gives it one of its own where a case needs that.
"""

from __future__ import annotations

import gc
import os
import time as clock
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from benchmarks.harness import cpu_timing, gpu_timing, timing
from benchmarks.harness.gate import Gate
from benchmarks.harness.machine import THREADS
from benchmarks.ops.case import Case
from benchmarks.ops.registry import make_call
from benchmarks.peers import Provider, providers_of
from benchmarks.peers.base import Bound
from ppo_fast.testing import Call

# Called with each provider's name before it runs, so that a crash can be attributed to it.
Announce = Callable[[str], None]


@dataclass
class Outcome:
    """Outcome of one provider: timed ("ok"), or the reason for no time.

    "skipped" is absent here, "red" disagrees with the reference, "error" raised, crashed or hung.
    `graph` says whether a GPU's samples are of a replayed graph; `moved` is a ceiling's bytes.
    """

    status: str
    detail: str = ""
    samples: list[float] = field(default_factory=list)
    peak_mb: float | None = None
    graph: bool | None = None
    moved: int | None = None


def measure(
    case: Case,
    names: Iterable[str],
    *,
    time: bool = True,
    announce: Announce = lambda name: None,
    seconds: float = float("inf"),
) -> dict[str, Outcome]:
    """Gate the named providers of a case and, by default, time them.

    Providers whose turn at the gate has not come after `seconds` are left out, and say so.
    """
    # Beside a GPU the cores only serve the gate.
    torch.set_num_threads((os.cpu_count() or 1) if _on_gpu(case) else THREADS)
    end = clock.monotonic() + seconds
    call = make_call(case)
    gate = Gate(call)
    outcomes: dict[str, Outcome] = {}
    ready: dict[str, Bound] = {}
    for provider in providers_of(case):
        if provider.name not in names:
            continue
        reason = provider.missing()
        if reason is None and clock.monotonic() > end:
            reason = f"not run: the {seconds:g} s of this case were used up"
        if reason is not None:
            outcomes[provider.name] = Outcome("skipped", reason)
            continue
        announce(provider.name)
        outcomes[provider.name], bound = _admit(provider, case, call, gate)
        if bound is not None:
            ready[provider.name] = bound
    del gate
    if time and ready:
        _time(case, ready, outcomes, announce)
    return outcomes


def _admit(provider: Provider, case: Case, call: Call, gate: Gate) -> tuple[Outcome, Bound | None]:
    """Run a provider once (compiling it, if it compiles) and hold its results to the gate."""

    def run() -> Bound:
        own = call if provider.asked is None else provider.asked(case)
        bound = provider.bind(case, own)
        if bound.prepare is not None:
            bound.prepare()
        result = bound.call()
        _synchronize(case)
        if not provider.ceiling:
            held = gate if own is call else Gate(own)
            held.check(bound.named(result), plain=provider.plain, roundings=provider.roundings)
        return bound

    done = _tried(case, run)
    return (done, None) if isinstance(done, Outcome) else (Outcome("ok", moved=done.moved), done)


def _time(
    case: Case, ready: dict[str, Bound], outcomes: dict[str, Outcome], announce: Announce
) -> None:
    """Fill in peak memory and samples of the providers that passed the gate."""
    device: ModuleType = gpu_timing if _on_gpu(case) else cpu_timing
    samplers: dict[str, timing.Sampler] = {}
    for name, bound in ready.items():
        announce(name)

        def prepare(bound: Bound = bound) -> tuple[float | None, timing.Sampler]:
            return device.peak_mb(bound), device.sampler(bound)

        done = _tried(case, prepare)
        if isinstance(done, Outcome):
            outcomes[name] = done
            continue
        outcomes[name].peak_mb, sampler = done
        if isinstance(sampler, gpu_timing.Timed | gpu_timing.TimedSeveral):
            outcomes[name].graph, outcomes[name].detail = sampler.graph, sampler.reason
        samplers[name] = sampler
    announce("")
    for name, samples in timing.interleave(samplers, device.BUDGET).items():
        outcomes[name].samples = samples


def _tried(case: Case, run: Callable[[], Any]) -> Any:
    """Result of `run`, or the outcome that names its failure."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a peer's own
            return run()
    except AssertionError as error:
        failed = Outcome("red", str(error))
    except Exception as error:  # a peer may fail in any way; its row says so, the others go on
        failed = Outcome("error", f"{type(error).__name__}: {error}".splitlines()[0][:200])
    gc.collect()  # the traceback is gone by now: what it held goes too
    _synchronize(case)  # after a fault nothing runs on a GPU any more: this process ends here
    return failed


def _on_gpu(case: Case) -> bool:
    return case.device == "cuda"


def _synchronize(case: Case) -> None:
    if _on_gpu(case):
        torch.cuda.synchronize()
