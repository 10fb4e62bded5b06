"""gae: accuracy, identities, exact integers, episode ends, layouts, NaN containment."""

from __future__ import annotations

import pytest
import spelled_out
import torch

import ppo_fast
from ppo_fast import testing
from ppo_fast.testing import gae_call, run

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ENDS = ("next_values", "terminated", "truncated")
EXTRAS: list[tuple[str, ...]] = [
    (),
    ("bootstrap", "terminated"),
    ENDS,
    (*ENDS, "rho", "c"),
    ("bootstrap", "lam"),
    ("row_lam", "lam_returns"),
    ("bootstrap", "rho", "c", "lam", "lam_returns"),
]


@pytest.mark.case("N1")
@pytest.mark.parametrize("masked", ["carry", "zero"])
@pytest.mark.parametrize("extras", EXTRAS, ids="+".join)
def test_within_budget(backend: str, device: str, extras: tuple[str, ...], masked: str) -> None:
    for mask in (None, "random", "right"):
        call = gae_call((5, 37), extras=extras, masked=masked, mask=mask, device=device)
        testing.assert_agrees(call, backend)


@pytest.mark.parametrize("extras", EXTRAS, ids="+".join)
@pytest.mark.parametrize("layout", ["packed", "time_major"])
def test_other_layouts(backend: str, device: str, extras: tuple[str, ...], layout: str) -> None:
    for masked in ("carry", "zero"):
        options = {"extras": extras, "masked": masked, "device": device}
        if layout == "packed":
            call = gae_call((83,), packed=True, **options)
        else:
            call = gae_call((37, 5), time_major=True, **options)
        testing.assert_agrees(call, backend)


@pytest.mark.case("N3")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_precisions(backend: str, device: str, dtype: torch.dtype) -> None:
    """Half-precision inputs round once; the recursion over them is fp32."""
    call = gae_call((3, 50), dtype=dtype, device=device, extras=(*ENDS, "rho", "c", "lam"))
    testing.assert_agrees(call, backend)
    assert run(call, backend)["advantages"].dtype == torch.float32


def off_by(call: testing.Call, backend: str) -> float:
    """The largest error against a scalar fp64 loop, as a share of the largest advantage."""
    t, gamma, lam = call.tensors, call.options["gamma"], call.options.get("lam", 0.95)
    last = t.get("bootstrap", torch.zeros(len(t["rewards"]))).tolist()
    rows = zip(t["rewards"].tolist(), t["values"].tolist(), last, strict=True)
    exact = torch.tensor(
        [spelled_out.gae_recursion(r, v, gamma, lam, x) for r, v, x in rows], dtype=torch.float64
    )
    gap = (run(call, backend)["advantages"].cpu() - exact).abs().max()
    return float(gap / exact.abs().max())


def interpreted(kernel: str, device: str) -> bool:
    """Triton's interpreter takes a millisecond a step."""
    return kernel == "triton" and device == "cpu"


@pytest.mark.case("N1")
@pytest.mark.parametrize("length", [1, 2, 31, 128, 1024, 4096])
def test_published_accuracy(kernel: str, device: str, length: int) -> None:
    """At most 2e-6 of the largest advantage."""
    rows = 2 if interpreted(kernel, device) else 64
    if rows == 2:
        length = min(length, 300)
    call = gae_call((rows, length), mask=None, extras=("bootstrap",), device=device)
    assert off_by(call, kernel) <= 2e-6


@pytest.mark.case("N2")
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.999, 0.99), (1.0, 1.0)])
def test_long_rows(kernel: str, device: str, gamma: float, lam: float) -> None:
    """At most 5e-6 of the largest advantage over 16k steps."""
    shape = (1, 700) if interpreted(kernel, device) else (4, 16384)
    call = gae_call(shape, mask=None, extras=(), gamma=gamma, lam=lam, device=device)
    assert off_by(call.replace(rewards=call.tensors["rewards"] / 16), kernel) <= 5e-6


@pytest.mark.case("N4")
@pytest.mark.parametrize(
    "gamma, lam, length", [(1.0, 1.0, 600), (1.0, 0.0, 150), (0.0, 1.0, 99), (1.0, 0.5, 14)]
)
@pytest.mark.parametrize("masked", ["carry", "zero"])
def test_integers_are_exact(
    backend: str, device: str, gamma: float, lam: float, length: int, masked: str
) -> None:
    """Every sum is exact in fp32 whatever its order, so an index error cannot hide."""
    call = gae_call((3, length), gamma=gamma, lam=lam, masked=masked, device=device)
    whole = {k: v.mul(3).round() for k, v in call.tensors.items() if v.is_floating_point()}
    call = call.replace(**whole)
    got, want = run(call, backend), run(testing.promoted(call), "reference")
    for name in ("advantages", "returns"):
        assert testing.same_bits(got[name].double(), want[name]), name


@pytest.mark.case("N5")
def test_lambda_zero_is_the_td_error(backend: str, device: str) -> None:
    call = gae_call((3, 9), mask=None, extras=("bootstrap",), lam=0.0, device=device)
    t = call.tensors
    after = torch.cat([t["values"][:, 1:], t["bootstrap"][:, None]], 1)
    delta = t["rewards"].double() + 0.99 * after.double() - t["values"].double()
    budget = (
        2 * torch.finfo(torch.float32).eps * (t["rewards"].abs() + after.abs() + t["values"].abs())
    )
    assert bool(((run(call, backend)["advantages"] - delta).abs() <= budget).all())


@pytest.mark.case("X9")
@pytest.mark.parametrize("terminal", [False, True])
def test_one_step(backend: str, device: str, terminal: bool) -> None:
    """A = r + γ(1 − terminated)V' − V."""
    call = gae_call((6, 1), mask=None, device=device)
    t = call.replace(terminated=torch.full((6, 1), terminal, device=device)).tensors
    out = run(call._replace(tensors=t), backend)
    future = 0.0 if terminal else 0.99 * t["bootstrap"].double()[:, None]
    want = t["rewards"].double() + future - t["values"].double()
    assert torch.allclose(out["advantages"].double(), want, rtol=1e-6, atol=1e-6)
    assert torch.allclose(out["returns"].double(), want + t["values"], rtol=1e-6, atol=1e-6)


@pytest.mark.case("N6")
def test_rho_and_c_of_one_are_gae(backend: str, device: str) -> None:
    """V-trace weights of 1 give the bits of GAE."""
    call = gae_call((4, 20), device=device)
    ones = torch.ones_like(call.tensors["rewards"])
    a, b = run(call, backend), run(call.replace(rho=ones, c=ones), backend)
    assert all(testing.same_bits(a[k], b[k]) for k in a)


@pytest.mark.case("N6")
def test_vtrace_is_rlax(backend: str, device: str) -> None:
    """errors_t = ρ_t δ_t + γ λ c_t errors_{t+1}, vs = V + errors (rlax/_src/vtrace.py)."""
    call = gae_call((3, 12), mask=None, extras=("bootstrap", "rho", "c"), lam=1.0, device=device)
    t = {k: v.double() for k, v in call.tensors.items()}
    after = torch.cat([t["values"][:, 1:], t["bootstrap"][:, None]], 1)
    td = t["rho"] * (t["rewards"] + 0.99 * after - t["values"])
    error, errors = torch.zeros_like(t["bootstrap"]), []
    for step in reversed(range(12)):
        error = td[:, step] + 0.99 * t["c"][:, step] * error
        errors.insert(0, error)
    out = run(call, backend)
    want = torch.stack(errors, 1)
    assert float((out["advantages"] - want).abs().max()) <= 2e-6 * float(want.abs().max())
    assert torch.allclose(out["returns"].double(), want + t["values"], atol=1e-5)


@pytest.mark.case("N9")
def test_truncated_is_not_terminated(backend: str, device: str) -> None:
    """Stoix's case, r = V = V' = 1, γ = 0.9: δ = 0.9 where truncated, 0 where terminated."""
    ones = torch.ones(1, 4, device=device)
    end = torch.tensor([[0, 1, 0, 0]], dtype=torch.bool, device=device)
    options = {"gamma": 0.9, "lam": 1.0, "next_values": ones, "backend": backend}
    cut = ppo_fast.gae(ones, ones, truncated=end, **options).advantages[0]
    over = ppo_fast.gae(ones, ones, terminated=end, **options).advantages[0]
    assert torch.allclose(cut.cpu(), torch.tensor([0.9 + 0.81, 0.9, 0.9 + 0.81, 0.9]))
    assert torch.allclose(over.cpu(), torch.tensor([0.9, 0.0, 0.9 + 0.81, 0.9]))


def test_both_flags_terminate(backend: str, device: str) -> None:
    call = gae_call((4, 20), extras=ENDS, device=device)
    both = call.tensors["terminated"] | call.tensors["truncated"]
    a = run(call.replace(terminated=both), backend)
    b = run(call.replace(terminated=both, truncated=torch.zeros_like(both)), backend)
    assert all(testing.same_bits(a[k], b[k]) for k in a)


@pytest.mark.case("N7")
def test_a_truncation_does_not_leak(backend: str, device: str) -> None:
    """Steps after a truncation reach nothing before it (TorchRL #4209)."""
    call = gae_call((2, 10), mask=None, extras=(*ENDS, "rho", "c"), device=device)
    end = torch.zeros(2, 10, dtype=torch.bool, device=device)
    end[:, 4] = True
    call = call.replace(truncated=end, terminated=torch.zeros_like(end))
    later = {k: v.clone() for k, v in call.tensors.items() if v.is_floating_point()}
    for x in later.values():
        x[:, 5:] = 1e6
    a, b = run(call, backend), run(call.replace(**later), backend)
    for name in ("advantages", "returns"):
        assert testing.same_bits(a[name][:, :5], b[name][:, :5]), name


@pytest.mark.case("X3")
def test_values_beyond_a_terminal_are_unread(backend: str, device: str) -> None:
    """NaN as the next value of a terminated step changes no bit."""
    call = gae_call((3, 10), mask=None, extras=ENDS, device=device)
    dirty = call.tensors["next_values"].masked_fill(call.tensors["terminated"], float("nan"))
    assert bool(dirty.isnan().any())
    a, b = run(call, backend), run(call.replace(next_values=dirty), backend)
    assert all(testing.same_bits(a[k], b[k]) for k in a)


@pytest.mark.case("X1")
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_nan_reward_stays_in_its_past(backend: str, device: str, layout: str) -> None:
    """NaN exactly for t ≤ t0 within the episode; other rows keep their bits."""
    flat = layout == "packed"
    call = gae_call((30,) if flat else (3, 10), mask=None, packed=flat, extras=(), device=device)
    rewards = call.tensors["rewards"].clone()
    rewards.view(-1)[16] = float("nan")  # packed: sequence [10, 17), padded: row 1, step 6
    clean, out = run(call, backend), run(call.replace(rewards=rewards), backend)
    bad = torch.zeros(30, dtype=torch.bool, device=device)
    bad[10:17] = True
    for name in ("advantages", "returns"):
        got = out[name].view(-1)
        assert bool(got[bad].isnan().all()), name
        assert testing.same_bits(got[~bad], clean[name].view(-1)[~bad]), name
    assert bool(out["moments"][1:].isnan().all()) and float(out["moments"][0]) == 30


def test_carry_is_as_if_absent(backend: str, device: str) -> None:
    """Masked steps removed by hand: the bootstrap follows the last valid one; within 4e-6."""
    call = gae_call((1, 40), device=device, extras=("bootstrap", "terminated", "rho", "c"))
    keep = call.tensors["mask"][0]
    rest = {k: v[:, keep] for k, v in call.tensors.items() if k not in ("mask", "bootstrap")}
    short = call._replace(tensors={**rest, "bootstrap": call.tensors["bootstrap"]})
    a, b = run(call, backend), run(short, backend)
    for name in ("advantages", "returns"):
        gap = (a[name][:, keep] - b[name]).abs().max()
        assert float(gap) <= 4e-6 * float(b[name].abs().max()), name
        assert not bool(a[name][:, ~keep].any())


def test_carry_and_zero_differ_inside_and_agree_on_padding(backend: str, device: str) -> None:
    right = gae_call((4, 20), mask="right", extras=(), device=device)
    a, b = run(right, backend), run(right.option(masked="zero"), backend)
    assert all(testing.same_bits(a[k], b[k]) for k in ("advantages", "returns"))
    ones = torch.ones(1, 6, device=device)
    mask = torch.tensor([[1, 1, 0, 0, 1, 1]], device=device)
    args = {"mask": mask, "gamma": 1.0, "lam": 0.5, "backend": backend}
    carry = ppo_fast.gae(ones, 0 * ones, masked="carry", **args).advantages
    zero = ppo_fast.gae(ones, 0 * ones, masked="zero", **args).advantages
    assert carry.tolist() == [[1.875, 1.75, 0.0, 0.0, 1.5, 1.0]]
    assert zero.tolist() == [[1.59375, 1.1875, 0.0, 0.0, 1.5, 1.0]]


def test_two_lambdas_are_two_calls(backend: str, device: str) -> None:
    call = gae_call((4, 20), device=device, lam=0.9, lam_returns=1.0)
    both = run(call, backend)
    first = run(call._replace(options={"gamma": 0.99, "lam": 0.9}), backend)
    second = run(call._replace(options={"gamma": 0.99, "lam": 1.0}), backend)
    assert testing.same_bits(both["advantages"], first["advantages"])
    assert testing.same_bits(both["returns"], second["returns"])


@pytest.mark.parametrize("packed", [False, True])
def test_a_lambda_tensor_is_its_numbers(backend: str, device: str, packed: bool) -> None:
    """The same λ as a number, one per sequence and one per step: the same bits."""
    call = gae_call((40,) if packed else (4, 10), packed=packed, device=device, lam=0.75)
    per_row = torch.full((4,), 0.75, device=device)
    per_step = torch.full_like(call.tensors["rewards"], 0.75)
    want = run(call, backend)
    for lam in (per_row, per_step):
        got = run(call._replace(options={"gamma": 0.99}).replace(lam=lam), backend)
        assert all(testing.same_bits(got[k], want[k]) for k in want)


@pytest.mark.case("X8")
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("time_major", [False, True])
def test_empty(backend: str, device: str, shape: tuple[int, int], time_major: bool) -> None:
    out = run(gae_call(shape, time_major=time_major, mask="all", device=device), backend)
    assert out["advantages"].shape == shape and out["moments"].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.case("X8")
def test_empty_packed(backend: str, device: str) -> None:
    nothing = torch.zeros(0, device=device)
    for offsets in ([0], [0, 0, 0]):
        cu = torch.tensor(offsets, device=device)
        out = ppo_fast.gae(nothing, nothing, cu_seqlens=cu, backend=backend)
        assert out.advantages.shape == (0,) and out.moments.values.tolist() == [0.0, 0.0, 0.0]
