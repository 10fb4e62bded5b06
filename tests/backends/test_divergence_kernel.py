"""Kernels of divergence: sums over two rows of logits, and the gradient by the student's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import usable
from divergence_rows import Given, assert_agrees, given, make, results
from torch import Tensor

from ppo_fast._boundary import calls, calls_divergence
from ppo_fast._boundary.options import Scoring, Softmax, Teaching
from ppo_fast.testing import same_bits

INF, NAN = math.inf, math.nan
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# A segment of a row is 32768 columns on the CPU; vectors have 8 or 16 lanes, blocks 256.
VOCABULARIES = [1, 2, 7, 31, 255, 257, 1000, 4099]
CASES = [("reverse", 0.5), ("forward", 0.5), ("jsd", 0.5), ("jsd", 0.1), ("mixed", 0.3)]
every_kind = pytest.mark.parametrize("kind, beta", CASES)


@pytest.fixture(params=["cpu", "triton"])
def kernel(request: pytest.FixtureRequest) -> str:
    return usable(request.param)


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_kind
def test_within_budget(
    kernel: str, device: str, kind: str, beta: float, dtype: torch.dtype, vocab: int
) -> None:
    rows = make(device, vocab=vocab, dtype=dtype, seed=vocab)
    assert_agrees(results(kernel, rows, kind, beta), rows, kind, beta)


@pytest.mark.parametrize("vocab", VOCABULARIES)
@every_kind
def test_fp64(kernel: str, device: str, kind: str, beta: float, vocab: int) -> None:
    if kernel != "cpu":
        pytest.skip("the CPU alone has float64")
    rows = make(device, vocab=vocab, dtype=torch.float64, seed=vocab)
    assert_agrees(results(kernel, rows, kind, beta), rows, kind, beta)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@every_kind
def test_every_instruction_set(
    isa: str, kernel: str, device: str, kind: str, beta: float, dtype: torch.dtype
) -> None:
    if kernel != "cpu":
        pytest.skip("instruction sets are the CPU's")
    rows = make(device, vocab=1003, dtype=dtype)
    assert_agrees(results(kernel, rows, kind, beta), rows, kind, beta)


@pytest.mark.parametrize("scale, apart", [(3.0, 0.01), (3.0, 20.0), (30.0, 30.0)])
@every_kind
def test_near_and_far(
    kernel: str, device: str, kind: str, beta: float, scale: float, apart: float
) -> None:
    """Distributions that are nearly one, and ones whose ratios overflow."""
    rows = make(device, vocab=300, scale=scale, apart=apart)
    assert_agrees(results(kernel, rows, kind, beta), rows, kind, beta)


@every_kind
def test_rows_of_several_segments(kernel: str, device: str, kind: str, beta: float) -> None:
    rows = make(device, (2,), 70001)
    assert_agrees(results(kernel, rows, kind, beta), rows, kind, beta)


@every_kind
def test_of_a_model_from_itself(kernel: str, device: str, kind: str, beta: float) -> None:
    """No divergence, whatever the roundings of the log-probabilities."""
    rows = make(device, (3, 2), 1003)
    rows = rows._replace(teacher=rows.logits.clone(), teacher_temperature=rows.temperature)
    got = results(kernel, rows, kind, beta)
    assert not bool(got["divergence"].any()) and not bool(got["kl"].any())
    assert_agrees(got, rows, kind, beta)


@pytest.mark.parametrize("beta", [1e-6, 0.9999])
def test_mixtures_of_nearly_one(kernel: str, device: str, beta: float) -> None:
    rows = make(device, vocab=300, apart=8.0)
    assert_agrees(results(kernel, rows, "jsd", beta), rows, "jsd", beta)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_kind
def test_what_both_forbid(
    kernel: str, device: str, kind: str, beta: float, dtype: torch.dtype
) -> None:
    """Columns at −inf on both sides have no term and no gradient, as if they were not there."""
    rows = make(device, vocab=90, dtype=dtype)
    rows = rows._replace(tokens=rows.tokens // 3 * 3 + 1)
    for x in (rows.logits, rows.teacher):
        x[:, ::3] = -INF
    got = results(kernel, rows, kind, beta)
    assert_agrees(got, rows, kind, beta)
    assert not bool(got["dz"][:, ::3].any()) and bool(got["dz"].any())


ONE_SIDE = {
    # kind: finite where the student, where the teacher forbids a column
    "reverse": (True, False),
    "forward": (False, True),
    "jsd": (True, True),
    "mixed": (False, False),
}


@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
@every_kind
def test_what_one_side_forbids(
    kernel: str, device: str, kind: str, beta: float, side: int
) -> None:
    """Infinite where a probability stands beside 0, else as if the term were not there."""
    rows = make(device, vocab=90)
    rows = rows._replace(tokens=rows.tokens // 3 * 3 + 1)
    rows[side][:, ::3] = -INF
    got = results(kernel, rows, kind, beta)
    if ONE_SIDE[kind][side]:
        assert_agrees(got, rows, kind, beta)
        return
    assert got["divergence"].tolist() == [INF] * 5
    finite_kl = kind == "forward" or (kind == "mixed" and side == 0)
    assert bool((got["kl"].isfinite() == finite_kl).all())
    taught = rows._replace(g=torch.zeros_like(rows.g), h=torch.zeros_like(rows.h))
    dz = results(kernel, taught, kind, beta)["dz"]
    if side == 0:  # the gradient of what is infinite: of the others' terms alone, and of q
        assert bool(dz.isfinite().all()) and bool(dz[:, ::3].all())
    else:
        assert not bool(dz.isfinite().any())


def test_a_probability_that_underflows_beside_none(kernel: str, device: str) -> None:
    """Is infinite too: e^-300 ln(e^-300 / 0)."""
    rows = make(device)
    rows.logits[:, 7] = -300.0
    rows.teacher[:, 7] = -INF
    assert results(kernel, rows, "reverse", 0.5)["divergence"].tolist() == [INF] * 5
    rows.logits[:, 7] = -INF
    assert bool(results(kernel, rows, "reverse", 0.5)["divergence"].isfinite().all())


@pytest.mark.parametrize("size", [1e5, 1e20, 1e38])
@pytest.mark.parametrize("kind, beta", [("reverse", 0.5), ("jsd", 0.3)])
def test_huge_logits(kernel: str, device: str, kind: str, beta: float, size: float) -> None:
    """Of what the student all but forbids nothing reaches the divergence, as if it were -inf."""
    rows = make(device, (3,), 500)
    rows = rows._replace(tokens=rows.tokens // 3 * 3 + 1)
    part, none = rows.logits.clone(), rows.logits.clone()
    part[:, ::3], none[:, ::3] = -size, -INF
    a, b = (results(kernel, rows._replace(logits=x), kind, beta) for x in (part, none))
    for name, x in a.items():
        assert same_bits(x + 0.0, b[name] + 0.0), name
    assert_agrees(b, rows._replace(logits=none), kind, beta)


@every_kind
def test_masked_rows_are_not_read(kernel: str, device: str, kind: str, beta: float) -> None:
    """Results and gradients are exactly 0, and the other rows keep their bits."""
    rows = make(device)
    mask = torch.tensor([True, False, True, True, False], device=device)
    clean = results(kernel, rows, kind, beta)
    hidden = rows._replace(mask=mask)
    at = given(kernel, hidden, kind, beta)
    for x in (rows.logits, rows.teacher, rows.g, rows.h, rows.c, at.softmax.entropy):
        x[~mask] = NAN
    rows.tokens[~mask] = -7
    got = results(kernel, hidden, kind, beta, at)
    for name, x in got.items():
        assert not bool(x[~mask].any()), name
        assert same_bits(x[mask], clean[name][mask]), name


@every_kind
def test_rows_without_a_gradient(kernel: str, device: str, kind: str, beta: float) -> None:
    """Zeros, whatever the row holds."""
    rows = make(device)
    for x in (rows.g, rows.h, rows.c):
        x[1] = 0.0
    rows.logits[1, 5], rows.teacher[1, 9] = NAN, NAN
    dz = results(kernel, rows, kind, beta)["dz"]
    assert not bool(dz[1].any()) and bool(dz[[0, 2, 3, 4]].any(-1).all())


@every_kind
def test_rows_without_a_gradient_of_the_divergence(
    kernel: str, device: str, kind: str, beta: float
) -> None:
    """Those of logprobs, to the bit; an infinite divergence times 0 is 0."""
    rows = make(device)
    rows.c.zero_()
    rows.teacher[:, 3] = -INF
    rows.logits[:, 4] = -INF
    rows = rows._replace(tokens=rows.tokens.clamp(min=5))
    at = given(kernel, rows, kind, beta)
    got = results(kernel, rows, kind, beta, at)["dz"]
    want = calls.logprobs_bwd(kernel, rows.logits, at.scoring, at.softmax, rows.g, rows.h)
    assert same_bits(got, want) and bool(got.isfinite().all())


@every_kind
def test_absent_gradients(kernel: str, device: str, kind: str, beta: float) -> None:
    """By the log-probability, by the entropy: absent is 0."""
    rows = make(device)
    s, softmax, t = given(kernel, rows, kind, beta)
    _, kl = calls_divergence.divergence_fwd(kernel, rows.logits, s, softmax, t)
    none = torch.zeros_like(rows.c)
    for absent in ((True, False), (False, True), (True, True)):
        g, h = (none if gone else x for gone, x in zip(absent, (rows.g, rows.h), strict=True))
        short = tuple(None if gone else x for gone, x in zip(absent, (g, h), strict=True))
        dz = [
            calls_divergence.divergence_bwd(
                kernel, rows.logits, s, softmax, t, kl, (*grads, rows.c)
            )
            for grads in (short, (g, h))
        ]
        assert same_bits(*dz)
        part = rows._replace(g=g, h=h)
        assert_agrees(results(kernel, part, kind, beta), part, kind, beta)


@every_kind
def test_temperatures_per_token(kernel: str, device: str, kind: str, beta: float) -> None:
    """A row's own numbers, in strided tensors too."""
    rows = make(device)
    whole = results(kernel, rows, kind, beta)
    assert isinstance(rows.temperature, Tensor) and isinstance(rows.teacher_temperature, Tensor)
    for i in range(5):
        own = rows.row(i)._replace(
            temperature=float(rows.temperature[i]),
            teacher_temperature=float(rows.teacher_temperature[i]),
        )
        for name, x in results(kernel, own, kind, beta).items():
            assert same_bits(x, whole[name][i : i + 1]), name


@pytest.mark.parametrize("cut", [1, 33, 512])
@every_kind
def test_shares_of_the_columns(kernel: str, device: str, kind: str, beta: float, cut: int) -> None:
    """Sums of the shares' sums are the whole's; a share's gradient is that of its columns."""
    vocab = 700
    rows = make(device, vocab=vocab)
    at = given(kernel, rows, kind, beta)
    parts = []
    for first, last in ((0, cut), (cut, vocab), (vocab, vocab)):
        share = rows.columns(first, last)
        s = at.scoring._replace(tokens=share.tokens)
        t = at.teaching._replace(logits=share.teacher)
        divergence, kl = calls_divergence.divergence_fwd(kernel, share.logits, s, at.softmax, t)
        parts.append((share, s, t, divergence, kl))
    assert not bool(parts[2][3].any()) and not bool(parts[2][4].any())
    kl = sum(part[4] for part in parts)
    grads = (rows.g, rows.h, rows.c)
    dz = [
        calls_divergence.divergence_bwd(kernel, share.logits, s, at.softmax, t, kl, grads)
        for share, s, t, _, _ in parts
    ]
    assert dz[2].shape == (5, 0)
    got = {"divergence": sum(part[3] for part in parts), "kl": kl, "dz": torch.cat(dz, -1)}
    assert_agrees(got, rows, kind, beta)


@pytest.mark.parametrize("token", [-1, 70, -100, 2**31 - 1])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_tokens_of_another_share(kernel: str, device: str, dtype: torch.dtype, token: int) -> None:
    """No column is theirs; the rest of the row's gradient is that of any other token."""
    rows = make(device)
    rows = rows._replace(tokens=torch.full((5,), token, dtype=dtype, device=device))
    got = results(kernel, rows, "mixed", 0.3)
    assert_agrees(got, rows, "mixed", 0.3)


@pytest.mark.parametrize("kind, beta", [("reverse", 0.5), ("jsd", 0.3)])
def test_token_at_minus_infinity(kernel: str, device: str, kind: str, beta: float) -> None:
    """Passes no gradient of its log-probability."""
    rows = make(device)
    rows.logits[:, 4] = -INF
    rows = rows._replace(tokens=torch.full_like(rows.tokens, 4))
    got = results(kernel, rows, kind, beta)
    without = results(kernel, rows._replace(g=torch.zeros_like(rows.g)), kind, beta)
    assert same_bits(got["dz"], without["dz"]) and not bool(got["dz"][:, 4].any())
    assert_agrees(got, rows, kind, beta)
    alone = rows._replace(h=torch.zeros_like(rows.h), c=torch.zeros_like(rows.c))
    assert not bool(results(kernel, alone, kind, beta)["dz"].any())


@pytest.mark.parametrize("side", ["logits", "teacher", "entropy"])
@pytest.mark.parametrize("poison", [NAN, INF])
@every_kind
def test_a_bad_row_is_nan_and_alone(
    kernel: str, device: str, kind: str, beta: float, poison: float, side: str
) -> None:
    rows = make(device)
    clean = results(kernel, rows, kind, beta)
    if side == "entropy":
        at = given(kernel, rows, kind, beta)
        at.softmax.entropy[2] = NAN
        got = results(kernel, rows, kind, beta, at)
    else:
        getattr(rows, side)[2, 65] = poison
        rows.logits[2, 3] = rows.teacher[2, 3] = -INF  # columns without a term are NaN too
        got = results(kernel, rows, kind, beta)
        assert bool(got["divergence"][2].isnan())
        assert kind == "forward" or bool(got["kl"][2].isnan())
    assert bool(got["dz"][2].isnan().all())
    for name, x in got.items():
        assert same_bits(x[[0, 1, 3, 4]], clean[name][[0, 1, 3, 4]]), name


@pytest.mark.parametrize("extra", [1, 2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_kind
def test_strides_change_no_bit(
    kernel: str, device: str, kind: str, beta: float, dtype: torch.dtype, extra: int
) -> None:
    """Rows anywhere in wider memory, in another order on either side; numbers of any stride."""
    rows = make(device, (2, 3), 264, dtype)
    rows = rows._replace(mask=torch.tensor([[1, 1, 0], [1, 1, 1]], device=device).bool())
    at = given(kernel, rows, kind, beta)
    want = results(kernel, rows, kind, beta, at)

    def inside(x: Tensor) -> Tensor:
        wider = torch.full((*x.shape[:-1], x.shape[-1] + extra), NAN, dtype=dtype, device=device)
        view = wider[..., extra:]
        view.copy_(x)
        return view

    def turned(x: Tensor) -> Tensor:
        return inside(x.transpose(0, 1)).transpose(0, 1)

    def apart(x: Any) -> Any:
        return torch.stack([x, x], -1)[..., 1] if isinstance(x, Tensor) else x

    other = rows._replace(logits=inside(rows.logits), teacher=turned(rows.teacher))
    other = other._replace(**{name: apart(getattr(rows, name)) for name in "ghc"})
    spread = Given(
        Scoring(*map(apart, at.scoring)),
        Softmax(*map(apart, at.softmax)),
        Teaching(at.teaching.logits, *map(apart, at.teaching[1:])),
    )
    for name, x in results(kernel, other, kind, beta, spread).items():
        assert same_bits(x, want[name]), name


@every_kind
def test_a_row_s_bits_are_its_own(kernel: str, device: str, kind: str, beta: float) -> None:
    """Alone, at another place, and with other threads."""
    rows = make(device, (6,), 40001)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results(kernel, rows, kind, beta)
        torch.set_num_threads(4)
        whole = results(kernel, rows, kind, beta)
    finally:
        torch.set_num_threads(before)
    for name, x in whole.items():
        assert same_bits(x, one[name]), name
    for i in (0, 5):
        for name, x in results(kernel, rows.row(i), kind, beta).items():
            assert same_bits(x, whole[name][i : i + 1]), name


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@every_kind
def test_in_place(kernel: str, device: str, kind: str, beta: float, dtype: torch.dtype) -> None:
    """The same bits over the logits, rows of several segments and NaN rows among them."""
    if kernel != "cpu" and dtype == torch.float64:
        pytest.skip("the CPU alone has float64")
    rows = make(device, (4,), 33001, dtype)
    rows.c[1] = 0.0
    rows = rows._replace(mask=torch.tensor([True, True, False, True], device=device))
    s, softmax, t = given(kernel, rows, kind, beta)
    _, kl = calls_divergence.divergence_fwd(kernel, rows.logits, s, softmax, t)
    softmax.entropy[3] = NAN
    grads = (rows.g, rows.h, rows.c)
    want = calls_divergence.divergence_bwd(kernel, rows.logits, s, softmax, t, kl, grads)
    calls_divergence.divergence_bwd_(kernel, rows.logits, s, softmax, t, kl, grads)
    assert same_bits(rows.logits, want)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (2, 2, 2)], ids=str)
def test_any_leading_shape(kernel: str, device: str, shape: tuple[int, ...]) -> None:
    rows = make(device, shape, 19)
    got = results(kernel, rows, "jsd", 0.4)
    assert got["divergence"].shape == got["kl"].shape == shape
    assert_agrees(got, rows, "jsd", 0.4)


def test_unlike_arguments_are_refused(kernel: str, device: str) -> None:
    rows = make(device)
    s, softmax, t = given(kernel, rows, "reverse", 0.5)
    wrong = {
        "teacher_logits": t._replace(logits=rows.teacher[:, 1:]),
        "teacher_logits must": t._replace(logits=rows.teacher.bfloat16()),
        "teacher_logits must be": t._replace(logits=rows.teacher.T.contiguous().T),
        "teacher_max": t._replace(row_max=t.row_max[1:]),
    }
    for words, teaching in wrong.items():
        with pytest.raises((RuntimeError, ValueError), match=words):
            calls_divergence.divergence_fwd(kernel, rows.logits, s, softmax, teaching)
