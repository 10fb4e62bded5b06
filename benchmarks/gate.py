"""The correctness gate: outputs against the fp64 reference, within their derived error budget."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ppo_fast import Stats, reference
from ppo_fast.testing import Call, assert_within_budget, promoted, run
from ppo_fast.testing.conditions import CONDITIONS

# A statistic that is a mean over tokens: its sum's field in `Stats`, where the names differ.
_MEANS = {
    "policy_loss": "policy_loss", "entropy": "entropy", "ref_kl": "ref_kl", "kl_k1": "kl_k1",
    "kl_k2": "kl_k2", "kl_k3": "kl_k3", "ratio_mean": "ratio",
}  # fmt: skip


class Gate:
    """The exact results of one call, computed once for all its providers."""

    def __init__(self, call: Call) -> None:
        self._call, wide = call, promoted(call)
        double = any(x.dtype == torch.float64 for x in call.tensors.values())
        self._compute = torch.float64 if double else torch.float32
        self._exact = run(wide, "reference")
        self._budgets = CONDITIONS[call.op](wide, self._exact, torch.finfo(self._compute).eps)
        if "stats" in self._exact:
            self._add_computed(self._exact["stats"])

    def _add_computed(self, stats: Tensor) -> None:
        """Let peers that return means, not sums, be checked too.

        They add in fp32: √n roundings of the mean magnitude, which the sum's condition holds. For
        a share of tokens, ess and explained variance, which are near 1 at most, that is 1.
        """
        fields = Stats(stats).compute()
        n = max(1.0, fields["n_tokens"])
        ops, sums, _ = self._budgets["stats"]
        for name, value in fields.items():
            if name in self._exact or math.isnan(value):
                continue
            self._exact[name] = torch.tensor(value, dtype=torch.float64)
            if name in _MEANS:
                condition = Stats(sums).field(_MEANS[name]) / n
                self._budgets[name] = (ops, condition, False)
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

        A `plain` PyTorch peer may err twice as much as the reference does in its precision;
        `roundings` are granted beyond the op's own.
        """
        assert outputs, "no output to check"
        for name, actual in outputs.items():
            ops, condition, needs_eager = self._budgets[name]
            needs_eager = needs_eager or (plain and name in self._eager)
            exact = self._exact[name]
            if name == "moments":  # they are those of the advantages that came with them
                mask = self._call.tensors.get("mask")
                exact = reference.moments(outputs["advantages"], mask).values
            assert_within_budget(
                actual,
                exact,
                condition=condition,
                ops=ops + roundings,
                eager=self._eager[name] if needs_eager else None,
                compute=self._compute,
                name=name,
            )
