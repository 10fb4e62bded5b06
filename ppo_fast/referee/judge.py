"""Comparison of a trainer's results with a formula, and the diagnosis of what differs.

Rounding is no difference: |given − exact| ≤ (64 + terms)·ε·size + slack, where ε is the spacing of
the precision that the trainer computes in, `size` what a formula says a rounding can reach, and
terms the number of entries that are summed. A difference is explained by the fewest changes of the
formula's reading under which all cases agree again.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppo_fast.referee.formulas import Change, Exact, Formula

_OPS = 64
# Changes that explain one part together.
_MOST = 5

Given = dict[str, Tensor]


class Difference(NamedTuple):
    """Largest difference of one output in one case; `given` and `exact` there."""

    case: str
    output: str
    given: float
    exact: float
    absolute: float
    relative: float


@dataclass(frozen=True)
class Finding:
    """A difference from the formula: the part, what it is, and where it shows most."""

    part: str
    reading: str
    key: str
    place: str
    paper: str
    cases: tuple[str, ...]
    worst: Difference
    documented: str | None = None


@dataclass
class Judged:
    """Results of one part: differences, and the cases that agree or could not be run."""

    findings: list[Finding] = field(default_factory=list)
    agree: list[str] = field(default_factory=list)


class Trial(NamedTuple):
    """One case: the batch, and what the trainer gave for it."""

    case: str
    batch: Any
    given: Given

    @property
    def batch_size(self) -> int:
        """Number of entries of the outputs."""
        return sum(x.numel() for x in self.given.values())


def difference(name: str, given: Tensor, exact: Exact, eps: float) -> Difference | None:
    """The entry farthest outside rounding, or None where all are within it."""
    keep = torch.ones_like(exact.value, dtype=torch.bool) if exact.keep is None else exact.keep
    if given.shape != exact.value.shape:
        raise ValueError(
            f"referee: {name} must have the shape {tuple(exact.value.shape)},"
            f" got {tuple(given.shape)}"
        )
    got, want = given.detach().double()[keep], exact.value[keep]
    if not want.numel():
        return None
    size = torch.as_tensor(exact.size, dtype=torch.float64).expand(keep.shape)[keep]
    slack = torch.as_tensor(exact.slack, dtype=torch.float64).expand(keep.shape)[keep]
    both = got.isfinite() & want.isfinite()
    bound = (_OPS + keep.numel()) * (eps * size + torch.finfo(torch.float32).tiny) + slack
    excess = torch.where(both, (got - want).abs() - bound, -1.0)
    if bool((got.isfinite() != want.isfinite()).any()) and not bool((~want.isfinite()).any()):
        worst = int((~got.isfinite()).nonzero()[0])
    elif bool(want.isfinite().all()) != bool(got.isfinite().all()):
        worst = int((~want.isfinite()).nonzero()[0])
    elif bool((excess > 0).any()):
        worst = int(excess.argmax())
    else:
        return None
    absolute = float((got[worst] - want[worst]).abs())
    largest = float(want[want.isfinite()].abs().max()) if bool(want.isfinite().any()) else 0.0
    relative = absolute / largest if largest else float("inf")
    return Difference("", name, float(got[worst]), float(want[worst]), absolute, relative)


def differences(formula: Formula, trial: Trial, eps: float) -> list[Difference]:
    """Every output that differs from the formula in a case.

    Where both losses are NaN, nothing is asked of the gradients.
    """
    exact = formula.exact(trial.batch, eps)
    losses = (exact["loss"].value, trial.given["loss"]) if "loss" in exact else ()
    if losses and not any(bool(x.isfinite()) for x in losses):
        return []
    found = (difference(name, trial.given[name], exact[name], eps) for name in trial.given)
    return [one._replace(case=trial.case) for one in found if one is not None]


def diagnose(formula: Any, trials: Sequence[Trial], eps: float) -> tuple[list[Change], set[str]]:
    """The fewest changes that explain the trials, and the cases that they leave unexplained."""
    pool = formula.changes()
    chosen: list[Change] = []
    open_cases = _left(formula, chosen, trials, eps)
    while open_cases and len(chosen) < _MOST:
        # Those that differ first: a change that mends none of them is soon told.
        order = sorted(trials, key=lambda t: (t.case not in open_cases, t.batch_size))
        best = None
        for step in [*((c,) for c in pool), *itertools.combinations(pool, 2)]:
            if len(step) == 2 and best is not None:  # two at once only where no single one helps
                break
            if _conflict((*chosen, *step)):
                continue
            most = len(open_cases if best is None else best[1])
            cases = _left(formula, [*chosen, *step], order, eps, most)
            if len(cases) < most:
                best = [*chosen, *step], cases
        if best is None:
            break
        chosen, open_cases = best
    for change in list(chosen):
        fewer = [c for c in chosen if c is not change]
        if _left(formula, fewer, trials, eps) <= open_cases:
            chosen = fewer
    return chosen, open_cases


def _left(
    formula: Any,
    changes: Sequence[Change],
    trials: Sequence[Trial],
    eps: float,
    most: int | None = None,
) -> set[str]:
    """The cases that still differ under these changes; no more than `most` are looked for."""
    reading = _changed(formula, changes)
    found: set[str] = set()
    for trial in trials:
        if differences(reading, trial, eps):
            found.add(trial.case)
        if len(found) == most:
            break
    return found


def _changed(formula: Any, changes: Sequence[Change]) -> Any:
    return formula.changed({k: v for change in changes for k, v in change.fields.items()})


def _conflict(changes: Sequence[Change]) -> bool:
    fields = [name for change in changes for name in change.fields]
    return len(set(fields)) < len(fields)


def judge(
    formula: Any,
    trials: Sequence[Trial],
    eps: float,
    place: str,
    documented: dict[str, str],
) -> Judged:
    """Findings of one part over all its trials."""
    per_case = {t.case: differences(formula, t, eps) for t in trials}
    found = Judged(agree=[case for case, some in per_case.items() if not some])
    differ = [t for t in trials if per_case[t.case]]
    if not differ:
        return found
    chosen, unexplained = diagnose(formula, trials, eps)

    def finding(words: str, key: str, found: Sequence[Difference]) -> Finding:
        cases = tuple(dict.fromkeys(d.case for d in found))
        worst, own = max(found, key=_rank), documented.get(key)
        return Finding(formula.part, words, key, place, formula.paper, cases, worst, own)

    for change in chosen:
        # Beside the formula with the other changes alone, so that the numbers are this one's.
        without = _changed(formula, [c for c in chosen if c is not change])
        own = [
            d for t in differ if t.case not in unexplained for d in differences(without, t, eps)
        ]
        if own:
            found.findings.append(finding(change.words, change.key, own))
    for case in sorted(unexplained):
        words = "differs by no reading that is known here"
        found.findings.append(finding(words, "unknown", per_case[case]))
    return found


def _rank(one: Difference) -> tuple[bool, bool, float]:
    """A number that is not finite first, then the loss, then what is larger."""
    odd = one.relative != one.relative
    return odd, one.output == "loss", 0.0 if odd else one.relative
