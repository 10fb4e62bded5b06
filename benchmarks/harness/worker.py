"""Measurement of a case in a process of its own, so that a crash or hang costs one provider.

A fault on a GPU ends every later call of its process, a kernel may never return, and some
settings are read only when a process starts. The process lives on from case to case, since
starting one takes seconds; after a failure the next case gets a fresh one.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.harness import gpu_timing
from benchmarks.harness.machine import ROOT
from benchmarks.harness.measure import Outcome, measure
from benchmarks.ops.case import Case

Environment = tuple[tuple[str, str], ...]
# Time budget of a case in seconds; also the longest that a provider may run without reporting.
LIMIT = 120.0


class BrokenError(RuntimeError):
    """The process died or fell silent; `provider` was at work, or "" where all were."""

    def __init__(self, provider: str, reason: str) -> None:
        super().__init__(reason)
        self.provider = provider


class Child:
    """A process that answers requests, lines of JSON on its stdin, with lines on its stdout."""

    def __init__(self, command: Sequence[str], env: Environment) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (stop closes it)
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **dict(env)},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def send(self, request: dict[str, Any]) -> None:
        """Hand over a request."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died: `receive` says so
            print(json.dumps(request), file=self._process.stdin, flush=True)

    def receive(self, silence: float, at_work: str = "") -> dict[str, Any]:
        """The next answer; raises BrokenError, which names what was at work."""
        try:
            line = self._lines.get(timeout=silence)
        except queue.Empty:
            raise BrokenError(at_work, f"hung: no sign of life for {silence:g} s") from None
        if not line:
            raise BrokenError(at_work, f"crashed: {self._last_words()}")
        message: dict[str, Any] = json.loads(line)
        return message

    def _last_words(self) -> str:
        """The exit status, and the last line on stderr."""
        status = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().strip().splitlines()
        return f"exit status {status}" + (f", {said[-1][:200]}" if said else "")

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._errors.close()


class Worker(Child):
    """A process that measures one case at a time."""

    def __init__(self, env: Environment) -> None:
        super().__init__([sys.executable, "-m", "benchmarks.harness.worker"], env)

    def ask(self, request: dict[str, Any], silence: float) -> dict[str, Outcome]:
        """The outcomes of a request; raises BrokenError."""
        self.send(request)
        at_work = ""
        while True:
            message = self.receive(silence, at_work)
            if "at_work" not in message:
                return {name: Outcome(**fields) for name, fields in message.items()}
            at_work = message["at_work"]


class Workers:
    """The processes of a run, one for each environment that its cases need."""

    def __init__(self) -> None:
        self._alive: dict[Environment, Worker] = {}

    def measure(
        self, case: Case, names: list[str], *, time: bool = True, limit: float = LIMIT
    ) -> dict[str, Outcome]:
        """Measure a case where it must be: in this process unless it asks for another."""
        if not case.missing_env and case.device == "cpu":
            return measure(case, names, time=time)
        left, broken = list(names), {}
        while left:
            worker = self._alive.get(case.env) or Worker(case.env)
            self._alive[case.env] = worker
            request = {"case": case.to_json(), "names": left, "time": time, "seconds": limit}
            try:
                outcomes = worker.ask(request, limit)
            except BrokenError as error:
                self._stop(case.env)
                lost = [error.provider] if error.provider else left
                broken |= {name: Outcome("error", str(error)) for name in lost}
                left = [name for name in left if name not in lost]
                continue
            # What failed, an aborted capture too, may have left the process in any state.
            if any(o.detail and o.status in ("ok", "error") for o in outcomes.values()):
                self._stop(case.env)
            return outcomes | broken
        return broken

    def _stop(self, env: Environment) -> None:
        self._alive.pop(env).stop()

    def close(self) -> None:
        """End every process."""
        for env in list(self._alive):
            self._stop(env)


def requests() -> Iterator[dict[str, Any]]:
    """Requests that the parent of this process sends."""
    for line in sys.stdin:
        yield json.loads(line)


def answering() -> Callable[[dict[str, Any]], None]:
    """A function that answers the parent; all else that is printed goes to stderr from now on."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a peer prints is no answer

    def say(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    return say


def main() -> None:
    """Answer each request on stdin: providers as they are at work, then the outcomes."""
    say = answering()
    for request in requests():
        case = Case.from_json(request["case"])
        outcomes = measure(
            case,
            request["names"],
            time=request["time"],
            seconds=request["seconds"],
            announce=lambda name: say({"at_work": name}),
        )
        if case.device == "cuda":
            gpu_timing.free()
        say({name: asdict(outcome) for name, outcome in outcomes.items()})


if __name__ == "__main__":
    main()
