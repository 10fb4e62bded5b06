"""Hooks of the documentation site: files from all over the repository, formulas as MathML.

mkdocs.yml names this module. Pages have the paths of the repository, so that a link leads to the
same place on the site and in the repository; only where a page is written differs (`places`).
"""

from __future__ import annotations

import html
import re
from importlib import resources
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (
    "*.md",
    "docs/**/*.md",
    "docs/**/*.html",
    "docs/**/*.json",
    "docs/**/*.png",
    "docs/assets/*",
    "examples/*",
    "benchmarks/README.md",
    "benchmarks/plots/*.svg",
    "benchmarks/results/**/*.json",
)
# The README is a page beside docs/index.md, which is the site's first one.
RENAMED = {"README.md": "overview.md", "README.zh-CN.md": "overview.zh-CN.md"}
FONT = "STIXTwoMath-Regular.ttf"
INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
LOADED = re.compile(
    r'<(?:script|img|iframe|link(?! rel="canonical"))\b[^>]*?'
    r'\b(?:src|href)="(?:https?:)?//[^>]*>'
)


def places() -> dict[str, str]:
    """Path in the repository -> path on the site, of every file that the site has."""
    found = sorted({p for source in SOURCES for p in ROOT.glob(source) if p.is_file()})
    paths = [p.relative_to(ROOT).as_posix() for p in found]
    return {path: RENAMED.get(path, path.removeprefix("docs/")) for path in paths}


def slug(text: str, separator: str = "-") -> str:
    """Anchor of a heading, as the repository's web view writes it."""
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", separator)


def mathml(tex: str, display: str = "inline") -> str:
    """A formula as MathML, which browsers render without a script."""
    from latex2mathml.converter import convert

    made = convert(tex, display=display)
    if "\\" in made:  # what it does not know, it passes on
        raise ValueError(f"a formula has a command that cannot be written as MathML: {tex}")
    return made


def on_config(config: Any) -> None:
    """Set what has to be a function."""

    def block(source: str, *_: Any, **__: Any) -> str:
        return f'<div class="formula">{mathml(source.strip(), "block")}</div>'

    fence = {"name": "math", "class": "math", "format": block}
    config.mdx_configs["toc"]["slugify"] = slug
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [fence]}


def on_files(files: Any, config: Any) -> Any:
    """Take the places' files instead of those of docs/, the theme's, and a font for formulas."""
    from mkdocs.structure.files import File, Files

    theme = [file for file in files if file.src_dir != config.docs_dir]
    own = []
    for path, place in places().items():
        written = re.sub(r"README\.md$", "index.md", place)
        written = re.sub(r"\.md$", ".html", written)
        own.append(File(path, str(ROOT), config.site_dir, False, dest_uri=written))
    fonts = resources.files("ziamath.fonts")
    own.append(File(FONT, str(fonts), config.site_dir, False, dest_uri=f"assets/{FONT}"))
    return Files([*theme, *own])


def on_page_content(html_text: str, **_: Any) -> str:
    """Replace inline formulas, which arithmatex found, by MathML."""
    return INLINE.sub(lambda found: mathml(html.unescape(found[1])), html_text)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Name the language of a Chinese page, and refuse a page that loads from the network."""
    loaded = LOADED.search(output)
    if loaded:
        raise ValueError(f"{page.file.src_uri} loads from the network: {loaded[0]}")
    if page.file.src_uri.endswith(".zh-CN.md"):
        output = output.replace('<html lang="en"', '<html lang="zh-CN"', 1)
    return output
