"""The correctness gate: outputs against the fp64 reference, within their derived error budget.

It runs on the CPU. Independent rows that are too many for fp64 are represented by a sample, evenly
spread from the first to the last.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from benchmarks.ops.inputs import on
from ppo_fast import RolloutStats, Stats, TokenStats, reference
from ppo_fast.testing import Call, assert_within_budget, promoted, run
from ppo_fast.testing.budget import narrow_of
from ppo_fast.testing.conditions import CONDITIONS, Conditions

# A statistic that is a mean over tokens: its sum's field in `Stats`, where the names differ.
_MEANS = {
    "policy_loss": "policy_loss",
    "entropy": "entropy",
    "ref_kl": "ref_kl",
    "kl_k1": "kl_k1",
    "kl_k2": "kl_k2",
    "kl_k3": "kl_k3",
    "ratio_mean": "ratio",
}
_EXTREMES = ("ratio_min", "ratio_max")

# Losses of logits: means over the rows.
_MEANS_OF_ROWS = ("linear_ppo_loss", "logits_ppo_loss", "linear_divergence", "divergence")
# What a sample of the rows can answer for.
_PER_ROW = (*TokenStats._fields, "divergence", "grad_logits", "grad_hidden", "grad_extra_u")
# Tensors that every row shares.
_HEADS = ("weight", "teacher_weight")
_SHARED = (*_HEADS, "extra_b")
# Logits in the sample: on a CPU 0.5 GB of fp64, and some temporaries of that size. A GPU's time is
# lent, and its host would take half a minute for the products of a head's sample of that size.
_SAMPLE = {"cpu": 2**26, "cuda": 2**23}


def _sampled(call: Call) -> tuple[Call, Tensor | None]:
    """The call with as many of its rows as fit the sample, and which; None where all fit."""
    main = call.tensors.get("hidden", call.tensors.get("logits"))
    if main is None:
        return call, None
    heads = [call.tensors[name].shape[0] for name in _HEADS if name in call.tensors]
    logits = [x.shape[-1] for name, x in call.tensors.items() if name.endswith("logits")]
    n, fit = main.shape[0], max(2, _SAMPLE[main.device.type] // sum(heads or logits))
    if n <= fit:
        return call, None
    rows = torch.linspace(0, n - 1, fit, dtype=torch.float64).long()
    tensors = {
        k: x if k in _SHARED else x[rows.to(x.device)]
        for k, x in call.tensors.items()
        if k != "row_index"  # what it leaves out is masked
    }
    options = dict(call.options)
    if "support" in options:
        options["support"] = options["support"].rows(rows)
    if call.op in _MEANS_OF_ROWS:  # divided by all rows: each row's results stay what they were
        live = float(call.tensors["mask"].sum())
        return call._replace(tensors=tensors, options=options | {"denom": live}), rows
    cotangents = {k: x[rows.to(x.device)] for k, x in call.cotangents.items()}
    return Call(call.op, tensors, options, cotangents), rows


def _budgets(wide: Call, exact: dict[str, Tensor], eps: float, call: Call) -> Conditions:
    """A head's gradient by the logits may be rounded before the products."""
    condition = CONDITIONS[call.op]
    hidden = call.tensors.get("hidden")
    if hidden is None:
        return condition(wide, exact, eps)
    return condition(wide, exact, eps, narrow_of(hidden, "cuda" if hidden.is_cuda else "cpu"))


class Gate:
    """The exact results of one call, computed once for all its providers."""

    def __init__(self, call: Call) -> None:
        sample, self._rows = _sampled(call)
        self._call = on(sample, "cpu")
        wide = promoted(self._call)
        double = any(x.dtype == torch.float64 for x in call.tensors.values())
        self._compute = torch.float64 if double else torch.float32
        self._exact = run(wide, "reference")
        self._budgets = _budgets(wide, self._exact, torch.finfo(self._compute).eps, call)
        if "stats" in self._exact:
            self._add_computed(self._exact["stats"])

    def _add_computed(self, stats: Tensor) -> None:
        """Let peers that return means, not sums, be checked too.

        They add in fp32: √n roundings of the mean magnitude, which the sum's condition holds. For
        a share of tokens, ess and explained variance, which are near 1 at most, that is 1.
        """
        kind = RolloutStats if self._call.op == "rollout_weights" else Stats
        fields = kind(stats).compute()
        n = max(1.0, fields["n_tokens"])
        ops, sums, _ = self._budgets["stats"]
        for name, value in fields.items():
            if name in self._exact or math.isnan(value):
                continue
            self._exact[name] = torch.tensor(value, dtype=torch.float64)
            if kind is Stats and name in _MEANS:
                condition = Stats(sums).field(_MEANS[name]) / n
                self._budgets[name] = (ops, condition, False)
            elif kind is Stats and name in _EXTREMES:  # of one token: nothing is added
                self._budgets[name] = (ops, Stats(sums).field(name), False)
            else:
                self._budgets[name] = (math.sqrt(n), torch.tensor(abs(value) + 1.0), False)

    @functools.cached_property
    def _eager(self) -> dict[str, Tensor]:
        """The reference in the call's own precision: what plain PyTorch errs by."""
        return run(self._call, "reference")

    def check(
        self, outputs: dict[str, Tensor], *, plain: bool = False, roundings: float = 0.0
    ) -> None:
        """Raise AssertionError, naming the output and its worst element, if any is off.

        `grad_logits|logprobs` is the gradient of that one output. A `plain` PyTorch peer may err
        twice as much as the reference does in its precision; `roundings` are granted beyond the
        op's own.
        """
        assert outputs, "no output to check"
        for label, actual in outputs.items():
            name, _, only = label.partition("|")
            gate = self._only(only) if only else self
            if self._rows is not None:
                if name not in _PER_ROW:
                    continue
                actual = actual[self._rows.to(actual.device)]
            gate._check(name, actual, outputs.get("advantages"), plain, roundings)

    @functools.cache  # noqa: B019 - a gate lives as long as its case is measured
    def _only(self, cotangent: str) -> Gate:
        """The gate of the same call where one output alone has a gradient."""
        kept = {
            k: x if k == cotangent else torch.zeros_like(x)
            for k, x in self._call.cotangents.items()
        }
        return Gate(self._call._replace(cotangents=kept))

    def _check(
        self, name: str, actual: Tensor, advantages: Tensor | None, plain: bool, roundings: float
    ) -> None:
        ops, condition, needs_eager = self._budgets[name]
        needs_eager = needs_eager or (plain and name in self._eager)
        exact = self._exact[name]
        if name == "moments" and advantages is not None:  # they are of those that came with them
            exact = reference.moments(advantages.cpu(), self._call.tensors.get("mask")).values
        assert_within_budget(
            actual,
            exact,
            condition=condition,
            ops=ops + roundings,
            eager=self._eager[name] if needs_eager else None,
            compute=self._compute,
            name=name,
        )
