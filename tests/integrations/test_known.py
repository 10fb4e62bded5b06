"""Tests of recognising a trainer's source: what is known, and what is refused and how named."""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import installed, integration, learnt

from ppo_fast import integrations
from ppo_fast.__main__ import main
from ppo_fast.integrations._extract import Block
from ppo_fast.integrations._known import Known, load, ordered, span
from ppo_fast.integrations._patch import Integration, Swap

ROOT = Path(__file__).resolve().parents[2]
X = torch.arange(4.0)


def double(x: Tensor, times: float = 2) -> Tensor:
    return x + (times - 1) * x


def squares(x: Tensor) -> dict[str, Any]:
    return {"total": (x * x).sum(), "mean": (x * x).mean()}


DOUBLE = Swap("double", "toytrainer.core:double", double)
TOTAL = Swap(
    "total",
    "toytrainer.core:Trainer.total",
    squares,
    block=Block("squares = []", "mean = total"),
    view=lambda _, result: {name: result[name] for name in ("total", "mean")},
)


@pytest.fixture
def known(tmp_path: Path) -> Known:
    """Of toytrainer 1.2.0, which is tested, as it is."""
    with installed(tmp_path / "known"):
        return learnt(DOUBLE, TOTAL)


def assert_patched_and_reverted(toys: Integration, core: Any, **options: Any) -> None:
    toys.apply(**options)
    assert torch.equal(core.double(X), 2 * X)
    total, half = core.Trainer().total(X)
    assert (float(total), float(half)) == (14.0, 1.75)
    assert all(n.fused == 1 for n in toys.revert().values())


HARMLESS = {
    "comment": ("return x * times", "return x * times  # by the number"),
    "docstring": ("times=2):\n", 'times=2):\n    """The number doubled."""\n'),
    "annotation": ("double(x, times=2)", "double(x: 'Tensor', times: float = 2) -> 'Tensor'"),
    "formatting": ("return x * times", "return (\n        x\n        * times\n    )"),
    "text of an error": ("is too much", "is more than 9"),
    "log": (
        "            squares = []",
        "            logger.info('squares')\n            squares = []",
    ),
    "log inside": ("square = item * item", "square = item * item; logging.info('squared')"),
    "annotated": ("total = sum(squares)", "total: 'Tensor' = sum(squares)"),
    "elsewhere": ("x.mul_(3)", "x.mul_(4)"),
    "after the block": ("half = mean / self.rate", "half = mean * 1.0 / self.rate"),
    "one use less": ("            del squares\n", ""),
}


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS)
def test_a_harmless_change_is_known(tmp_path: Path, known: Known, change: tuple[str, str]) -> None:
    with installed(tmp_path / "new", "1.2.0", change) as toy, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_patched_and_reverted(integration(DOUBLE, TOTAL, known=known), toy.core)


CHANGED = {
    "statement": (
        ("return x * times", "return times * x"),
        r"core:double: statement at line 10 is not a known one: `return times \* x` \(known: 1\.2",
    ),
    "default": (("times=2", "times=3"), r"core:double: it takes `times=3`, not `times=2`"),
    "parameter": (("times=2)", "times=2, by=1)"), r"core:double: it takes `by` "),
    "name": (("double(x, times=2)", "double(y, times=2)"), r"core:double: it takes `y` "),
    "parameter less": (("times=2)", "times)"), r"core:double: it takes `times`, not `times=2`"),
    "test": (("times > 9", "times > 8"), r"line 8 is not a known one: `if times > 8:`"),
    "error": (("ValueError(", "TypeError("), r"line 9 is not a known one: `raise TypeError"),
    "nesting": (
        ("    squares.append(square)", "squares.append(square)"),
        r"Trainer.total: statement at line 25 is not a known one: `squares.append\(square\)`",
    ),
    "statement more": (
        ("            total = sum", "            x = x + 1\n            total = sum"),
        r"Trainer.total: statement at line 26 is not a known one: `x = x \+ 1`",
    ),
    "statement less": (
        ("                squares.append(square)\n", ""),
        r"Trainer.total: a known statement is missing before line 25",
    ),
    "name that is read": (
        ("square = item * item", "square = item * item * self.rate"),
        r"Trainer.total: it takes `self`",
    ),
    "name that is used": (
        ("return total, half", "return total, half + square - square"),
        r"Trainer.total: it sets `square`",
    ),
    "decorator": (("def double", "@torch.no_grad()\ndef double"), r"not a known one: `torch.no_"),
}


@pytest.mark.parametrize(("change", "what"), CHANGED.values(), ids=CHANGED)
@pytest.mark.parametrize("version", ["1.2.0", "1.3.0"])
def test_a_changed_source_is_refused_by_name(
    tmp_path: Path, known: Known, change: tuple[str, str], what: str, version: str
) -> None:
    toys = integration(DOUBLE, TOTAL, known=known)
    with installed(tmp_path / "new", version, change) as toy:
        before = dict(vars(toy.core)), toy.core.Trainer.total
        with pytest.raises(integrations.UnknownSourceError, match=what) as raised:
            toys.apply()
        assert f"toy: toytrainer {version}, " in str(raised.value)
        assert (dict(vars(toy.core)), toy.core.Trainer.total) == before and toys.calls == {}


@pytest.mark.parametrize("version", ["1.1.0", "1.3.0"])
def test_an_untested_version_of_known_source(tmp_path: Path, known: Known, version: str) -> None:
    """One line says so."""
    toys = integration(DOUBLE, TOTAL, known=known)
    with installed(tmp_path / "new", version) as toy:
        with pytest.warns(
            RuntimeWarning, match=r"although not tested \(tested: 1\.2\.0\)"
        ) as said:
            assert_patched_and_reverted(toys, toy.core)
        assert len(said) == 1 and f"toy: toytrainer {version} is" in str(said[0].message)
        assert (toys.check().tested, toys.check().unknown) == (False, ())


def test_a_content_that_is_known_of_several_versions(tmp_path: Path, known: Known) -> None:
    changed = ("return x * times", "return times * x")
    with installed(tmp_path / "new", "1.10.0", changed) as toy:
        toys = integration(DOUBLE, TOTAL, known=learnt(DOUBLE, TOTAL, known=known))
        assert_patched_and_reverted(toys, toy.core)
        assert toys.tested == ("1.2.0", "1.10.0")
    with (
        installed(tmp_path / "newer", "1.11.0", ("return x * times", "return x")),
        pytest.raises(integrations.UnknownSourceError, match=r"\(known: 1\.2\.0–1\.10\.0\)"),
    ):
        toys.apply()


def test_unknown_source_is_patched_if_the_user_says_so(tmp_path: Path, known: Known) -> None:
    toys = integration(DOUBLE, TOTAL, known=known)
    with installed(tmp_path / "same", "1.3.0", ("return x * times", "return times * x")) as toy:
        with pytest.raises(
            ValueError, match="unknown must be 'refuse' or 'compare', got 'accept'"
        ):
            toys.apply(unknown="accept")
        check = toys.check()
        assert (check.version, check.tested, check.fits) == ("1.3.0", False, True)
        assert len(check.unknown) == 1 and "return times * x" in check.unknown[0]
        with pytest.raises(integrations.UnknownSourceError, match=r"apply\(unknown='compare'\)"):
            toys.apply()
        with pytest.warns(RuntimeWarning, match=r"1\.3\.0 is patched although .*line 10") as said:
            assert_patched_and_reverted(toys, toy.core, unknown="compare")
        assert len(said) == 1
    with installed(tmp_path / "other", "1.4.0", ("return x * times", "return x + times")) as toy:
        with pytest.warns(RuntimeWarning, match=r"1\.4\.0 is patched"):
            toys.apply(unknown="compare")
        with pytest.raises(integrations.MismatchError, match="double: result: the original gives"):
            toy.core.double(X)
        assert toys.calls == {} and torch.equal(toy.core.double(X), X + 2)


@pytest.mark.parametrize("name", ["default", "parameter", "name that is read"])
def test_other_names_are_never_patched(tmp_path: Path, known: Known, name: str) -> None:
    toys = integration(DOUBLE, TOTAL, known=known)
    change, what = CHANGED[name]
    with installed(tmp_path / "new", "1.3.0", change):
        with pytest.raises(integrations.UnknownSourceError, match=what) as raised:
            toys.apply(unknown="compare")
        assert "compare" not in str(raised.value)


def test_the_text_of_a_statement_counts(tmp_path: Path) -> None:
    """Only those of errors do not."""
    swap, named = DOUBLE, ("return x * times", "return x * {'twice': times}['twice']")
    with installed(tmp_path / "one", "1.0.0", named):
        known = learnt(swap)
    with (
        installed(tmp_path / "two", "1.0.0", (named[0], named[1].replace("twice", "thrice"))),
        pytest.raises(integrations.UnknownSourceError, match=r"return x \* \{'thrice'"),
    ):
        integration(swap, known=known).apply()


def moved(x: Tensor) -> Tensor:
    return 3 * x


def test_alternatives_are_chosen_by_what_is_there(tmp_path: Path) -> None:
    """A name, a signature, a statement."""

    def other(x: Tensor, times: float, by: float) -> Tensor:
        return times * x / by

    def added(x: Tensor, times: float = 2) -> Tensor:
        return x + times

    swaps = (
        Swap("double", "toytrainer.nowhere:double", double),
        Swap("double", "toytrainer.core:double", other),
        Swap("double", "toytrainer.core:double", added, having="return x + times"),
        DOUBLE,
    )
    changes = {
        "1.0": (("double(x, times=2)", "double(x, times, by)"),),
        "1.1": (("return x * times", "return x + times"),),
        "1.2": (),
    }
    known = Known()
    for version, change in changes.items():
        with installed(tmp_path / version, version, *change) as toy:
            known = learnt(swaps, known=known)
            toys = integration(swaps, known=known)
            rest = (2, 1) if version == "1.0" else ()
            theirs = toy.core.double(X, *rest)
            with toys.patched():
                assert torch.equal(toy.core.double(X, *rest), theirs)
    assert known.tested == ("1.0", "1.1", "1.2")
    with (
        installed(tmp_path / "2", "2.0", ("(x, times=2)", "(y, times=2)")),
        pytest.raises(
            integrations.UnknownSourceError,
            match=r"2\.0, there is no toytrainer.nowhere, .*core:double: it takes `y`",
        ),
    ):
        integration(swaps, known=known).apply()


def test_a_place_that_some_versions_lack(tmp_path: Path) -> None:
    extra = Swap("triple", "toytrainer.core:triple", moved, optional=True)
    with installed(tmp_path / "low", "1.0.0") as toy:
        known = learnt(DOUBLE, extra)
        toys = integration(DOUBLE, extra, known=known)
        with toys.patched() as calls:
            toy.core.double(X)
        assert list(calls) == ["double"]
        with pytest.raises(integrations.NoPlaceError, match=r"1\.0\.0 has no place for triple"):
            toys.apply(("triple",))
    more = ("def scale", "def triple(x):\n    return x * 3\n\ndef scale")
    with installed(tmp_path / "high", "1.1.0", more) as toy:
        toys = integration(DOUBLE, extra, known=learnt(DOUBLE, extra, known=known))
        with toys.patched() as calls:
            toy.core.double(X), toy.core.triple(X)
        assert list(calls) == ["double", "triple"]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (("x.mul_(3)", "x.mul_(4)"), r"core:tripled: statement at line \d+ is not .*x\.mul_\(4\)"),
        (("scale(x):", "scale(x, by=3):"), r"core:tripled: statement .*`def scale\(x, by=3\):`"),
    ],
)
def test_what_a_place_calls(tmp_path: Path, change: tuple[str, str], what: str) -> None:
    """A helper's statements and parameters; one that a version lacks counts for nothing."""
    more = ("TABLE", "def tripled(x):\n    return scale(x.clone())\n\nTABLE")
    swap = Swap("triple", "toytrainer.core:tripled", moved, helpers=("scale", "no_such"))
    with installed(tmp_path / "known", "1.0.0", more) as toy:
        known = learnt(swap)
        with integration(swap, known=known).patched() as calls:
            assert torch.equal(toy.core.tripled(X), 3 * X)
        assert calls["triple"].fused == 1
    with (
        installed(tmp_path / "new", "1.1.0", more, change),
        pytest.raises(integrations.UnknownSourceError, match=what),
    ):
        integration(swap, known=known).apply()


def test_both_directions_of_an_autograd_function(tmp_path: Path) -> None:
    source = """
class Half(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, by=2.0):
        ctx.by = by
        return x / by

    @staticmethod
    def backward(ctx, grad):
        return grad / ctx.by, None

TABLE"""
    swap = Swap("half", "toytrainer.core:Half.apply", lambda x, by=2.0: x / by)
    with installed(tmp_path / "one", "1.0.0", ("TABLE", source)) as toy:
        known = learnt(swap)
        assert known.places["toytrainer.core:Half.apply"][0].content.takes == ("x", "by=2.0")
        with integration(swap, known=known).patched() as calls:
            assert torch.equal(toy.core.Half.apply(X), X / 2)
        assert calls["half"].fused == 1
    changed = source.replace("grad / ctx.by", "grad * ctx.by")
    with (
        installed(tmp_path / "two", "1.1.0", ("TABLE", changed)),
        pytest.raises(integrations.UnknownSourceError, match=r"`return \(grad \* ctx.by, None\)`"),
    ):
        integration(swap, known=known).apply()


@pytest.mark.parametrize("name", integrations.tested_versions())
def test_the_tested_versions_are_said_alike(name: str) -> None:
    """In the pages, the extra and the Makefile; and every known content is a tested one."""
    toys: Integration = importlib.import_module(f"ppo_fast.integrations.{name}").integration
    tested = integrations.tested_versions()[name]
    assert tested and list(tested) == ordered(tested) and toys.tested == tested
    for place, contents in load(name).places.items():
        for seen in contents:
            assert {*seen.versions} & {*tested}, f"{place}: no test ran with {seen.versions}"
    pages = [ROOT / f"docs/integrations/{page}.md" for page in ("index", name)]
    (row,) = [x for x in pages[0].read_text("utf-8").splitlines() if f"]({name}.md)" in x]
    for text in (row, pages[1].read_text("utf-8")):
        stated = re.findall(r"\d+(?:\.\d+)+", text)
        for version in (tested[0], tested[-1]):
            assert any(within(version, said) for said in stated), version
    package = toys.package.replace("_", "-")
    extras = (ROOT / "pyproject.toml").read_text("utf-8")
    (least,) = re.findall(rf'^{toys.extra} = \["{package}>=([\d.]+)', extras, re.M)
    assert within(tested[0], least)
    made = (ROOT / "Makefile").read_text("utf-8").replace("\\\n", "")
    values = {key: value.split() for key, value in re.findall(r"^(\S+) := (.+)$", made, re.M)}
    (environment,) = [
        key.removeprefix("TESTS_")
        for key, files in values.items()
        if re.match(r"TESTS_(?!LOW)\S+(?<!-low)$", key) and name in files
    ]
    kinds = [f"{kind}_{environment}" for kind in ("NEEDS", "ALONE", "HIGH")]
    low = [f"LOW_{environment}", *(f"{kind}-low" for kind in kinds)] if tested[1:] else kinds
    for version, keys in ((tested[-1], kinds), (tested[0], low)):
        assert any(f"{package}=={version}" in values.get(key, []) for key in keys)


def within(version: str, stated: str) -> bool:
    """Equality of a version with one that is stated, or with its minor."""
    return f"{version}.".startswith(f"{stated}.")


def test_what_is_installed(
    tmp_path: Path, known: Known, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A line for each trainer, from the function and from `ppo-fast info`."""
    toys = integration(DOUBLE, known=known)
    monkeypatch.setattr(integrations, "tested_versions", lambda: {"toy": toys.tested})
    monkeypatch.setitem(
        sys.modules, "ppo_fast.integrations.toy", SimpleNamespace(integration=toys)
    )
    assert integrations.installed_versions() == {}
    changed = ("return x * times", "return times * x")
    for version, changes, line in (
        ("1.2.0", (), "tested (1.2.0)"),
        ("1.3.0", (), "not tested (1.2.0 are), its source is known"),
        ("1.4.0", (changed,), "not tested (1.2.0 are), its source is not known: toytrainer.core:"),
        (
            "1.5.0",
            (("(x, times=2)", "(x, by, times=2)"),),
            "not tested (1.2.0 are), its source is not known: toy: ",
        ),
    ):
        with installed(tmp_path / version, version, *changes):
            (said,) = integrations.installed_versions().values()
            assert said.startswith(f"toytrainer {version}: {line}")
            assert main(["info"]) == 0
            assert f"\nintegrations.toy: {said}\n" in capsys.readouterr().out


def test_versions_in_order() -> None:
    assert ordered(["1.10.0", "1.9", "1.9.1", "1.10.0rc1"]) == [
        "1.9",
        "1.9.1",
        "1.10.0",
        "1.10.0rc1",
    ]
    assert (span(["1.9", "1.10"]), span(["2.0"]), span([])) == ("1.9–1.10", "2.0", "no version")
