"""Errors of the control libraries' swap-ins: each one, and nothing left patched."""

from __future__ import annotations

import importlib.metadata
import types
from typing import Any

import pytest

from ppo_fast.integrations import (
    AlreadyPatchedError,
    ForeignPatchError,
    NeverReachedError,
    NotPatchedError,
    TrainerMissingError,
    _places,
    sb3,
    skrl,
    tianshou,
    torchrl,
)
from ppo_fast.integrations._patch import Found

ALL = (sb3, skrl, tianshou, torchrl)
NEXT = {"sb3": "2.10.0", "skrl": "2.2.0", "tianshou": "2.1.0", "torchrl": "0.15.0"}


@pytest.fixture(params=ALL, ids=lambda m: m.__name__.split(".")[-1])
def swap(request: pytest.FixtureRequest) -> types.ModuleType:
    package = request.param.integration.package
    pytest.importorskip(package, reason=f"needs `pip install {package}`")
    return request.param


def state(found: list[Found]) -> list[Any]:
    """The object stored at every place."""
    return [_places.held(one.holder, one.key) for one in found]


def test_twice_and_without(swap: types.ModuleType) -> None:
    before = state(found := swap.integration.find())
    with pytest.raises(NotPatchedError, match="call apply"):
        swap.revert()
    swap.apply()
    with pytest.raises(AlreadyPatchedError, match="call revert"):
        swap.apply()
    with pytest.raises(NeverReachedError, match="gae: patched and never called"):
        swap.revert()
    assert state(found) == before


def test_another_version(swap: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    other, found = NEXT[swap.integration.name], swap.integration.find()
    before = state(found)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: other)
    with pytest.warns(RuntimeWarning, match=rf"{other} is patched although not tested"):
        swap.apply()
    with pytest.raises(NeverReachedError):
        swap.revert()
    assert state(found) == before


def test_another_patch_is_there(swap: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    *_, last = found = swap.integration.find()
    monkeypatch.setattr(last.holder, last.key, lambda *args, **kwargs: None)
    before = state(found)
    with pytest.raises(ForeignPatchError, match="undo that patch first"):
        swap.apply()
    assert state(found) == before


@pytest.mark.parametrize(
    "module", [sb3, skrl, tianshou, torchrl], ids=lambda m: m.integration.name
)
def test_not_installed(module: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    extra = module.integration.extra
    with pytest.raises(TrainerMissingError, match=rf"pip install 'ppo_fast\[{extra}\]'"):
        module.apply()


def test_the_fast_buffer_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    sb3._fast.cache_clear()
    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(TrainerMissingError, match="sb3: stable_baselines3 is not installed"):
        _ = sb3.FastRolloutBuffer
    with pytest.raises(AttributeError, match="FasterRolloutBuffer"):
        _ = sb3.FasterRolloutBuffer
