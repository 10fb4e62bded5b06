"""Carried kernels: found where Triton's build is theirs, left out where it is not.

In a process of its own: this one interprets its kernels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_CARRY = """
import json, sys, tarfile
from pathlib import Path
from benchmarks.gpu import fake_driver, kernel_cache
folder = Path(sys.argv[1])
kernel_cache.pack(folder / "kernels.tar.xz", ["whiten"])
cache = folder / "elsewhere"
packed = kernel_cache.unpack(folder / "kernels.tar.xz", cache)
import triton
hits = []
with triton.knobs.cache.scope(), triton.knobs.compilation.scope():
    triton.knobs.cache.dir = str(cache)
    triton.knobs.compilation.listener = lambda **said: hits.append(said["cache_hit"])
    from ppo_fast.testing import FACTORIES, run
    with fake_driver.recording() as record:
        run(FACTORIES["whiten"](), "triton")
    cubins = [
        triton.compile(v.source(), target=fake_driver.TARGET, options=v.options).asm["cubin"]
        for v in record.variants
    ]
identity = kernel_cache.identity
kernel_cache.identity = lambda: identity() | {"key": "0" * 64}
status = kernel_cache.main("unpack", str(folder / "kernels.tar.xz"))
print(json.dumps([packed, hits, len(cubins), min(map(len, cubins)), status]))
"""


def test_kernels_are_carried(tmp_path: Path) -> None:
    """All of them are hits in another folder; a Triton of another key is told and uses none."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", _CARRY, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    *_, refused, said = done.stdout.splitlines()
    assert refused.startswith("kernel cache: not used, they are of Triton ")
    assert "(00000000)" in refused
    packed, hits, found, smallest, status = json.loads(said)
    assert packed == found == len(hits) > 0 and all(hits)
    assert smallest > 1000 and status == 0
