"""The Python of a documentation page, so that tests run what people copy."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def block(page: str, holding: str) -> str:
    """The one Python block of docs/`page` that holds this text."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = [b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if holding in b]
    assert len(found) == 1, f"{page}: {len(found)} blocks hold {holding!r}"
    return found[0]
