"""Reversible patches of a trainer: recognition, replacement, call counts, restoration.

A `Swap` names one function of the trainer and its replacement. An `Integration` applies all swaps
or none. A place is recognised by its content (`_content.py`), not by the trainer's version. A
replaced function is found by identity in every loaded module of the trainer, so that names
imported from elsewhere and registries are patched, and restored, too.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ppo_fast.integrations import _places
from ppo_fast.integrations._content import (
    Content,
    Definition,
    Statement,
    content_of,
    definitions_of,
    described,
    difference,
)
from ppo_fast.integrations._errors import (
    AlreadyPatchedError,
    ForeignPatchError,
    IntegrationError,
    MismatchError,
    NeverReachedError,
    NoPlaceError,
    NotPatchedError,
    TrainerMissingError,
    Uncovered,
    UnknownSourceError,
)
from ppo_fast.integrations._extract import Block, extract
from ppo_fast.integrations._first_call import first_call
from ppo_fast.integrations._known import Known, load, span
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
        having: how a statement of the function begins (unparsed), where the signature does not
            tell apart the functions that several swaps replace.
        optional: whether some versions lack the place; nothing is then replaced there.
        helpers: functions that a whole function calls, by their names in its module: what they
            compute, `fused` does as well, so they are part of the place's content.
    """

    op: str
    place: str
    fused: Callable[..., Any]
    block: Block | None = None
    view: Callable[[Arguments, Any], Any] = lambda arguments, result: result
    sample: Callable[[Arguments], Arguments] = lambda arguments: arguments
    having: str = ""
    optional: bool = False
    helpers: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Name of the place's content among the known ones."""
        return f"{self.place}#{self.op}" if self.block else self.place


class Found(NamedTuple):
    """A swap, and what stands at its place."""

    swap: Swap
    holder: Any
    key: str
    original: Any
    content: Content
    statements: list[Statement]


@dataclass(frozen=True)
class Check:
    """Findings of `apply()`: the version, whether it is tested, and what is not known.

    Attributes:
        unknown: the first difference of each place whose content is not known.
        fits: whether the names that go in and out are known ones at every place.
    """

    version: str
    tested: bool
    unknown: tuple[str, ...]
    fits: bool


@dataclass
class Integration:
    """All swaps of one trainer; they are applied together and reverted together.

    In the place of a swap several may stand: the first that fits what is there is taken.
    """

    name: str
    package: str
    extra: str
    swaps: tuple[Swap | tuple[Swap, ...], ...]
    on_request: tuple[str, ...] = ()  # ops that most runs do not reach: only if named
    instead: dict[str, str] = field(default_factory=dict)  # ops for others that are not there
    known: Known | None = None  # by default, the file of this name
    module: str = ""  # what is imported, if it has another name than the package
    _calls: dict[str, Calls] = field(default_factory=dict)
    _changes: list[Change] = field(default_factory=list)

    @property
    def root(self) -> str:
        """Name of the trainer's top module."""
        return self.module or self.package

    @property
    def ops(self) -> tuple[str, ...]:
        """Names of all ops that can be patched."""
        return tuple(dict.fromkeys(each[0].op for each in self._alternatives))

    @property
    def calls(self) -> dict[str, Calls]:
        """Calls of each patched op since `apply()`; empty when nothing is patched."""
        return self._calls

    def apply(self, ops: tuple[str, ...] | None = None, *, unknown: str = "refuse") -> list[str]:
        """Patch the trainer and return every place patched.

        `ops` are those to patch, of `self.ops`; by default all but those `on_request`. A version
        that is not tested is patched with a warning if its source is known at every place.
        `unknown="compare"` patches source that is not known, too, with a warning, where the names
        that go in and out are known ones; the comparison of the first call is then all that
        tells whether it means the same.

        Raises:
            IntegrationError: see its subclasses. Nothing is then patched.
            ValueError: `ops` or `unknown` names one that there is not.
        """
        if self._changes:
            raise AlreadyPatchedError(f"{self.name}: already patched; call revert() first")
        found = self.recognised(ops, unknown=unknown)
        calls = {op: Calls() for op in self.ops if op in {one.swap.op for one in found}}
        self._changes = self._plan(found, calls)
        self._calls = calls
        for change in self._changes:
            _places.put(change.holder, change.key, change.new)
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
    def patched(
        self, ops: tuple[str, ...] | None = None, *, unknown: str = "refuse"
    ) -> Iterator[dict[str, Calls]]:
        """`apply(...)` around a block, `revert()` after it; gives the calls as they count up.

        If the block raises, everything is put back and the block's error is raised.
        """
        self.apply(ops, unknown=unknown)
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
            found = _places.held(change.holder, change.key)
            if found is not change.new:
                raise ForeignPatchError(
                    f"{self.name}: {change.place} has been replaced by {file_of(found)} since"
                    " apply(); undo that first"
                )
        for change in self._changes:
            _places.put(change.holder, change.key, change.original)
            # Modules imported since have taken the replacement by name.
            for holder, key in _places.importers(self.root, change.new):
                _places.put(holder, key, change.original)
        self._changes = []
        calls, self._calls = self._calls, {}
        return calls

    @property
    def tested(self) -> tuple[str, ...]:
        """The versions that the tests ran with, from the lowest."""
        return self._known.tested

    def installed(self) -> str:
        """The installed version of the trainer; raises TrainerMissingError where there is none."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError as error:
            raise TrainerMissingError(
                f"{self.name}: {self.package} is not installed: pip install"
                f" 'ppo_fast[{self.extra}]'"
            ) from error

    def check(self, ops: tuple[str, ...] | None = None) -> Check:
        """Findings of `apply(ops)` in the installed version; nothing is patched.

        Raises:
            IntegrationError: a place is not there, or is not the trainer's own any more.
        """
        return self._compare(self.find(ops))

    def recognised(
        self, ops: tuple[str, ...] | None = None, *, unknown: str = "refuse"
    ) -> list[Found]:
        """The places of `ops`; refuses and warns as `apply` does, and patches nothing."""
        if unknown not in ("refuse", "compare"):
            raise ValueError(
                f"{self.name}: unknown must be 'refuse' or 'compare', got {unknown!r}"
            )
        found = self.find(ops)
        check = self._compare(found)
        what = f"{self.name}: {self.package} {check.version}"
        if check.unknown and (unknown == "refuse" or not check.fits):
            way = ". apply(unknown='compare') patches it all the same, and compares first calls"
            raise UnknownSourceError(
                f"{what}, {'; '.join(check.unknown)}{way if check.fits else ''}"
            )
        if check.unknown:
            self._warn(f"{what} is patched although {'; '.join(check.unknown)}")
        elif not check.tested:
            self._warn(
                f"{what} is patched although not tested (tested: {span(self.tested)}): its source"
                " is a known one at every place, and first calls are compared"
            )
        return found

    def _compare(self, found: list[Found]) -> Check:
        unknown, fits = [], True
        for one in found:
            place, known = one.swap.key, self._known.contents(one.swap.key)
            if any(content.covers(one.content) for content in known):
                continue
            fits = fits and any(content.fits(one.content) for content in known)
            what = difference(one.content, one.statements, known) if known else "it is not known"
            unknown.append(f"{one.swap.place}: {what} (known: {self._known.versions(place)})")
        version = self.installed()
        return Check(version, version in self.tested, tuple(unknown), fits)

    def find(self, ops: tuple[str, ...] | None = None) -> list[Found]:
        """The swaps of `ops` that fit what is there, with what stands at their places."""
        default = tuple(op for op in self.ops if op not in self.on_request)
        chosen = default if ops is None else tuple(ops)
        if not chosen or set(chosen) - set(self.ops):
            raise ValueError(f"{self.name}: ops must be among {self.ops}, got {chosen}")
        found = self.present(chosen)
        missing = set(chosen) - {one.swap.op for one in found}
        if ops is None:
            found += self.present(tuple(self.instead[op] for op in missing & self.instead.keys()))
        if not found or (missing and ops is not None):
            raise NoPlaceError(
                f"{self.name}: {self.package} {self.installed()} has no place for"
                f" {', '.join(op for op in chosen if op in missing)} (tested: {span(self.tested)})"
            )
        return found

    def present(self, ops: tuple[str, ...]) -> list[Found]:
        """As `find`, of ops that may be missing."""
        self.installed()
        each = [self._first(some) for some in self._alternatives if some[0].op in ops]
        return [one for one in each if one is not None]

    def _first(self, alternatives: tuple[Swap, ...]) -> Found | None:
        """The first alternative that fits; None if all are optional and none is there."""
        errors: list[IntegrationError] = []
        for swap in alternatives:
            try:
                return self._look(swap)
            except (UnknownSourceError, TrainerMissingError) as error:
                if not (swap.optional and isinstance(error, NoPlaceError)):
                    errors.append(error)
        if not errors:
            return None
        kind = next((type(e) for e in errors if not isinstance(e, NoPlaceError)), NoPlaceError)
        reasons = ", ".join(dict.fromkeys(map(str, errors)))
        raise kind(
            f"{self.name}: {self.package} {self.installed()}, {reasons} (tested:"
            f" {span(self.tested)})"
        ) from errors[-1]

    def _look(self, swap: Swap) -> Found:
        """The place and its content; raises UnknownSourceError where the swap does not fit it."""
        holder, key = _places.find(self.root, swap.place)
        original = _places.get(holder, key)
        check_own(self.name, self.root, swap.place, original)
        try:
            if swap.block is None:
                content, statements = content_of(holder, key, self._helpers(swap))
                _fit(swap.fused, content.takes)
            else:
                part = extract(original, {swap.op: swap.block})[0][swap.op]
                content, statements = described(part.inputs, part.outputs, part.body)
            if swap.having and not any(s.text.startswith(swap.having) for s in statements):
                raise UnknownSourceError(f"there is no statement `{swap.having}`")
        except UnknownSourceError as error:
            raise UnknownSourceError(f"{swap.place}: {error}") from error
        return Found(swap, holder, key, original, content, statements)

    def _helpers(self, swap: Swap) -> list[Definition]:
        """Those that are there: nothing calls the others, or that statement is not a known one."""
        module, found = swap.place.partition(":")[0], []
        for name in swap.helpers:
            try:
                found += definitions_of(*_places.find(self.root, f"{module}:{name}"))
            except NoPlaceError:
                continue
        return found

    @property
    def _alternatives(self) -> list[tuple[Swap, ...]]:
        return [each if isinstance(each, tuple) else (each,) for each in self.swaps]

    @functools.cached_property
    def _known(self) -> Known:
        return load(self.name) if self.known is None else self.known

    def _warn(self, text: str) -> None:
        warnings.warn(text, RuntimeWarning, stacklevel=4)

    def _plan(self, found: list[Found], calls: dict[str, Calls]) -> list[Change]:
        """Every change; nothing is changed yet."""
        planned = []
        for place in dict.fromkeys(one.swap.place for one in found):
            here = [one for one in found if one.swap.place == place]
            _, holder, key, original, *_ = here[0]
            swaps = [one.swap for one in here]
            if swaps[0].block is None:
                new = self._counted(swaps[0], original, calls[swaps[0].op])
            else:
                new = self._rebuilt(original, swaps, calls)
            held = _places.held(holder, key)
            if isinstance(held, staticmethod):
                new = staticmethod(new)
            planned.append(Change(holder, key, _places.named(holder, key), held, new))
            planned += [
                Change(other, name, _places.named(other, name), original, new)
                for other, name in _places.importers(self.root, original)
                if (other, name) != (holder, key)
            ]
        return planned

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


def _fit(fused: Callable[..., Any], takes: tuple[str, ...]) -> None:
    """Raise UnknownSourceError unless `fused` can be called as what takes these parameters."""
    given = inspect.signature(fused).parameters
    if any(p.kind is p.VAR_KEYWORD for p in given.values()):
        return
    names = [name.partition("=")[0] for name in takes if name not in ("/", "*")]
    by_order = names[: takes.index("*")] if "*" in takes else names
    foreign = [name for name in names if name not in given]
    if foreign:
        raise UnknownSourceError(f"it takes `{foreign[0]}`")
    if [*given][: len(by_order)] != by_order:
        raise UnknownSourceError(f"it takes ({', '.join(by_order)}) in this order")
    needed = [n for n, p in given.items() if p.default is p.empty and n not in names]
    if needed:
        raise UnknownSourceError(f"it does not take `{needed[0]}`")
