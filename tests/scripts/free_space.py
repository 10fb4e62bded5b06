"""Check of a disk's free space before something large is written.

    python tests/scripts/free_space.py GIB PATH [GIB PATH ...]

Says where there is less than GIB, how much there is, and exits with 1.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path


def shortage(gib: float, path: Path) -> str:
    """Shortage of the disk of `path`, which need not exist yet; "" for none."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 2**30
    if free >= gib:
        return ""
    return f"too little disk space for {path}: {free:.1f} GiB are free, {gib:g} GiB are wanted"


def main(arguments: list[str]) -> int:
    """Look at each pair of an amount and a place."""
    pairs = zip(arguments[::2], arguments[1::2], strict=True)
    found = [said for gib, path in pairs if (said := shortage(float(gib), Path(path)))]
    for said in found:
        print(said, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
