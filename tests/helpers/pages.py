"""Python blocks of the documentation, so that tests run the code that people copy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "README.zh-CN.md", "examples/README.md", "CONTRIBUTING.md", "docs")


class Block(NamedTuple):
    """A fenced block: its page, its text, and what its first line says that it needs."""

    page: str
    code: str
    needs: str


def paths() -> list[Path]:
    """Pages with blocks, the READMEs first."""
    found = (ROOT / name for name in PAGES)
    return [p for x in found for p in (sorted(x.rglob("*.md")) if x.is_dir() else [x])]


def fenced(path: Path, language: str) -> list[str]:
    """Texts of the page's fenced blocks of a language."""
    text = path.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def blocks(path: Path) -> list[Block]:
    """The page's Python blocks; `# needs ...` in the first line is no part of the code."""
    found = []
    for text in fenced(path, "python"):
        needs = re.match(r"# needs (.+)\n", text)
        code = text[needs.end() :] if needs else text
        found.append(Block(str(path.relative_to(ROOT)), code, needs[1] if needs else ""))
    return found


def block(page: str, holding: str) -> str:
    """Code of the one Python block of docs/`page` that holds this text."""
    found = [b.code for b in blocks(ROOT / "docs" / page) if holding in b.code]
    assert len(found) == 1, f"{page}: {len(found)} blocks hold {holding!r}"
    return found[0]
