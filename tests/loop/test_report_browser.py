"""The report in a real headless browser: no error, no request, curves that answer the pointer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import MISSING, Browser, browsing
from report_helpers import HOSTILE, bare, record, write

from ppo_fast.report import charts, write_report

USUAL = [plotted for plotted in charts.CURVES if plotted.when == "usual"]
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
    assert count(browser, "svg") == len(USUAL) and count(browser, "path.line") == len(USUAL)
    lengths = browser.run(
        "return [...document.querySelectorAll('path.line')].map(p => p.getTotalLength())"
    )
    assert min(lengths) > 300  # of the 316 units between the axes
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
    assert count(browser, "path.line") == count(browser, "svg") >= len(USUAL) - 1


def test_hostile_samples_run_nothing(browser: Browser, tmp_path: Path) -> None:
    sample = {"update": 0, "prompt": HOSTILE, "completion": HOSTILE, "fault": HOSTILE}
    samples = [sample | {"update": u} for u in range(3)]
    opened(browser, write(tmp_path / "a", [record(0), record(1)], samples, model=HOSTILE))
    browser.run("document.querySelector('button[value=next]').click()")
    assert browser.run("return window.hit === undefined") is True
    assert count(browser, "img") == 0 and count(browser, "blockquote") == 2
    begins = "b => b.textContent.startsWith('</script><script>')"
    begun = browser.run(f"return [...document.querySelectorAll('bdi')].map({begins})")
    assert begun == [True] * 4


def test_samples_are_paged_through(browser: Browser, tmp_path: Path) -> None:
    for s in range(2):
        samples = [
            {"update": u, "prompt": "p", "completion": f"of {s} at {u}", "reward": u / 100}
            if u != 13
            else {"update": u, "prompt": "p", "completion": "", "fault": "late"}
            for u in range(40)
        ]
        write(tmp_path / str(s), [record(u) for u in range(40)], samples, seed=s)
    opened(browser, tmp_path / "0", tmp_path / "1")
    shown = (
        "return [...document.querySelectorAll('.pane')].filter(p => p.checkVisibility())"
        ".map(p => [...p.querySelectorAll('h4 span, .verdict, .completion bdi')]"
        ".map(e => e.textContent))"
    )
    assert browser.run(shown) == [["0", "+0.000", "of 0 at 0"], ["39", "+0.390", "of 0 at 39"]]
    press = "document.querySelectorAll('button[value={}]')[{}].click()"
    steps = [("next", 0, "1"), ("next", 0, "2"), ("previous", 0, "1"), ("last", 0, "39")]
    for button, pane, at in [*steps, ("next", 0, "39"), ("first", 0, "0"), ("previous", 0, "0")]:
        browser.run(press.format(button, pane))
        assert browser.run(shown)[0][0] == at and browser.run(shown)[1][0] == "39"
    browser.run("document.querySelector('input[type=range]').focus()")
    for key, at in (("\ue014", "1"), ("\ue010", "39"), ("\ue011", "0")):  # right, end, home
        browser.press(key)
        assert browser.run(shown)[0][0] == at
    browser.run(
        "const s = document.querySelector('input[type=range]');"
        "s.value = 13; s.dispatchEvent(new Event('input'))"
    )
    assert browser.run(shown)[0] == ["13", "late", ""]
    assert count(browser, ".verdict.warn") == 1
    browser.run(
        "const s = document.querySelector('select');"
        "s.selectedIndex = 1; s.dispatchEvent(new Event('change'))"
    )
    assert browser.run(shown) == [["0", "+0.000", "of 1 at 0"], ["39", "+0.390", "of 1 at 39"]]
    assert browser.console() == [] and browser.requests() == []


def test_the_first_and_last_samples_need_no_script(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", [record(u) for u in range(5)])
    with browsing(scripts=False) as plain:
        plain.open(write_report([folder]))
        seen = "return [...document.querySelectorAll('.prompt bdi')].map(b => b.innerText)"
        assert plain.run(seen) == ["prompt 0", "prompt 4"]
        assert plain.run("return document.querySelector('.pager').checkVisibility()") is False


@pytest.mark.parametrize("records", [[record(0)], [bare(0), bare(1)]])
def test_runs_with_little_to_draw(browser: Browser, tmp_path: Path, records: list[dict]) -> None:
    opened(browser, write(tmp_path / "a", records))
    numbers = sum(records[0].get(plotted.key) is not None for plotted in charts.CURVES)
    assert count(browser, "svg") == numbers
    assert count(browser, "circle") == (numbers if len(records) == 1 else 0)


def test_it_fits_a_phone_and_follows_the_dark(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", [record(u) for u in range(5)])
    with browsing((500, 900), dark=True) as phone:
        opened(phone, folder)
        phone.width(400)
        heights = "return [...document.querySelectorAll('svg text')].map(t =>"
        # In pixels of the screen, also where it is turned.
        heights += " t.getBBox().height * Math.hypot(t.getScreenCTM().a, t.getScreenCTM().b))"
        assert min(phone.run(heights)) > 13
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
