"""Tests of the documentation site without its generator: map, links, formulas, languages."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pages
import pytest
import site_hooks
import yaml
from browser import MISSING, browsing

ROOT = pages.ROOT
PLACES = site_hooks.places()
PAGES = [path for path in PLACES if path.endswith(".md")]
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
QUICK_STARTS = sorted((ROOT / "docs/quickstart").glob("*.zh-CN.md"))
FENCE = re.compile(r"^(?:```\w*\n.*?^```$)", re.DOTALL | re.MULTILINE)
FORMULA = re.compile(r"\$([^$\n]+)\$")


def prose(path: str) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", (ROOT / path).read_text(encoding="utf-8"))


def formulas(path: str) -> list[str]:
    """Inline formulas of a page; code is none."""
    return FORMULA.findall(re.sub(r"`[^`]*`", "", prose(path)))


def anchors(path: str) -> set[str]:
    """Anchors of a page's headings."""
    return {site_hooks.slug(title) for title in re.findall(r"^#+ (.+)$", prose(path), re.M)}


def mapped(entry: object) -> list[str]:
    """Pages below an entry of the map."""
    if isinstance(entry, str):
        return [entry]
    below = entry if isinstance(entry, list) else list(entry.values())
    return [page for one in below for page in mapped(one)]


def test_every_page_is_in_the_site_s_navigation_once() -> None:
    assert sorted(mapped(CONFIG["nav"])) == sorted(PAGES)
    assert len(set(PLACES.values())) == len(PLACES)


@pytest.mark.parametrize("path", PAGES)
def test_links_lead_to_a_file_and_an_anchor_of_the_site(path: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(path))):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        there = os.path.normpath(Path(path).parent / name) if name else path
        assert there in PLACES, f"{path}: {target}"
        assert not anchor or anchor in anchors(there), f"{path}: {target}"


def test_anchors_are_those_of_the_repository_s_web_view() -> None:
    assert site_hooks.slug("What `--it` says: 3 × 4, a_b?") == "what---it-says-3--4-a_b"
    assert site_hooks.slug("安装") == "安装"


@pytest.mark.parametrize("path", PAGES)
def test_both_dialects_of_markdown_read_a_page_alike(path: str) -> None:
    """The site's needs a blank line before a list, and keeps a backslash in a table's code."""
    lines = ["", *prose(path).splitlines()]
    for before, line in itertools.pairwise(lines):
        text = before.strip() and not re.match(r"\s*([-*|#<]|\d+\.)|\s{2,}", before)
        assert not (re.match(r"(- |\d+\. )", line) and text), f"{path}: {before}\n{line}"
        if line.startswith("|"):
            assert not any("\\|" in code for code in re.findall(r"`[^`]*`", line)), line


@pytest.mark.parametrize("path", PAGES)
def test_inline_formulas_survive_the_repository_s_web_view(path: str) -> None:
    """Markdown takes a backslash before punctuation and a table's bar before formulas."""
    for tex in formulas(path):
        assert not re.search(r"\\[^a-zA-Z]|[|<*]|\\operatorname|^\s|\s$", tex), f"{path}: {tex}"


def test_the_formulas_pages_have_formulas() -> None:
    for name in ("losses", "corrections", "divergences", "advantages"):
        assert len(formulas(f"docs/{name}.md")) >= 5, name


def test_a_page_that_loads_from_the_network_is_refused() -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="docs/a.zh-CN.md"))
    for bad in (
        '<script src="https://cdn.example/x.js">',
        '<link rel="stylesheet" href="//fonts.example/x.css">',
        '<img alt="" src="http://example/x.png">',
    ):
        with pytest.raises(ValueError, match=r"docs/a\.zh-CN\.md loads from the network"):
            site_hooks.on_post_page(bad, page)
    fine = '<html lang="en"><a href="https://arxiv.org"><script src="assets/x.js">'
    assert site_hooks.on_post_page(fine, page) == fine.replace('"en"', '"zh-CN"')


@pytest.mark.parametrize("path", QUICK_STARTS, ids=lambda path: path.name)
def test_both_quick_starts_say_the_same(path: Path) -> None:
    """The same blocks, figures, code and links; a link's anchor is of its page's language."""
    english = path.with_name(path.name.replace(".zh-CN", ""))
    a, b = (p.read_text(encoding="utf-8") for p in (english, path))
    assert FENCE.findall(a) == FENCE.findall(b) != []
    assert f"]({path.name})" in a and f"]({english.name})" in b
    a, b = (re.sub(r"^.*English.*\|.*$", "", FENCE.sub("", t), flags=re.M) for t in (a, b))
    for kind in (r"\d+(?:[.,]\d+)*", r"`[^`]+`", r"\]\(([^)#]+)", r"^#+ ", r"^[-|] "):
        found = [sorted(re.findall(kind, t.replace(".zh-CN", ""), re.M)) for t in (a, b)]
        assert found[0] == found[1], kind


def test_the_loop_s_quick_start_runs(tmp_path: Path) -> None:
    (commands,) = pages.fenced(ROOT / "docs/quickstart/loop.md", "bash")
    for command in commands.splitlines():
        name, *arguments = command.split()
        assert name == "ppo-fast"
        done = subprocess.run(
            [sys.executable, "-m", "ppo_fast", *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert len((tmp_path / "runs/first/log.jsonl").read_text().splitlines()) >= 10
    assert (tmp_path / "runs/first/report.html").is_file()


def test_ci_installs_what_the_docs_extra_names() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extra = re.search(r"^docs = (\[.*\])$", text, re.M)
    assert extra
    ci = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    assert f"pip install {' '.join(json.loads(extra[1]))}\n" in ci
    assert "mkdocs build --strict" in ci


@pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}: apt-get install")
def test_a_worker_answers_on_a_page_read_from_disk(tmp_path: Path) -> None:
    """The site's search runs in one."""
    shim = (ROOT / "docs/assets/iframe-worker.js").read_text(encoding="utf-8")
    (tmp_path / "shim.js").write_text(shim)
    (tmp_path / "twice.js").write_text("addEventListener('message', e => postMessage(2 * e.data))")
    (tmp_path / "page.html").write_text(
        "<html><head><script src=shim.js></script></head><body><script>"
        "const worker = new Worker(new URL('twice.js', location.href));"
        "window.answer = new Promise("
        "done => worker.addEventListener('message', e => done(e.data)));"
        "worker.postMessage(21)</script></body></html>"
    )
    with browsing() as browser:
        browser.open(tmp_path / "page.html")
        assert browser.run("return window.answer") == 42
        assert browser.console() == []
