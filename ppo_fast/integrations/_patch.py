"""Reversible patches of a trainer: version check, replacement, call counts, restoration.

A `Swap` names one function of the trainer and its replacement. An `Integration` applies all swaps
or none. A replaced function is found by identity in every loaded module of the trainer, so that
names imported from elsewhere and registries are patched, and restored, too.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ppo_fast.integrations._errors import (
    AlreadyPatchedError,
    ForeignPatchError,
    MismatchError,
    NeverReachedError,
    NotPatchedError,
    TrainerMissingError,
    Uncovered,
    UnknownSourceError,
    WrongVersionError,
)
from ppo_fast.integrations._extract import Block, extract
from ppo_fast.integrations._first_call import first_call
from ppo_fast.integrations._origin import check_own, file_of

Arguments = dict[str, Any]


class Change(NamedTuple):
    """One name in one module, class or registry, before and after."""

    holder: Any
    key: Any
    place: str
    original: Any
    new: Any


@dataclass
class Calls:
    """Calls of an op that ran on ppo_fast, and calls that an option left to the trainer."""

    fused: int = 0
    left: int = 0


@dataclass(frozen=True)
class Swap:
    """One function of the trainer and its replacement.

    Attributes:
        op: the name under which calls are counted; several swaps may share it.
        place: "package.module:name" or "package.module:Class.name".
        fused: takes the same arguments by the same names; raises `Uncovered` for options that it
            does not map.
        block: the statements inside the function that are replaced, rather than all of it;
            `fused` then takes the names they read and gives a dict of those they set.
        view: the part of (arguments, result) that is compared on the first call; by default the
            result.
        sample: shortens the arguments of that comparison.
    """

    op: str
    place: str
    fused: Callable[..., Any]
    block: Block | None = None
    view: Callable[[Arguments, Any], Any] = lambda arguments, result: result
    sample: Callable[[Arguments], Arguments] = lambda arguments: arguments


@dataclass
class Integration:
    """All swaps of one trainer; they are applied together and reverted together."""

    name: str
    package: str
    version: str
    extra: str
    swaps: tuple[Swap, ...]
    on_request: tuple[str, ...] = ()  # ops that most runs do not reach: only if named
    _calls: dict[str, Calls] = field(default_factory=dict)
    _changes: list[Change] = field(default_factory=list)

    @property
    def ops(self) -> tuple[str, ...]:
        """Names of all ops that can be patched."""
        return tuple(dict.fromkeys(swap.op for swap in self.swaps))

    @property
    def calls(self) -> dict[str, Calls]:
        """Calls of each patched op since `apply()`; empty when nothing is patched."""
        return self._calls

    def apply(self, ops: tuple[str, ...] | None = None) -> list[str]:
        """Patch the trainer and return every place patched.

        `ops` are those to patch, of `self.ops`; by default all but those `on_request`.

        Raises:
            IntegrationError: see its subclasses. Nothing is then patched.
            ValueError: `ops` names one that there is not.
        """
        if self._changes:
            raise AlreadyPatchedError(f"{self.name}: already patched; call revert() first")
        default = tuple(op for op in self.ops if op not in self.on_request)
        chosen = default if ops is None else tuple(ops)
        if not chosen or set(chosen) - set(self.ops):
            raise ValueError(f"{self.name}: ops must be among {self.ops}, got {chosen}")
        self._check_version()
        calls = {op: Calls() for op in self.ops if op in chosen}
        self._changes = self._plan([swap for swap in self.swaps if swap.op in chosen], calls)
        self._calls = calls
        for change in self._changes:
            _set(change.holder, change.key, change.new)
        return [change.place for change in self._changes]

    def revert(self) -> dict[str, Calls]:
        """Put everything back and return the calls of each op.

        Raises:
            NotPatchedError: nothing is patched. ForeignPatchError: another library has patched
                one of the places since; nothing is then changed. NeverReachedError: an op was
                patched and never called; everything has then been put back.
        """
        calls = self._restore()
        unreached = [op for op, n in calls.items() if not n.fused and not n.left]
        if unreached:
            raise NeverReachedError(
                f"{self.name}: {', '.join(unreached)}: patched and never called, so {self.package}"
                f" ran without; patch what the run goes through: apply(ops=...) of {self.ops}"
            )
        return calls

    @contextmanager
    def patched(self, ops: tuple[str, ...] | None = None) -> Iterator[dict[str, Calls]]:
        """`apply(ops)` around a block, `revert()` after it; gives the calls as they count up.

        If the block raises, everything is put back and the block's error is raised.
        """
        self.apply(ops)
        try:
            yield self._calls
        except BaseException:
            if self._changes:
                self._restore()
            raise
        self.revert()

    def _restore(self) -> dict[str, Calls]:
        if not self._changes:
            raise NotPatchedError(f"{self.name}: not patched; call apply() first")
        for change in self._changes:
            found = _held(change.holder, change.key)
            if found is not change.new:
                raise ForeignPatchError(
                    f"{self.name}: {change.place} has been replaced by {file_of(found)} since"
                    " apply(); undo that first"
                )
        for change in self._changes:
            _set(change.holder, change.key, change.original)
            # Modules imported since have taken the replacement by name.
            for holder, key in _importers(self.package, change.new):
                _set(holder, key, change.original)
        self._changes = []
        calls, self._calls = self._calls, {}
        return calls

    def find(self, place: str) -> tuple[Any, str]:
        """Holder and name of a place, in the version that this is written for."""
        self._check_version()
        return self._find(place)

    def _check_version(self) -> None:
        wanted = f"{self.package} {self.version}"
        try:
            found = importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError as error:
            raise TrainerMissingError(
                f"{self.name}: {wanted} is not installed: pip install 'ppo_fast[{self.extra}]'"
            ) from error
        if found != self.version and not found.startswith(f"{self.version}."):
            raise WrongVersionError(f"{self.name}: written for {wanted}, found {found}")

    def _plan(self, swaps: list[Swap], calls: dict[str, Calls]) -> list[Change]:
        """Every change; nothing is changed yet."""
        planned = []
        # All imports first: one module may import another's function by name.
        places = {swap.place: self._find(swap.place) for swap in swaps}
        for place, (holder, key) in places.items():
            here = [swap for swap in swaps if swap.place == place]
            original = _get(holder, key)
            check_own(self.name, self.package, place, original)
            if here[0].block is None:
                new = self._counted(here[0], original, calls[here[0].op])
            else:
                new = self._rebuilt(original, here, calls)
            held = vars(holder).get(key, _ABSENT)
            if isinstance(held, staticmethod):
                new = staticmethod(new)
            planned.append(Change(holder, key, _place(holder, key), held, new))
            planned += [
                Change(other, name, _place(other, name), original, new)
                for other, name in _importers(self.package, original)
                if (other, name) != (holder, key)
            ]
        return planned

    def _find(self, place: str) -> tuple[Any, str]:
        module, _, path = place.partition(":")
        try:
            holder = importlib.import_module(module)
            *inner, key = path.split(".")
            holder = functools.reduce(getattr, inner, holder)
            getattr(holder, key)
        except ImportError as error:
            raise TrainerMissingError(
                f"{self.name}: {module} cannot be imported ({error})"
            ) from error
        except AttributeError as error:
            raise UnknownSourceError(f"{self.name}: there is no {place} ({error})") from error
        return holder, key

    def _rebuilt(self, original: Any, swaps: list[Swap], calls: dict[str, Calls]) -> Any:
        """The function around its replaced blocks."""
        blocks = {swap.op: swap.block for swap in swaps if swap.block is not None}
        extracted, build = extract(original, blocks)
        new = build({s.op: self._counted(s, extracted[s.op].original, calls[s.op]) for s in swaps})
        # A static method is decorated again already, by its own source.
        return functools.wraps(original)(getattr(new, "__func__", new))

    def _counted(self, swap: Swap, original: Any, calls: Calls) -> Any:
        """The replacement: counts, compares its first call, leaves what is not covered."""
        # A block gets keyword arguments alone; otherwise the order is the original's.
        signature = None if swap.block else inspect.signature(swap.fused)
        name = f"{self.name}: {swap.op}"
        warned: set[str] = set()
        compared = False

        def using(function: Any) -> Callable[[Arguments], Any]:
            def run(arguments: Arguments) -> Any:
                if signature is None:
                    return function(**arguments)
                bound = signature.bind_partial()
                bound.arguments = arguments
                return function(*bound.args, **bound.kwargs)

            return run

        @functools.wraps(original)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            nonlocal compared
            try:
                if not compared:
                    given = signature.bind(*args, **kwargs).arguments if signature else kwargs
                    arguments = swap.sample(dict(given))
                    first_call(name, using(original), using(swap.fused), arguments, swap.view)
                    compared = True
                result = swap.fused(*args, **kwargs)
            except Uncovered as reason:
                calls.left += 1
                if str(reason) not in warned:
                    warned.add(str(reason))
                    warnings.warn(
                        f"{name} is left to {self.package}: {reason}", RuntimeWarning, stacklevel=2
                    )
                return original(*args, **kwargs)
            except MismatchError:
                self._restore()
                raise
            calls.fused += 1
            return result

        return replacement


_ABSENT: Any = object()


def _get(holder: Any, key: Any) -> Any:
    return holder[key] if isinstance(holder, dict) else getattr(holder, key)


def _held(holder: Any, key: Any) -> Any:
    """The attribute as stored: a static method, not the function inside."""
    return (holder if isinstance(holder, dict) else vars(holder)).get(key)


def _set(holder: Any, key: Any, value: Any) -> None:
    if value is _ABSENT:  # it was inherited
        delattr(holder, key)
    elif isinstance(holder, dict):
        holder[key] = value
    else:
        setattr(holder, key, value)


def _place(holder: Any, key: Any) -> str:
    if isinstance(holder, dict):
        names = [
            f"{module.__name__}.{name}"
            for module in [*sys.modules.values()]
            for name, value in [*getattr(module, "__dict__", {}).items()]
            if value is holder
        ]
        return f"{min(names, default='a registry', key=len)}[{key!r}]"
    owner = (
        holder.__name__
        if inspect.ismodule(holder)
        else (f"{holder.__module__}.{holder.__qualname__}")
    )
    return f"{owner}.{key}"


def _importers(package: str, value: Any) -> Iterator[tuple[Any, Any]]:
    """The modules of the package, and registries in them, that hold `value`, with its name."""
    for name, module in [*sys.modules.items()]:
        if module is None or name.partition(".")[0] != package:
            continue
        for key, held in [*vars(module).items()]:
            if held is value:
                yield module, key
            elif type(held) is dict:
                yield from ((held, k) for k, v in [*held.items()] if v is value)
