"""Writer of docs/api.md: every public name, its signature and its docstring.

python docs/make_api.py            write the page
python docs/make_api.py --check    exit 1 if the page is out of date
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/api.md"
MODULES = (
    "ppo_fast",
    "ppo_fast.surrogates",
    "ppo_fast.compat",
    "ppo_fast.integrations",
    "ppo_fast.loop",
    "ppo_fast.report",
    "ppo_fast.testing",
)
INTRO = """\
# API

Written by `python docs/make_api.py` from the docstrings. Shapes: B sequences of T tokens or steps,
N tokens in all, S packed sequences, V words of the vocabulary, H hidden size. `...` stands for any
leading dimensions.
"""


def page() -> str:
    """Text of docs/api.md."""
    lines = [INTRO]
    for name in MODULES:
        module = importlib.import_module(name)
        lines += [f"## {name}", "", _prose(inspect.getdoc(module) or ""), ""]
        for member in sorted(public(module), key=lambda member: member[0].isupper()):
            if not isinstance(getattr(module, member), ModuleType):
                lines += _member(member, getattr(module, member))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def public(module: ModuleType) -> list[str]:
    """Names of `__all__`; without one, the functions and classes that the module defines."""
    names = getattr(module, "__all__", None)
    if names is not None:
        return list(names)
    own = (n for n, x in vars(module).items() if getattr(x, "__module__", "") == module.__name__)
    return [name for name in own if not name.startswith("_")]


def _member(name: str, value: Any) -> Iterator[str]:
    yield from (f"### `{name}`", "")
    if not callable(value):
        yield from (f"`{type(value).__name__}`", "")
        return
    if not (inspect.isclass(value) and issubclass(value, Exception)):
        yield from ("```", _signature(name, value), "```", "")
    yield from (_prose(inspect.getdoc(value) or ""), "")
    if inspect.isclass(value):
        for field, default, words in _options(value):
            yield f"- `{field}` ({default}): {words}" if words else f"- `{field}` ({default})"
        yield ""
        for method, function in vars(value).items():
            if inspect.isfunction(function) and method[0] != "_" and function.__doc__:
                text = " ".join(_prose(inspect.getdoc(function) or "").split())
                yield f"- `.{_signature(method, function)}`: {text}"
        yield ""


def _signature(name: str, value: Any) -> str:
    """Names and defaults; the docstring has types and shapes."""
    if inspect.isclass(value) and list(_options(value)):
        return f"{name}(**options)"
    found = inspect.signature(value)
    shown = [p.replace(annotation=p.empty) for p in found.parameters.values() if p.name != "self"]
    text = str(found.replace(parameters=shown, return_annotation=found.empty))
    result = found.return_annotation
    if isinstance(result, str) and result != "None":
        text += f" -> {result}"
    return textwrap.fill(name + text, 96, subsequent_indent="    ", break_long_words=False)


def _options(cls: type) -> Iterator[tuple[str, str, str]]:
    """Name, default and words of the fields that have a default, as their class spells them."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    body = tree.body if isinstance(tree, ast.ClassDef) else []
    for node, after in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or node.value is None:
            continue
        name = ast.unparse(node.target)
        if name[0] != "_":
            said = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            words = " ".join(str(after.value.value).split()) if said else ""
            yield name, f"`{ast.unparse(node.value)}`", words


def _prose(text: str) -> str:
    """A docstring as Markdown: a list of each `Args:`, `Returns:` or `Raises:` section."""
    out: list[str] = []
    listed = False
    for line in text.splitlines():
        if re.fullmatch(r"(Args|Returns|Raises|Yields):", line):
            listed = True
            out += ["", f"{line[:-1]}:", ""]
        elif not line.startswith("    "):
            listed = listed and not line
            out.append(line)
        elif listed:
            out.append(_entry(line[4:]))
        else:
            out.append(line)
    return "\n".join(out)


def _entry(line: str) -> str:
    """A line of a section: an item, or one that goes on."""
    found = re.match(r"([\w*]+(?:, \w+)*): ", line)
    if found:
        return f"- `{found[1]}`: {line[found.end() :]}"
    return f"  {line.strip()}" if line.startswith(" ") else f"- {line}"


def main() -> int:
    """Command line."""
    text = page()
    if "--check" in sys.argv[1:]:
        if PAGE.read_text(encoding="utf-8") == text:
            return 0
        print("docs/api.md is out of date: python docs/make_api.py")
        return 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
