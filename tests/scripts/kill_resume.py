"""Kill-and-resume check: SIGKILL at random moments, resume, compare with an unbroken run.

    PYTHONPATH=tests/helpers python tests/scripts/kill_resume.py --kills 50 --seed 0

Runs are forked from a process that has imported everything. Each is a tiny one that saves at
every update, so that a good part of the kills hits a save. A killed run is resumed and killed
again at other moments until it gets to its end. Compared to the bit: the last checkpoint (weights,
optimiser, random streams, coefficients, place in the prompts, the reward's own state), the saved
model and the samples; and the log but for its times.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

UPDATES = 5
TIMES = ("seconds", "tokens_per_second")


def child(out: Path, resume: bool) -> None:
    """One run in this process, to its end."""
    from loop_seeded import seeded
    from rich.console import Console

    t = seeded(out, updates=UPDATES, save_every=1, keep_checkpoints=2, resume=resume)
    t.run(Console(quiet=True))


def fork(out: Path, resume: bool, kill_after: float | None) -> bool:
    """A run in a child, killed after `kill_after` seconds; whether it came to its end."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            child(out, resume)
            status = 0
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)  # one that has ended waits to be reaped, and feels nothing
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the run in {out} ended with status {status}")
    return status == 0


def warm_up(folder: Path) -> None:
    """Import all that a run does, without a backward: autograd's threads do not survive a fork."""
    import matplotlib.figure  # noqa: F401
    from loop_seeded import seeded
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    seeded(folder / "warm-up")


def where(out: Path) -> str:
    """Stage that the kill hit, judged by the files left."""
    folder = out / "checkpoints"
    if (folder / "partial").exists():
        return "in a save"
    if len(list(folder.glob("update-*"))) > 2:
        return "between a save and the removal of an old one"
    if (out / "model.partial").exists() or (out / "model.former").exists():
        return "while the model was saved"
    return "elsewhere after a save" if any(folder.glob("update-*")) else "before the first save"


def end_of(out: Path) -> dict[str, object]:
    """Everything of a finished run that must not differ."""
    last = out / "checkpoints" / f"update-{UPDATES:06d}"
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    files = [last / "tensors.safetensors", last / "state.json", out / "samples.jsonl"]
    files += sorted(p for p in (out / "model").iterdir())
    ended: dict[str, object] = {str(p.relative_to(out)): p.read_bytes() for p in files}
    return ended | {"log": [{k: v for k, v in r.items() if k not in TIMES} for r in log]}


def check(kills: int, seed: int, root: Path) -> Counter[str]:
    """Spread `kills` over as many runs as it takes; what they hit. Raises at a difference."""
    rng, hit = random.Random(seed), Counter[str]()
    warm_up(root)
    start = time.perf_counter()
    fork(root / "whole", False, None)
    seconds = time.perf_counter() - start
    whole = end_of(root / "whole")
    runs = 0
    while hit.total() < kills:
        out = root / f"run-{runs}"
        ended, resume = False, False
        while not ended:
            left = kills - hit.total()
            ended = fork(out, resume, rng.uniform(0, seconds) if left else None)
            resume = True
            if not ended:
                hit[where(out)] += 1
        different = [k for k, v in end_of(out).items() if v != whole[k]]
        if different or end_of(out).keys() != whole.keys():
            raise RuntimeError(f"run {runs} ended with other {different}")
        shutil.rmtree(out)
        runs += 1
    print(f"{runs} runs of {UPDATES} updates, {seconds:.1f} s each where nothing stops them")
    return hit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        hit = check(args.kills, args.seed, Path(root))
    print(f"{hit.total()} of {args.kills} kills resumed and ended bitwise equal:")
    for place, times in hit.most_common():
        print(f"  {times:3d} {place}")


if __name__ == "__main__":
    main()
