"""Error budget of a kernel against fp64 on the same rounded inputs: derived, not tuned.

    |actual − exact| ≤ 2·max|eager − exact| + ops·eps·condition + store·eps_out·|exact|

`eager` is the same formula in plain PyTorch in the same precision, where a plain bound would be
too wide to mean anything (long recurrences). `condition` is elementwise: the sum of the
magnitudes whose roundings reach that element, from the fp64 inputs. `ops` counts the roundings
on the way. eps is the compute precision's spacing, twice the largest relative rounding, and so
leaves a factor of two. The last term is the rounding of an output narrower than the compute
precision: half its spacing, the whole of it in Triton's interpreter, which truncates to bf16
(cast_impl in triton/runtime/interpreter.py of 3.9). Non-finite values must be the same in the
same places.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_fast import reference
from ppo_fast.testing.calls import Call, promoted, run
from ppo_fast.testing.conditions import CONDITIONS, Conditions
from ppo_fast.testing.head_inputs import DIVERGENCES, HEADS
from ppo_fast.testing.loss_conditions import Narrow

_HALVES = (torch.bfloat16, torch.float16)
_LOSSES = ("logits_ppo_loss", "linear_ppo_loss", "linear_divergence")
_SCALED = tuple(f"grad_{x}" for x in ("logits", "hidden", "weight", "bias", "extra_u", "extra_b"))


def assert_within_budget(
    actual: Tensor,
    exact: Tensor,
    *,
    condition: Tensor | float,
    ops: float,
    eager: Tensor | None = None,
    compute: torch.dtype | None = None,
    store: float = 0.5,
    name: str = "output",
) -> None:
    """Assert the bound of this module's docstring; raises AssertionError with the worst element.

    `compute` is the precision computed in; by default that of `actual`, fp32 where narrower.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)} {tuple(exact.shape)}"
    got, want = actual.double().cpu(), exact.double().cpu()
    odd = ~want.isfinite()
    same = (got == want) | (got.isnan() & want.isnan())
    assert bool((odd == ~got.isfinite()).all() and same[odd].all()), (
        f"{name}: {int((~got.isfinite()).sum())} non-finite values,"
        f" expected {int(odd.sum())}, or elsewhere"
    )
    if compute is None:
        compute = torch.float64 if actual.dtype == torch.float64 else torch.float32
    magnitude = torch.as_tensor(condition, dtype=torch.float64).cpu().expand(want.shape)
    info = torch.finfo(compute)
    # What is below the smallest normal number may be 0: vectors' and GPUs' exp flush it.
    bound = ops * (info.eps * magnitude + info.smallest_normal)
    if eager is not None and want.numel():
        bound = bound + 2 * torch.where(odd, 0.0, (eager.double().cpu() - want).abs()).max()
    if actual.dtype in _HALVES:
        info = torch.finfo(actual.dtype)
        bound = bound + store * info.eps * (want.abs() + 2 * info.smallest_normal)
    excess = torch.where(odd, 0.0, (got - want).abs() - bound)
    if bool((excess > 0).any()):
        worst = excess.argmax()
        where = tuple(int(i) for i in torch.unravel_index(worst, want.shape))
        raise AssertionError(
            f"{name}{where}: got {got.flatten()[worst]:.9g}, exact {want.flatten()[worst]:.9g},"
            f" off by {(got - want).abs().flatten()[worst]:.3g},"
            f" budget {bound.flatten()[worst]:.3g};"
            f" {int((excess > 0).sum())} of {want.numel()} outside"
        )


def assert_agrees(call: Call, backend: str, actual: dict[str, Tensor] | None = None) -> None:
    """Every output and gradient of the call is within its budget of the fp64 reference.

    Moments are those of the advantages that came with them. `actual`: what the backend gave for
    the call, where it was not run as a whole.
    """
    actual = run(call, backend) if actual is None else actual
    exact = run(promoted(call), "reference")
    assert actual.keys() == exact.keys(), f"{sorted(actual)} {sorted(exact)}"
    double = any(x.dtype == torch.float64 for x in call.tensors.values())
    compute = torch.float64 if double else torch.float32
    budgets = _budgets(call, exact, compute, backend)
    interpreted = backend == "triton" and not any(x.is_cuda for x in call.tensors.values())
    for name, want in exact.items():
        if name == "moments":
            want = reference.moments(actual["advantages"], call.tensors.get("mask")).values
        ops, condition, needs_eager = budgets[name]
        eager = run(call, "reference")[name] if needs_eager else None
        assert_within_budget(
            actual[name],
            want,
            condition=condition,
            ops=ops,
            eager=eager,
            compute=compute,
            store=_stores(call.op, name, interpreted),
            name=f"{call.op}.{name}",
        )


def _budgets(
    call: Call, exact: dict[str, Tensor], compute: torch.dtype, backend: str
) -> Conditions:
    eps = torch.finfo(compute).eps
    main = next(iter(call.tensors.values()))
    if call.op in (HEADS | DIVERGENCES):
        return CONDITIONS[call.op](promoted(call), exact, eps, narrow=narrow_of(main, backend))
    return CONDITIONS[call.op](promoted(call), exact, eps)


def narrow_of(main: Tensor, backend: str) -> Narrow:
    """Largest relative and absolute rounding of dlogits before their products; None for none."""
    on_gpu = backend in ("triton", "cuda")  # interpreted or emulated, or it is there
    if main.dtype in _HALVES and (on_gpu or (main.is_cuda and backend != "reference")):
        info = torch.finfo(main.dtype)
        return info.eps / 2, info.smallest_normal * info.eps / 2
    if main.dtype == torch.bfloat16 and backend == "cpu":
        # Where the CPU has dot products of bf16, two such numbers; a subnormal one counts as 0.
        return 2.0**-16, torch.finfo(torch.bfloat16).smallest_normal
    return None


def _stores(op: str, name: str, interpreted: bool) -> float:
    """Roundings to an output's own type, in units of its eps."""
    # The head's losses store their gradient, and the backward stores it once more, scaled.
    again = 0.5 if op in _LOSSES and name in _SCALED else 0.0
    return again + (1.0 if interpreted else 0.5)
