"""Tests of patching on a package made here: replacing, counting, comparing, restoring."""

from __future__ import annotations

import importlib
import importlib.metadata
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import installed, integration, learnt

from ppo_fast import integrations
from ppo_fast.integrations._errors import Uncovered
from ppo_fast.integrations._extract import Block, extract
from ppo_fast.integrations._known import Known
from ppo_fast.integrations._patch import Calls, Integration, Swap


@pytest.fixture
def toy(tmp_path: Path) -> Iterator[SimpleNamespace]:
    with installed(tmp_path) as found:
        yield found


def ours(x: Tensor, times: float = 2) -> Tensor:
    if times == 0:
        raise Uncovered("times 0")
    return x + (times - 1) * x


def made(*swaps: Swap, known: Known | None = None, **changed: Any) -> Integration:
    """Of what is installed, which is known unless `known` says what is."""
    swaps = swaps or (DOUBLE,)
    return integration(*swaps, known=learnt(*swaps) if known is None else known, **changed)


DOUBLE = Swap("double", "toytrainer.core:double", ours)
X = torch.arange(4.0)


def state(module: ModuleType) -> dict[str, Any]:
    return {**vars(module), "TABLE": dict(module.TABLE), "total": module.Trainer.total}


def test_every_import_site_is_patched_and_put_back(toy: SimpleNamespace) -> None:
    before, toys = state(toy.core), made()
    places = toys.apply()
    assert sorted(places) == [
        "toytrainer.core.Registry.table['twice']",
        "toytrainer.core.TABLE['double']",
        "toytrainer.core.double",
        "toytrainer.user.double",
    ]
    late = importlib.import_module("toytrainer.late")
    for use in (toy.core.use, toy.user.use, late.double, toy.core.TABLE["double"]):
        assert torch.equal(use(X), 2 * X)
    assert torch.equal(toy.core.Registry.table["twice"](X), 2 * X)
    assert toys.calls == {"double": Calls(fused=5)}
    assert toys.revert() == {"double": Calls(fused=5)}
    assert toy.core.Registry.table["twice"] is before["double"]
    assert state(toy.core) == before and toys.calls == {}
    assert toy.user.double is toy.core.double is late.double is before["double"]
    with made().patched() as calls:
        toy.user.use(X)
    assert calls["double"].fused == 1 and state(toy.core) == before


def test_an_import_site_that_another_place_imports(toy: SimpleNamespace) -> None:
    """`late` takes `double` by name while `apply()` looks for `late.use`."""
    other = Swap("use", "toytrainer.late:use", ours)
    with made(DOUBLE, other).patched() as calls:
        late = importlib.import_module("toytrainer.late")
        assert torch.equal(late.double(X), 2 * X) and torch.equal(late.use(X), 2 * X)
    assert calls == {"double": Calls(fused=1), "use": Calls(fused=1)}
    assert late.double is toy.core.double


def test_a_method_is_patched_in_its_class(toy: SimpleNamespace) -> None:
    before = toy.core.Trainer.total

    def total(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        square = (x * x).sum()
        return square, square / len(x) / self.rate

    with made(Swap("total", "toytrainer.core:Trainer.total", total)).patched() as calls:
        assert toy.core.Trainer().total(X)[0] == 14
    assert calls == {"total": Calls(fused=1)} and toy.core.Trainer.total is before


def squares(x: Tensor, **_: Any) -> dict[str, Any]:
    return {"total": (x * x).sum(), "mean": (x * x).mean()}


BLOCK = Block("squares = []", "mean = total", metrics=("half = mean", "half = mean"))


def used(_: Any, result: dict[str, Any]) -> dict[str, Any]:
    return {name: result[name] for name in ("total", "half")}


def test_statements_inside_a_function_are_replaced(toy: SimpleNamespace) -> None:
    """Names that they set are handed back; those that only a `del` names may be left out."""

    def block(x: Tensor, self: Any) -> dict[str, Any]:
        found = squares(x)
        return {"total": found["total"], "half": (found["mean"] / self.rate).detach()}

    before = toy.core.Trainer.total
    x = X.clone().requires_grad_()
    plain = toy.core.Trainer().total(x)
    swap = Swap("total", "toytrainer.core:Trainer.total", block, block=BLOCK, view=used)
    with made(swap).patched() as calls:
        assert toy.core.Trainer().total(x) == plain
        toy.core.Trainer().total(x)
    assert calls == {"total": Calls(fused=2)} and toy.core.Trainer.total is before


@pytest.mark.parametrize(
    "block", [Block("squares = {}", "mean = total"), Block("mean = total", "squares = []")]
)
def test_a_statement_that_is_not_there(toy: SimpleNamespace, block: Block) -> None:
    swaps = DOUBLE, Swap("total", "toytrainer.core:Trainer.total", squares, block=block)
    before, toys = state(toy.core), made(*swaps, known=Known(("1.2.0",)))
    with pytest.raises(
        integrations.UnknownSourceError,
        match=r"toy: toytrainer 1\.2\.0, toytrainer.core:Trainer.total: 0 blocks from `",
    ):
        toys.apply()
    assert state(toy.core) == before


def around(x: list[int], gain: int) -> float:
    last = 2 * gain

    def inner(values: list[int], by: int) -> float:
        total = 0
        for i in range(len(values)):
            total = total + values[i] * last
        scaled = total / by
        return max(scaled, 0.0)

    total = i = 5
    return inner(x, 4) + total + i


def test_statements_of_a_function_inside_another() -> None:
    """Names that they read may be that one's or the outer one's; those they set are their own."""
    parts, build = extract(around, {"sum": Block("total = 0", "scaled = ")})
    assert (parts["sum"].inputs, parts["sum"].outputs) == (("by", "last", "values"), ("scaled",))
    assert parts["sum"].original(by=4, last=6, values=[1, 2])["scaled"] == 4.5
    again = build({"sum": lambda by, last, values: {"scaled": sum(values) * last / by}})
    assert again([1, 2], 3) == around([1, 2], 3) == 14.5


def imports_inside(x: float) -> float:
    from math import floor as down

    def half(y: float) -> float:
        return y / 2

    low = down(x)
    out = half(low)
    return max(out, 0.0)


def test_names_that_a_function_imports_and_defines_are_read() -> None:
    """A block that uses them takes them as it does those that are assigned."""
    parts, build = extract(imports_inside, {"half": Block("low = ", "out = ")})
    assert (parts["half"].inputs, parts["half"].outputs) == (("down", "half", "x"), ("out",))
    assert parts["half"].original(down=math.floor, half=lambda y: y / 2, x=5.5)["out"] == 2.5
    assert build({"half": lambda down, half, x: {"out": half(down(x))}})(5.5) == 2.5


def test_uncovered_options_are_left_and_said(toy: SimpleNamespace) -> None:
    with made().patched() as calls:
        with pytest.warns(RuntimeWarning, match="toy: double is left to toytrainer: times 0"):
            assert torch.equal(toy.core.double(X, times=0), 0 * X)
        assert torch.equal(toy.core.double(X, times=0), 0 * X)
        assert torch.equal(toy.core.double(X), 2 * X)
    assert calls == {"double": Calls(fused=1, left=2)}


def wrong_value(x: Tensor, times: float = 2) -> Tensor:
    return x * times + torch.tensor([0.0, 0, 1, 0])


def wrong_gradient(x: Tensor, times: float = 2) -> Tensor:
    return x * times + (x - x.detach())


def wrong_shape(x: Tensor, times: float = 2) -> Tensor:
    return (x * times)[:2]


@pytest.mark.parametrize(
    ("fused", "what"),
    [
        (wrong_value, r"result: the original gives 4.0 at \(2,\), ppo_fast 5.0 \(1 of 4 differ"),
        (wrong_gradient, r"gradient of inputs\['x'\]: the original gives 2.0"),
        (wrong_shape, r"the original has shape \(4,\), ppo_fast \(2,\)"),
    ],
)
def test_a_mismatch_is_refused_and_nothing_stays_patched(
    toy: SimpleNamespace, fused: Any, what: str
) -> None:
    before, toys = state(toy.core), made(Swap("double", "toytrainer.core:double", fused))
    x = X.clone().requires_grad_()
    with pytest.raises(integrations.MismatchError, match=what), toys.patched():
        toy.core.double(x)
    assert state(toy.core) == before and toys.calls == {}


def test_the_comparison_leaves_the_inputs_alone(toy: SimpleNamespace) -> None:
    """Its original changes its input in place; the caller's is changed by nobody."""
    x = X.clone()
    with made(Swap("scale", "toytrainer.core:scale", lambda x: x * 3)).patched():
        assert torch.equal(toy.core.scale(x), 3 * X) and torch.equal(x, X)


def test_a_patched_op_that_is_never_called(toy: SimpleNamespace) -> None:
    before, toys = state(toy.core), made()
    with (
        pytest.raises(integrations.NeverReachedError, match="double: patched and never called"),
        toys.patched(),
    ):
        pass
    assert state(toy.core) == before
    with pytest.raises(ZeroDivisionError), toys.patched():  # the caller's own error is the news
        raise ZeroDivisionError
    assert state(toy.core) == before


def test_applied_twice_and_reverted_without(toy: SimpleNamespace) -> None:
    toys = made()
    with pytest.raises(integrations.NotPatchedError, match=r"toy: not patched; call apply\(\)"):
        toys.revert()
    toys.apply()
    patched = state(toy.core)
    with pytest.raises(integrations.AlreadyPatchedError, match=r"call revert\(\) first"):
        toys.apply()
    assert state(toy.core) == patched
    toy.core.double(X)
    toys.revert()


def test_a_package_whose_module_has_another_name(toy: SimpleNamespace) -> None:
    """The version is the package's; modules, import sites and files are the module's."""
    swaps = Swap("double", "toytrainer.core:double", ours)
    toys = made(swaps, package="torch", module="toytrainer")
    assert toys.installed() == importlib.metadata.version("torch")
    before = state(toy.core)
    with pytest.warns(RuntimeWarning, match="toy: torch .* although not tested"):
        places = toys.apply()
    assert "toytrainer.core.double" in places and len(places) > 1
    toy.core.double(X)
    toys.revert()
    assert state(toy.core) == before


def test_a_trainer_that_is_not_installed() -> None:
    toys = made(package="no_such_trainer", extra="none", known=Known())
    with pytest.raises(
        integrations.TrainerMissingError, match=r"not installed: pip install 'ppo_fast\[none\]'"
    ):
        toys.apply()


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("toytrainer.core:triple", integrations.NoPlaceError),
        ("toytrainer.core:Trainer.mean", integrations.NoPlaceError),
        ("toytrainer.nowhere:double", integrations.NoPlaceError),
        ("toytrainer.needy:double", integrations.TrainerMissingError),
    ],
)
def test_a_place_that_is_not_there(toy: SimpleNamespace, place: str, error: Any) -> None:
    before = state(toy.core)
    toys = made(DOUBLE, Swap("other", place, ours), known=learnt(DOUBLE))
    with pytest.raises(error, match=place.partition(":")[0]):
        toys.apply()
    assert state(toy.core) == before


@pytest.mark.parametrize("ops", [("triple",), ()])
def test_ops_that_there_are_not(toy: SimpleNamespace, ops: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"ops must be among \('double',\), got \("):
        made().apply(ops)


def test_another_patch_is_there_before(
    toy: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    toys = made()
    monkeypatch.setattr(toy.core, "double", ours)
    with pytest.raises(
        integrations.ForeignPatchError, match=r"own any more, it comes from .*test_patch"
    ):
        toys.apply()
    assert toy.core.double is ours and toys.calls == {}


def test_another_patch_comes_after(toy: SimpleNamespace) -> None:
    toys = made()
    toys.apply()
    mine = toy.core.double
    toy.core.double(X)
    toy.core.double = ours
    with pytest.raises(
        integrations.ForeignPatchError, match=r"double has been replaced by .*test_patch"
    ):
        toys.revert()
    assert toy.core.double is ours and toy.user.double is mine  # nothing was changed
    toy.core.double = mine
    toys.revert()


def test_ops_on_request(toy: SimpleNamespace) -> None:
    toys = made(
        DOUBLE, Swap("scale", "toytrainer.core:scale", lambda x: 3 * x), on_request=("scale",)
    )
    with toys.patched() as calls:
        toy.core.double(X)
    assert list(calls) == ["double"]
    assert toys.apply(("scale",)) == ["toytrainer.core.scale"]
    toys.calls["scale"].left = 1
    toys.revert()
