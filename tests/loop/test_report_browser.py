"""The report in a real headless browser: no error, no request, curves that answer the pointer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import MISSING, Browser, browsing
from report_helpers import HOSTILE, bare, record, write

from ppo_fast.report import charts, write_report

PAGES = sorted((Path(__file__).resolve().parents[2] / "docs" / "tasks").glob("*.html"))

pytestmark = pytest.mark.skipif(
    bool(MISSING),
    reason=f"needs {' and '.join(MISSING)}: apt-get install chromium chromium-driver",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as opened:
        yield opened


def opened(browser: Browser, *folders: Path) -> Path:
    """Open the folders' page, and see that it neither complained nor asked for anything."""
    path = write_report(list(folders))
    browser.open(path)
    assert browser.console() == []
    assert browser.requests() == [path.resolve().as_uri()]
    return path


def count(browser: Browser, selector: str) -> int:
    return int(browser.run(f"return document.querySelectorAll({selector!r}).length"))


def test_curves_are_drawn_and_read_under_the_pointer(browser: Browser, tmp_path: Path) -> None:
    for seed, factor in enumerate((0.1, 0.3)):
        records = [record(u, reward=factor * u) for u in range(11)]
        write(tmp_path / str(seed), records, seed=seed)
    opened(browser, tmp_path / "0", tmp_path / "1")
    assert count(browser, "svg") == count(browser, "path.line") == len(charts.CURVES)
    lengths = browser.run(
        "return [...document.querySelectorAll('path.line')].map(p => p.getTotalLength())"
    )
    assert min(lengths) > 300  # of the 356 units between the axes
    browser.run("document.querySelector('figure').scrollIntoView()")
    box = browser.run(
        "const r = document.querySelector('svg').getBoundingClientRect();"
        "return [r.left, r.top, r.width, r.height]"
    )
    x = (charts.LEFT + 0.5 * (charts.WIDTH - charts.LEFT - charts.RIGHT)) / charts.WIDTH
    browser.point_at(round(box[0] + x * box[2]), round(box[1] + 0.5 * box[3]))
    shown = browser.run("return document.querySelector('output').innerText.split('\\n')")
    assert shown == ["update 5", "1.00 (0.500 to 1.50)"]
    browser.point_at(1, 1)
    assert browser.run("return document.querySelector('output').hidden") is True
    assert browser.console() == [] and browser.requests() == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_pages_of_the_docs_open(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.console() == [] and browser.requests() == [page.as_uri()]
    assert count(browser, "path.line") >= len(charts.CURVES) - 1  # the last needs 20 updates


def test_hostile_samples_run_nothing(browser: Browser, tmp_path: Path) -> None:
    sample = {"update": 0, "prompt": HOSTILE, "completion": HOSTILE, "fault": HOSTILE}
    opened(browser, write(tmp_path / "a", [record(0)], [sample], model=HOSTILE))
    assert browser.run("return window.hit === undefined") is True
    assert count(browser, "img") == 0 and count(browser, "blockquote") == 1


@pytest.mark.parametrize("records", [[record(0)], [bare(0), bare(1)]])
def test_runs_with_little_to_draw(browser: Browser, tmp_path: Path, records: list[dict]) -> None:
    opened(browser, write(tmp_path / "a", records))
    numbers = sum(records[0].get(key) is not None for key, *_ in charts.CURVES)
    assert count(browser, "svg") == numbers
    assert count(browser, "circle") == (numbers if len(records) == 1 else 0)


def test_it_fits_a_phone_and_follows_the_dark(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", [record(u) for u in range(5)])
    with browsing((500, 900), dark=True) as phone:
        opened(phone, folder)
        wide = "return document.documentElement.scrollWidth - window.innerWidth"
        assert phone.run(wide) <= 0
        style = "return getComputedStyle(document.body).backgroundColor"
        assert phone.run(style) == "rgb(20, 23, 27)"


def test_a_script_that_is_not_the_pages_own_is_refused(browser: Browser, tmp_path: Path) -> None:
    """The console reports what the policy stops, on which the other tests rely."""
    opened(browser, write(tmp_path / "a", [record(0)]))
    browser.run(
        "const s = document.createElement('script'); s.textContent = 'window.hit = 1';"
        "document.body.append(s); new Image().src = 'http://127.0.0.1:9/x.png'"
    )
    assert browser.run("return window.hit === undefined") is True
    refused = " ".join(browser.console())
    assert "script-src" in refused and "img-src" in refused
