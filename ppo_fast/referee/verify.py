"""The referee: every part of a trainer on every batch, beside its formula."""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import ppo_fast
from ppo_fast.integrations import ForeignPatchError
from ppo_fast.integrations._origin import check_own
from ppo_fast.referee import cases
from ppo_fast.referee.judge import Finding, Trial, judge
from ppo_fast.referee.statements import Statements
from ppo_fast.referee.trainers import TRAINERS, Function, Missing, Probe, adapter, place


class NotRunError(Exception):
    """The trainer is not installed, or nothing of it could be run; the message says why."""


@dataclass
class Part:
    """One function of a trainer after its cases."""

    name: str
    part: str
    place: str
    paper: str
    dtype: str
    agree: list[str]
    findings: list[Finding]
    left_out: dict[str, str]
    raised: dict[str, str]
    taken: tuple[str, ...]


@dataclass
class Report:
    """Everything that the referee says of a trainer."""

    trainer: str
    version: str
    options: dict[str, Any]
    seed: int
    parts: list[Part] = field(default_factory=list)
    not_run: list[Missing] = field(default_factory=list)

    @property
    def findings(self) -> list[Finding]:
        """Findings of all parts."""
        return [finding for part in self.parts for finding in part.findings]

    @property
    def status(self) -> int:
        """Exit status: 2 where nothing ran or a call raised, 1 where something differs, else 0."""
        if self.findings:
            return 1
        return 2 if not self.parts or any(part.raised for part in self.parts) else 0


def verify(
    trainer: str,
    options: dict[str, Any] | None = None,
    *,
    function: Function | None = None,
    like: str | None = None,
    seed: int = 0,
    only: Sequence[str] = (),
) -> Report:
    """Run a trainer's functions beside their formulas.

    Args:
        trainer: a key of `ppo_fast.referee.TRAINERS`.
        options: of the trainer, by its own names; the others have its defaults.
        function: a function in the place of the trainer's, with the same arguments.
        like: the part of the trainer that `function` stands for, such as "policy_loss".
        seed: of the batches.
        only: names of cases; all of them where there is none.

    Raises:
        ValueError: an unknown trainer, option, part or case.
        NotRunError: the trainer is not installed or cannot be imported.
    """
    module = adapter(trainer)
    chosen = {**module.OPTIONS, **_known(trainer, module.OPTIONS, options or {})}
    _known_cases(only)
    version = _version(trainer, module.PACKAGE)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = module.probes(chosen)
    except ImportError as error:
        raise NotRunError(f"{trainer}: {type(error).__name__}: {error}") from error
    for probe in found:
        if module.PACKAGE is not None and isinstance(probe, Probe):
            _check_own(trainer, module.PACKAGE, probe)
    if function is not None:
        found = [_stand_in(trainer, found, like, function)]
    elif trainer == "plain":
        raise ValueError("verify: plain needs FILE.py:function and --like plain.PART")
    report = Report(trainer, version, chosen, seed)
    for probe in found:
        if isinstance(probe, Missing):
            report.not_run.append(probe)
            continue
        report.parts.append(run(probe, seed, only))
    return report


def run(probe: Probe, seed: int, only: Sequence[str] = ()) -> Part:
    """One function on its cases."""
    options = dict(probe.case)
    if probe.kind == "tokens":
        options = {"edges": cases.Edges(), "per_sequence": False, **options}
    part = Part(
        probe.name,
        probe.formula.part,
        place(probe.function),
        probe.formula.paper,
        str(probe.dtype).removeprefix("torch."),
        [],
        [],
        dict(probe.left_out),
        {},
        probe.taken,
    )
    trials = []
    for name in cases.NAMES[probe.kind]:
        if name in probe.left_out or (only and name not in only):
            continue
        batch = cases.make(probe.kind, name, seed, **options)
        given = _given(probe, batch)
        if isinstance(given, str):
            part.raised[name] = given
        else:
            trials.append(Trial(name, batch, given))
    eps = torch.finfo(probe.dtype).eps
    judged = judge(probe.formula, trials, eps, part.place, dict(probe.documented))
    part.agree, part.findings = judged.agree, judged.findings
    return part


def _given(probe: Probe, batch: Any) -> dict[str, torch.Tensor] | str:
    """The function's outputs, or what it raised: any error of the trainer's is its answer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return probe.call(probe.function, batch)
        except Exception as error:
            return f"{type(error).__name__}: {error}"


def _known(trainer: str, names: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(
                f"verify: {trainer} has no option {name!r} that is checked here, only"
                f" {', '.join(names) or 'none'}{hint}"
            )
    return given


def _known_cases(only: Sequence[str]) -> None:
    every = [name for names in cases.NAMES.values() for name in names]
    for name in only:
        if name not in every:
            known = ", ".join(dict.fromkeys(every))
            raise ValueError(f"verify: cases must be of {known}, got {name!r}")


def _version(trainer: str, package: str | None) -> str:
    if package is None:
        return ppo_fast.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise NotRunError(f"{trainer}: the package {package} is not installed") from None


def _check_own(trainer: str, package: str, probe: Probe) -> None:
    """Raise NotRunError where another package has replaced the trainer's function.

    Statements were read from the trainer's file, whatever stands in their place.
    """
    if isinstance(probe.function, Statements):
        return
    try:
        check_own(trainer, package, probe.name, probe.function)
    except ForeignPatchError as error:
        raise NotRunError(str(error)) from error


def _stand_in(
    trainer: str, found: Sequence[Probe | Missing], like: str | None, function: Function
) -> Probe:
    probes = {probe.name: probe for probe in found if isinstance(probe, Probe)}
    if like not in probes:
        raise ValueError(
            f"verify: like must name one of {', '.join(f'{trainer}.{n}' for n in probes)},"
            f" got {trainer}.{like}"
        )
    return probes[like].by(function)


def load(target: str) -> Function:
    """The function of `FILE.py:name` or of `package.module:name`."""
    source, _, name = target.partition(":")
    if not name:
        raise ValueError(f"verify: target must be FILE.py:function, got {target!r}")
    if source.endswith(".py"):
        path = Path(source)
        if not path.is_file():
            raise ValueError(f"verify: target must be an existing file, got {source!r}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(source)
        except ImportError as error:
            raise NotRunError(f"{source}: {error}") from error
    value: Any = module
    for attribute in name.split("."):
        if not hasattr(value, attribute):
            raise ValueError(f"verify: {source} has no {name!r}")
        value = getattr(value, attribute)
    return value


def read_options(words: Sequence[str]) -> dict[str, Any]:
    """Options of `key=value` words and of JSON or YAML files, later ones first."""
    found: dict[str, Any] = {}
    for word in words:
        if "=" in word:
            key, _, text = word.partition("=")
            found[key] = _value(text)
        else:
            found |= _file(Path(word))
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        words: dict[str, Any] = {"None": None, "True": True, "False": False}
        return words.get(text, text)


def _file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"verify: --config must be key=value or an existing file, got {path}")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        found = json.loads(text)
    else:
        yaml: Any = importlib.import_module("yaml")
        found = yaml.safe_load(text)
    if not isinstance(found, dict):
        raise ValueError(f"verify: {path} must hold options by name, got {type(found).__name__}")
    return found


__all__ = ["TRAINERS", "NotRunError", "Part", "Report", "load", "read_options", "verify"]
