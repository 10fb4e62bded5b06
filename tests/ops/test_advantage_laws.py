"""Identities of the advantages, and containment of bad steps, on every backend."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ppo_fast import testing
from ppo_fast.testing import Call, gae_call, rlhf_call, run, same_bits

ENDS = ("next_values", "terminated", "truncated")
LAYOUTS = ("rows", "packed", "time_major")
LENGTHS = (8, 0, 5, 1, 7)
EPS = torch.finfo(torch.float32).eps


def laid_out(layout: str, device: str, **options: object) -> Call:
    """Five sequences of at most 8 steps."""
    if layout == "packed":
        ends = torch.tensor([0, *LENGTHS]).cumsum(0)
        call = gae_call((sum(LENGTHS),), packed=True, device=device, **options)
        last = {
            k: torch.linspace(-1, 2, 5, device=device) for k in ("bootstrap",) if k in call.tensors
        }
        return call.replace(cu_seqlens=ends.to(device), **last)
    if layout == "time_major":
        return gae_call((8, 5), time_major=True, device=device, **options)
    return gae_call((5, 8), device=device, **options)


@pytest.mark.case("N4")
@pytest.mark.parametrize("masked", ["carry", "zero"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gamma, lam", [(0.5, 0.5), (0.5, 1.0), (1.0, 0.25)])
def test_dyadic_numbers_are_exact(
    backend: str, device: str, gamma: float, lam: float, layout: str, masked: str
) -> None:
    """Integers up to 8 and 8 powers of γλ ≥ 1/4: at most 22 bits, exact in fp32 in any order."""
    call = laid_out(
        layout, device, extras=(*ENDS, "rho", "c"), gamma=gamma, lam=lam, masked=masked
    )
    t = call.tensors
    whole = {k: t[k].mul(3).round().clamp(-8, 8) for k in ("rewards", "values", "next_values")}
    call = call.replace(**whole, rho=t["rho"].mul(2).round(), c=t["c"].round())
    got, want = run(call, backend), run(testing.promoted(call), "reference")
    assert bool(want["advantages"].any())
    for name in ("advantages", "returns"):
        assert same_bits(got[name].double(), want[name]), name


def steps(call: Call) -> dict[str, Tensor]:
    return {k: v.cpu().double() for k, v in call.tensors.items()}


@pytest.mark.case("N5")
def test_lambda_one_is_the_return_less_the_value(backend: str, device: str) -> None:
    """G sums discounted rewards to the episode's end, and V' there unless it is terminal."""
    call = gae_call((3, 24), mask=None, extras=ENDS, gamma=0.97, lam=1.0, device=device)
    t = call.tensors
    after = torch.cat([t["values"][:, 1:], t["next_values"][:, -1:]], 1)
    over = t["terminated"] | t["truncated"]
    call = call.replace(next_values=torch.where(over, t["next_values"], after))
    t, out = steps(call), run(call, backend)
    want, size = torch.zeros(3, 24, dtype=torch.float64), torch.zeros(3, 24, dtype=torch.float64)
    for b in range(3):
        for s in range(24):
            for k in range(s, 24):
                last = k == 23 or bool(t["terminated"][b, k] + t["truncated"][b, k])
                tail = t["next_values"][b, k] * (last and not t["terminated"][b, k])
                want[b, s] += 0.97 ** (k - s) * (t["rewards"][b, k] + 0.97 * tail)
                size[b, s] += abs(t["rewards"][b, k]) + 2 * abs(t["values"][b, k]) + abs(tail)
                if last:
                    break
    for name, x in (("returns", want), ("advantages", want - t["values"])):
        testing.assert_within_budget(out[name], x, condition=size, ops=8 * 24, name=name)


@pytest.mark.case("N5")
@pytest.mark.parametrize("masked", ["carry", "zero"])
def test_lambda_one_with_a_bootstrap(backend: str, device: str, masked: str) -> None:
    """The bootstrap follows the last kept step ("carry") or the last one ("zero")."""
    call = gae_call(
        (4, 20), extras=("bootstrap",), gamma=0.9, lam=1.0, masked=masked, device=device
    )
    t, keep, out = steps(call), call.tensors["mask"].cpu(), run(call, backend)
    assert bool(t["bootstrap"].all())
    for b in range(4):
        taken = [s for s in range(20) if keep[b, s] or masked == "zero"]
        for i, s in enumerate(taken):
            if not keep[b, s]:
                continue
            rewards = [float(t["rewards"][b, k]) if keep[b, k] else 0.0 for k in taken[i:]]
            tail = 0.9 ** len(rewards) * float(t["bootstrap"][b])
            total = math.fsum([0.9**n * r for n, r in enumerate(rewards)]) + tail
            size = math.fsum(abs(x) for x in rewards) + 40 * float(t["values"].abs().max())
            gap = float(out["returns"][b, s]) - total
            assert abs(gap) <= 8 * 20 * EPS * size, (b, s)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lambda_zero_looks_one_kept_step_ahead(backend: str, device: str, layout: str) -> None:
    call = laid_out(layout, device, extras=("bootstrap", "terminated"), lam=0.0)
    t, out = steps(call), run(call, backend)["advantages"].cpu().double()
    turn = layout == "time_major"
    rows = {k: (v.T if turn and v.dim() == 2 else v) for k, v in t.items()}
    ends = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    for b in range(5):
        where = slice(ends[b], ends[b + 1]) if layout == "packed" else b
        r, v, m, d = (rows[k][where].tolist() for k in ("rewards", "values", "mask", "terminated"))
        got = (out.T if turn else out)[where].tolist()
        after = float(t["bootstrap"][b])
        for s in reversed(range(len(r))):
            if not m[s]:
                assert got[s] == 0.0
                continue
            want = r[s] + (0.0 if d[s] else 0.99 * after) - v[s]
            assert abs(got[s] - want) <= 4 * EPS * (abs(r[s]) + abs(after) + abs(v[s]))
            after = v[s]


def test_vtrace_is_the_papers_sum(backend: str, device: str) -> None:
    """Espeholt et al. 2018, eq. 1: vs = V + Σ γ^(t−s) (Π c_i) ρ_t (r_t + γV(x_{t+1}) − V(x_t)).

    ρ and c are min(ρ̄, π/μ) and λ·min(c̄, π/μ), ρ̄ ≥ c̄; remark 2 has the λ.
    """
    call = gae_call((3, 14), mask=None, extras=("bootstrap",), gamma=0.95, device=device)
    g = torch.Generator().manual_seed(4)
    ratio = (torch.randn(3, 14, generator=g) / 2).exp().to(device)
    rho, c = ratio.clamp(max=1.5), ratio.clamp(max=0.9)
    call = call.replace(rho=rho, c=c).option(lam=0.75)
    t, out = steps(call), run(call, backend)
    after = torch.cat([t["values"][:, 1:], t["bootstrap"][:, None]], 1)
    delta = t["rho"] * (t["rewards"] + 0.95 * after - t["values"])
    size = t["rho"] * (t["rewards"].abs() + after.abs() + t["values"].abs())
    for s in range(14):
        weights = [0.95 ** (k - s) * (0.75 * t["c"][:, s:k]).prod(1) for k in range(s, 14)]
        vs = t["values"][:, s] + sum(w * delta[:, s + i] for i, w in enumerate(weights))
        reach = t["values"][:, s].abs() + sum(w * size[:, s + i] for i, w in enumerate(weights))
        testing.assert_within_budget(out["returns"][:, s], vs, condition=reach, ops=9 * 14)
        testing.assert_within_budget(
            out["advantages"][:, s], vs - t["values"][:, s], condition=reach, ops=9 * 14
        )


def test_a_lambda_of_zero_is_a_truncation(backend: str, device: str) -> None:
    """Per-step λ = 0 cuts the recursion there and keeps V': the same bits as `truncated`."""
    call = gae_call((4, 40), mask=None, extras=ENDS, device=device)
    t = call.tensors
    lam = torch.full_like(t["rewards"], 0.9)
    cut = run(call.replace(lam=lam), backend)
    lam = lam.masked_fill(t["truncated"], 0.0)
    faded = run(call.replace(lam=lam, truncated=None), backend)
    assert bool(t["truncated"].any())
    assert all(same_bits(cut[k], faded[k]) for k in cut)


def test_a_lambda_per_row_is_its_rows(backend: str, device: str) -> None:
    call = gae_call((4, 40), extras=("bootstrap", "row_lam"), device=device)
    whole = run(call, backend)
    for b, lam in enumerate(call.tensors["lam"].tolist()):
        row = testing.with_rows(call, torch.tensor([b], device=device)).replace(lam=None)
        alone = run(row.option(lam=lam), backend)
        for name in ("advantages", "returns"):
            assert same_bits(alone[name][0], whole[name][b]), (name, b)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kinds", [("lam", "number"), ("number", "lam"), ("lam", "row")])
def test_two_lambdas_are_two_calls(
    backend: str, device: str, layout: str, kinds: tuple[str, str]
) -> None:
    """Numbers, per sequence and per step, mixed: each λ alone gives its own half, bit by bit."""
    call = laid_out(layout, device, extras=("bootstrap", "terminated", "lam"))
    g = torch.Generator().manual_seed(6)
    values = {
        "lam": call.tensors["lam"],
        "number": 0.625,
        "row": torch.rand(5, generator=g).to(device),
    }
    first, second = (values[k] for k in kinds)
    call = call.replace(lam=None)
    both = run(call.option(lam=first, lam_returns=second), backend)
    assert same_bits(both["advantages"], run(call.option(lam=first), backend)["advantages"])
    assert same_bits(both["returns"], run(call.option(lam=second), backend)["returns"])
    assert not same_bits(both["returns"], run(call.option(lam=first), backend)["returns"])


@pytest.mark.case("X1")
@pytest.mark.parametrize("masked", ["carry", "zero"])
@pytest.mark.parametrize("time_major", [False, True])
def test_a_nan_reward_stays_in_its_episode(
    backend: str, device: str, masked: str, time_major: bool
) -> None:
    """With ends in the row: NaN at step 6 reaches back to step 4, where its episode began."""
    call = gae_call((3, 12), extras=ENDS, masked=masked, mask="all", device=device)
    end = torch.zeros(3, 12, dtype=torch.bool, device=device)
    terminated, truncated, mask = end.clone(), end.clone(), ~end
    terminated[1, 3], truncated[1, 8], mask[1, 5] = True, True, False
    call = call.replace(terminated=terminated, truncated=truncated, mask=mask)
    rewards = call.tensors["rewards"].clone()
    rewards[1, 6] = math.nan
    dirty = call.replace(rewards=rewards)
    if time_major:
        call, dirty = (
            c._replace(tensors={k: v.T for k, v in c.tensors.items()}).option(time_major=True)
            for c in (call, dirty)
        )
    clean, out = run(call, backend), run(dirty, backend)
    for name in ("advantages", "returns"):
        got, was = (x[name].T if time_major else x[name] for x in (out, clean))
        assert got[1].isnan().nonzero().flatten().tolist() == [4, 6], name
        assert same_bits(got.nan_to_num(7.0)[~got.isnan()], was[~got.isnan()]), name


@pytest.mark.parametrize("place", ["last-token", "first-pad", "per-token"])
def test_a_nan_score_stays_in_its_response(backend: str, device: str, place: str) -> None:
    call = rlhf_call((3, 8), score_at=place, device=device)
    scores = call.tensors["scores"].clone()
    scores.view(3, -1)[1] = math.nan
    clean, out = run(call, backend), run(call.replace(scores=scores), backend)
    keep = call.tensors["mask"]
    for name in ("advantages", "returns"):
        assert bool(out[name][1][keep[1]].isnan().all()) and not bool(
            out[name][[0, 2]].isnan().any()
        )
        assert same_bits(out[name][[0, 2]], clean[name][[0, 2]]), name


@pytest.mark.parametrize("masked", ["carry", "zero"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sequences_without_a_step_to_keep(
    backend: str, device: str, layout: str, masked: str
) -> None:
    """All masked, or empty: zeros whatever stands there, its bootstrap too; no one else's bits."""
    call = laid_out(layout, device, extras=("bootstrap", "terminated"), masked=masked)
    mask = call.tensors["mask"].clone()
    first = mask[:, 0] if layout == "time_major" else mask[: LENGTHS[0]]
    (mask[0] if layout == "rows" else first).zero_()
    call = call.replace(mask=mask)
    clean = run(testing.with_garbage(call, 0.0), backend)
    bootstrap = call.tensors["bootstrap"].clone()
    bootstrap[:1] = math.nan
    if layout == "packed":
        bootstrap[1] = math.nan  # of a sequence without steps
    dirty = run(testing.with_garbage(call, math.nan).replace(bootstrap=bootstrap), backend)
    assert all(same_bits(dirty[k], clean[k]) for k in clean)
    assert float(clean["moments"][0]) == int(mask.sum()) and not bool(
        clean["returns"][~mask].any()
    )
