"""Places in a trainer: a name in a module, a class or a registry."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Iterator
from typing import Any

from ppo_fast.integrations._errors import NoPlaceError, TrainerMissingError

ABSENT: Any = object()


def find(package: str, place: str) -> tuple[Any, str]:
    """Holder and name of "package.module:Class.name".

    Raises:
        NoPlaceError: the package has no such module or name. TrainerMissingError: the module
            needs something that is not installed.
    """
    module, _, path = place.partition(":")
    try:
        holder = importlib.import_module(module)
        *inner, key = path.split(".")
        holder = functools.reduce(getattr, inner, holder)
        getattr(holder, key)
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] == package:
            raise NoPlaceError(f"there is no {error.name}") from error
        raise TrainerMissingError(f"{module} cannot be imported ({error})") from error
    except ImportError as error:
        raise TrainerMissingError(f"{module} cannot be imported ({error})") from error
    except AttributeError as error:
        raise NoPlaceError(f"there is no {place} ({error})") from error
    return holder, key


def get(holder: Any, key: Any) -> Any:
    """The object as callers see it."""
    return holder[key] if isinstance(holder, dict) else getattr(holder, key)


def held(holder: Any, key: Any) -> Any:
    """The object as stored: a static method, not the function inside; ABSENT if inherited."""
    return (holder if isinstance(holder, dict) else vars(holder)).get(key, ABSENT)


def put(holder: Any, key: Any, value: Any) -> None:
    """Store an object; ABSENT removes it."""
    if value is ABSENT:
        delattr(holder, key)
    elif isinstance(holder, dict):
        holder[key] = value
    else:
        setattr(holder, key, value)


def named(holder: Any, key: Any) -> str:
    """The place as text."""
    if isinstance(holder, dict):
        names = [
            f"{module.__name__}.{name}"
            for module in [*sys.modules.values()]
            for name, registry in _registries(module)
            if registry is holder
        ]
        return f"{min(names, default='a registry', key=len)}[{key!r}]"
    if inspect.ismodule(holder):
        return f"{holder.__name__}.{key}"
    return f"{holder.__module__}.{holder.__qualname__}.{key}"


def importers(package: str, value: Any) -> Iterator[tuple[Any, Any]]:
    """The modules of the package, and registries in them, that hold `value`, with its name."""
    for name, module in [*sys.modules.items()]:
        if module is None or name.partition(".")[0] != package:
            continue
        yield from ((module, key) for key, it in [*vars(module).items()] if it is value)
        for _, registry in _registries(module):
            yield from ((registry, key) for key, it in [*registry.items()] if it is value)


def _registries(module: Any) -> Iterator[tuple[str, dict[Any, Any]]]:
    """The dicts of a module and of the classes written in it, by their names there."""
    for name, it in [*getattr(module, "__dict__", {}).items()]:
        if type(it) is dict:
            yield name, it
        elif issubclass(type(it), type) and it.__module__ == module.__name__:
            of_class = [*vars(it).items()]
            yield from ((f"{name}.{key}", x) for key, x in of_class if type(x) is dict)
