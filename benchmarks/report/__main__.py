"""Pages made from committed results, and the differences between two results files.

    python -m benchmarks.report                          write the pages and their plots
    python -m benchmarks.report --check                  exit 1 if the pages are not those
    python -m benchmarks.report --compare a.json b.json  ratios of medians

The pages are benchmarks/README.md and the text between the markers of README.md and
README.zh-CN.md, made from the newest file of each machine in benchmarks/results, and in its folder
`trainers`, and from benchmarks/gpu/predictions.json.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from benchmarks.harness.machine import slug
from benchmarks.report import pages, plots, readme
from benchmarks.report.diff import diff
from benchmarks.report.results import load, write_whole

ROOT = Path(__file__).resolve().parents[2]
FRONTS = {"README.md": readme.ENGLISH, "README.zh-CN.md": readme.CHINESE}
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def newest(folder: Path) -> pages.Files:
    """The latest file of each machine, machines in the order of their names."""
    latest: dict[str, Path] = {}
    for path in sorted(folder.glob("*.json")):
        found = re.fullmatch(r"(.+)-\d{4}-\d{2}-\d{2}", path.stem)
        if found is None:
            raise ValueError(
                f"{path}: a results file is named <machine>-<year>-<month>-<day>.json"
            )
        latest[found[1]] = path
    return {path: load(path) for path in latest.values()}


def between_markers(text: str, inner: str) -> str:
    """The text with the part between its markers replaced."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"a README needs the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{inner}\n{END}{after}"


def generated(root: Path) -> dict[Path, str]:
    """Each page's path and the text that it should have."""
    files = newest(root / "benchmarks/results")
    beside = newest(root / "benchmarks/results/trainers")
    predictions = root / "benchmarks/gpu/predictions.json"
    expected = json.loads(predictions.read_text()) if predictions.exists() else []
    fronts = {root / name: words for name, words in FRONTS.items()}
    return {root / "benchmarks/README.md": pages.page(files, beside, expected)} | {
        path: between_markers(path.read_text(), readme.section(files, words, beside))
        for path, words in fronts.items()
    }


def stale(root: Path) -> list[Path]:
    """Pages that differ from the results, and plots that are missing or belong to none."""
    folder = root / "benchmarks/plots"
    names = {folder / f"{plot.name}.svg" for plot in _plots(root)}
    differing = [
        p for p, text in generated(root).items() if not p.exists() or p.read_text() != text
    ]
    return differing + sorted(names ^ set(folder.glob("*.svg")))


def _plots(root: Path) -> list[plots.Plot]:
    return [
        plot
        for results in newest(root / "benchmarks/results").values()
        for plot in plots.planned(results.rows, slug(results.runs[0]))
    ]


def write(root: Path) -> None:
    """Write the pages and draw the plots, and remove plots that no page shows."""
    folder = root / "benchmarks/plots"
    folder.mkdir(exist_ok=True)
    drawn = {folder / f"{plot.name}.svg": plots.draw(plot) for plot in _plots(root)}
    for path, text in (generated(root) | drawn).items():
        write_whole(path, text)
    for path in set(folder.glob("*.svg")) - set(drawn):
        path.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--check", action="store_true", help="exit 1 if a page is out of date")
    choice.add_argument("--compare", nargs=2, type=Path, metavar="JSON", help="ratios of medians")
    options = parser.parse_args()
    if options.compare:
        try:
            before, after = map(load, options.compare)
        except ValueError as error:  # another format, or no results at all
            parser.error(str(error))
        print("\n".join(diff(before, after)))
        return 0
    if options.check:
        old = stale(ROOT)
        for path in old:
            print(f"{path.relative_to(ROOT)} is out of date: python -m benchmarks.report")
        return 1 if old else 0
    write(ROOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
