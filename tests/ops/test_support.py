"""A support in the ops: the renormalised softmax spelled out, sparse beside dense, bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import usable
from head_helpers import shape_for, short_chunks

import ppo_fast
from ppo_fast import Support, _checks, testing
from ppo_fast.ops import sparse_head
from ppo_fast.testing import Call, linear_call, run, same_bits
from ppo_fast.testing.head_inputs import linear_ppo_call, logits_ppo_call
from ppo_fast.testing.inputs import logprobs_call

NAMES = ("reference", "cpu", "triton")
LINEAR = {"linear_token_logprobs": linear_call, "linear_ppo_loss": linear_ppo_call}
LOGITS = {"token_logprobs": logprobs_call, "logits_ppo_loss": logits_ppo_call}
SPARSE = pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])


@pytest.fixture(params=NAMES)
def backend(request: pytest.FixtureRequest) -> str:
    """The backends that have a support."""
    return usable(request.param)


@pytest.fixture(params=NAMES[1:])
def kernel(request: pytest.FixtureRequest) -> str:
    """Those of them that have kernels."""
    return usable(request.param)


def spelled_out(z: list[float], ids: list[int], token: int) -> tuple[float, float]:
    """Log-probability and entropy of one row, in Python floats: each id as often as it stands."""
    kept = [*ids, token] if ids and token not in ids else ids or range(len(z))
    exps = [math.exp(z[i]) for i in kept]
    total = math.fsum(exps)
    entropy = -math.fsum(e / total * math.log(e / total) for e in exps)
    return z[token] - math.log(total), entropy


ROWS: list[list[int]] = [[3, 1, 4], [], [5, 5, 9, 5], [2], list(range(11)), [0, 7, 7], [6]]
TOKENS = [4, 8, 5, 2, 10, 1, 5]  # three times in the third, missing in the last two


def given(sparse: bool | None = None) -> Support:
    ends = torch.tensor([0, *map(len, ROWS)]).cumsum(0)
    return Support(torch.tensor([i for row in ROWS for i in row]), ends, sparse=sparse)


def test_the_softmax_is_over_the_kept_ids(backend: str) -> None:
    """Every kind of row: missing token, duplicates, one id, all ids, none."""
    dtype = torch.float32 if backend == "triton" else torch.float64
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(1), dtype=dtype)
    tokens = torch.tensor(TOKENS)
    out = ppo_fast.token_logprobs(
        logits, tokens, temperature=0.7, support=given(), backend=backend
    )
    scaled = (logits.double() / 0.7).tolist()
    want = torch.tensor(
        [spelled_out(*row) for row in zip(scaled, ROWS, TOKENS, strict=True)], dtype=torch.float64
    )
    for i, x in enumerate(out):
        testing.assert_within_budget(x, want[:, i], condition=20.0, ops=8)


def test_what_was_kept_can_be_asked() -> None:
    support = given()
    assert support.n_rows == 7 and support.counts.tolist() == [3, 0, 4, 1, 11, 3, 1]
    assert support.whole.tolist() == [False, True, *[False] * 5] and support.n_whole == 1
    assert support.missed(torch.tensor(TOKENS)).tolist() == [*[False] * 5, True, True]
    assert support.missed(torch.tensor(TOKENS).view(7, 1)).shape == (7, 1)
    assert repr(support) == "Support(7 rows, 23 ids, sparse=None)"


@SPARSE
@pytest.mark.parametrize("op", LINEAR)
@pytest.mark.parametrize("softcap", [None, 4.0], ids=["", "softcap"])
def test_heads_within_budget(
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
    op: str,
    sparse: bool,
    softcap: float | None,
) -> None:
    short_chunks(monkeypatch, backend)
    shape = shape_for(backend, "cpu")
    call = LINEAR[op](shape, kept=9, sparse=sparse, softcap=softcap)
    testing.assert_agrees(call, backend)


@pytest.mark.parametrize("op", LOGITS)
def test_logits_within_budget(backend: str, op: str) -> None:
    testing.assert_agrees(LOGITS[op](shape_for(backend, "cpu"), kept=9), backend)


@SPARSE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_precisions(backend: str, dtype: torch.dtype, sparse: bool) -> None:
    call = linear_call((2, 3), dtype=dtype, kept=9, sparse=sparse)
    testing.assert_agrees(call, backend)
    out = run(call, backend)
    assert out["logprobs"].dtype == torch.float32
    assert all(x.dtype == dtype for name, x in out.items() if name.startswith("grad"))
    testing.assert_agrees(logprobs_call((2, 3), dtype=dtype, kept=9), backend)


@SPARSE
@pytest.mark.parametrize("kept", [1, 2, 3, 17, 36, 37])
def test_fp64_from_one_id_to_all(kept: int, sparse: bool) -> None:
    """The same K in every row, -1 where an id is absent; values and gradients in fp64."""
    call = linear_call((4, 5), dtype=torch.float64, extras=("bias", "row_index"), softcap=5.0)
    rng = torch.Generator().manual_seed(kept)
    ids = torch.stack([torch.randperm(37, generator=rng)[:kept] for _ in range(20)])
    if kept > 2:
        ids[torch.rand(ids.shape, generator=rng) < 0.3] = -1
    call = call.option(support=Support(ids, sparse=sparse))
    testing.assert_agrees(call, "cpu")
    if kept == 37 and not (ids == -1).any():
        whole = run(call.option(support=None), "cpu")
        for name, x in run(call, "cpu").items():
            torch.testing.assert_close(x, whole[name], rtol=1e-12, atol=1e-13)


def test_fp64_gradcheck() -> None:
    call = linear_call((2, 3), 11, 4, dtype=torch.float64, kept=5, temperature=0.8, softcap=4.0)
    t = call.tensors
    for sparse in (True, False):
        support = call.options["support"]
        support = Support(support.ids, support.offsets, sparse=sparse)

        def op(*x: torch.Tensor, support: Support = support) -> Any:
            return ppo_fast.linear_token_logprobs(
                x[0],
                x[1],
                t["tokens"],
                bias=x[2],
                temperature=0.8,
                softcap=4.0,
                mask=t["mask"],
                support=support,
            )

        leaves = [t[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]
        assert torch.autograd.gradcheck(op, leaves)


def test_dense_logits_with_minus_infinity_say_the_same(kernel: str) -> None:
    """Logits of -inf outside of the kept ids: the same values, and gradients of 0 there."""
    logits = torch.randn(6, 30, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(6)
    ids = torch.stack([torch.arange(6) * 4 + i for i in range(6)])
    outside = torch.ones_like(logits, dtype=torch.bool).scatter_(1, ids.clamp(max=29), False)
    outside[torch.arange(6), tokens] = False
    support = Support(ids.clamp(max=29).unique_consecutive(dim=1))
    leaves = [logits.clone().requires_grad_(), logits.masked_fill(outside, -math.inf)]
    leaves[1].requires_grad_()
    found = []
    for leaf, options in zip(leaves, ({"support": support}, {}), strict=True):
        out = ppo_fast.token_logprobs(leaf, tokens, backend=kernel, **options)
        (out.logprobs - 0.3 * out.entropy).sum().backward()
        found.append((*out, leaf.grad))
    for a, b in zip(*found, strict=True):
        testing.assert_within_budget(a.detach(), b.detach(), condition=10.0, ops=8)
    assert not bool(found[0][2][outside].any())


@SPARSE
def test_rows_do_not_depend_on_others(kernel: str, sparse: bool) -> None:
    """A row alone, among others of any K, and in another order has the same bits."""
    call = linear_call((12,), 67, 40, kept=30, sparse=sparse, extras=(), temperature=0.9)
    call.cotangents.clear()
    support, t = call.options["support"], call.tensors
    whole = ppo_fast_forward(call, kernel)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    for index in (order, torch.cat([order, order]), torch.tensor([4]), torch.tensor([7, 2])):
        part = call.replace(**{k: t[k][index] for k in ("hidden", "tokens", "mask")})
        got = ppo_fast_forward(part.option(support=support.rows(index)), kernel)
        for name, x in whole.items():
            assert same_bits(got[name], x[index]), name


def ppo_fast_forward(call: Call, backend: str) -> dict[str, torch.Tensor]:
    """Both outputs and the hidden gradient, which belongs to the row too."""
    hidden = call.tensors["hidden"].detach().requires_grad_()
    call = call.replace(hidden=hidden)
    out = ppo_fast.linear_token_logprobs(**call.tensors, **call.options, backend=backend)
    (grad,) = torch.autograd.grad((out.logprobs + 0.5 * out.entropy).sum(), hidden)
    return {"logprobs": out.logprobs.detach(), "entropy": out.entropy.detach(), "grad": grad}


@SPARSE
def test_garbage_in_masked_rows_reaches_nothing(kernel: str, sparse: bool) -> None:
    call = linear_call((4, 5), kept=9, sparse=sparse, ignored=False)
    keep = call.tensors["mask"]
    clean = run(call, kernel)
    for value in (math.nan, math.inf):
        hidden = torch.where(keep[..., None], call.tensors["hidden"], value)
        dirty = run(call.replace(hidden=hidden), kernel)
        for name, x in dirty.items():
            assert same_bits(x, clean[name]), name
    assert not bool(clean["logprobs"][~keep].any() or clean["grad_hidden"][~keep].any())


@SPARSE
def test_a_wrong_id_makes_its_row_nan(backend: str, sparse: bool) -> None:
    hidden = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.randn(13, 8, generator=torch.Generator().manual_seed(1))
    tokens = torch.tensor([1, 2, 3])
    for wrong in (13, -2, 1 << 40):
        ids = torch.tensor([[1, 4, 5], [2, 6, wrong], [3, -1, 0]])
        support = Support(ids, sparse=sparse)
        out = ppo_fast.linear_token_logprobs(
            hidden, weight, tokens, support=support, backend=backend
        )
        assert out.logprobs.isnan().tolist() == [False, True, False]
        assert out.entropy.isnan().tolist() == [False, True, False]
        (grad,) = torch.autograd.grad(out.logprobs.sum(), hidden)
        assert grad.isnan().any(1).tolist() == [False, True, False]
        logits = (hidden @ weight.t()).detach()
        scored = ppo_fast.token_logprobs(logits, tokens, support=support, backend=backend)
        assert scored.logprobs.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("bad, message", [(13, "ids in"), (4, "once in a row")])
def test_debug_names_wrong_and_double_ids(
    monkeypatch: pytest.MonkeyPatch, bad: int, message: str
) -> None:
    monkeypatch.setattr(_checks, "DEBUG", True)
    support = Support(torch.tensor([[1, 4, bad], [2, 3, 5]]))
    with pytest.raises((IndexError, ValueError), match=f"support must have .*{message}.*row 0"):
        ppo_fast.token_logprobs(torch.zeros(2, 13), torch.tensor([1, 2]), support=support)
    masked = torch.tensor([False, True])
    ppo_fast.token_logprobs(torch.zeros(2, 13), torch.tensor([1, 2]), mask=masked, support=support)


@pytest.mark.parametrize(
    "ids, offsets, error, message",
    [
        ([1, 2], [0, 2, 1, 2], ValueError, "offsets must not fall, got 1 after 2 at row 1"),
        ([1, 2], [0, 3], ValueError, "rise from 0 to the number of ids, 2, got 0 to 3"),
        ([1, 2], [1, 2], ValueError, "got 1 to 2"),
        ([1, 2], None, ValueError, "shape (..., K) without offsets, got (2,)"),
        ([1.0], [0, 1], TypeError, "ids must be int64 or int32, got torch.float32"),
        ([[1]], [0, 1], ValueError, "got (1, 1) and (2,)"),
    ],
)
def test_bad_supports(
    ids: list[Any], offsets: list[int] | None, error: type[Exception], message: str
) -> None:
    ends = None if offsets is None else torch.tensor(offsets)
    with pytest.raises(error) as raised:
        Support(torch.tensor(ids), ends)
    assert message in str(raised.value)


def test_bad_arguments() -> None:
    logits, tokens = torch.zeros(2, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"a row for each of the 2 tokens, got 1"):
        ppo_fast.token_logprobs(logits, tokens, support=Support(torch.tensor([[1, 2]])))
    with pytest.raises(TypeError, match=r"must be a ppo_fast.Support, got Tensor"):
        ppo_fast.token_logprobs(logits, tokens, support=tokens)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"sparse must be True, False or None, got 1"):
        Support(torch.tensor([[1]]), sparse=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"ids must be a tensor, got list"):
        Support([[1]])  # type: ignore[arg-type]


@pytest.mark.parametrize("op", [*LINEAR, *LOGITS])
def test_cuda_by_name_is_refused(op: str) -> None:
    call = (LINEAR | LOGITS)[op]((2, 2), kept=3)
    with pytest.raises(ValueError, match=r"backend must be one of reference, cpu, triton with a"):
        run(call, usable("cuda"))


def test_the_decision_is_carried_to_the_rows() -> None:
    """From the counts of what was made first, whatever part of it is taken."""
    ids = torch.arange(40).view(4, 10)
    small = Support(torch.cat([ids.flatten(), torch.arange(200)]), torch.tensor([0, 10, 20, 240]))
    assert small.is_sparse(1000) and not small.is_sparse(500)
    for row in (0, 2):
        part = small.rows(torch.tensor([row]))
        assert part.is_sparse(1000) and not part.is_sparse(500)
    assert Support(ids, sparse=True).is_sparse(1) and not Support(ids, sparse=False).is_sparse(99)


@SPARSE
def test_an_update_starts_at_a_ratio_of_one(kernel: str, sparse: bool) -> None:
    """Micro-batches of the scored batch, by both ops and with gradients, to the bit."""
    call = linear_call((12,), 67, 40, kept=30, sparse=sparse, extras=(), temperature=0.9)
    t, support = call.tensors, call.options["support"]
    old = ppo_fast.linear_token_logprobs(**t, **call.options, backend=kernel).logprobs
    for index in (torch.tensor([3, 8, 1]), torch.arange(12)):
        out = ppo_fast.linear_ppo_loss(
            t["hidden"][index].requires_grad_(),
            t["weight"],
            t["tokens"][index],
            old[index],
            torch.ones(len(index)),
            t["mask"][index],
            temperature=0.9,
            support=support.rows(index),
            backend=kernel,
        )
        assert same_bits(out.logprobs, old[index])
        assert float(out.stats.compute()["ratio_max"]) == 1.0


def test_weight_gradients_of_many_pairs_are_added_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    call = linear_call((4, 5), dtype=torch.float64, kept=9, sparse=True)
    whole = run(call, "cpu")
    monkeypatch.setattr(sparse_head, "_SORTED", 25)
    for name, x in run(call, "cpu").items():
        torch.testing.assert_close(x, whole[name], rtol=1e-12, atol=1e-13)
    # The sum of the parts is rounded once.
    narrow = linear_call((40, 5), 11, dtype=torch.bfloat16, mask=None)
    ids = torch.rand(200, 11, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :6]
    testing.assert_agrees(narrow.option(support=Support(ids, sparse=True)), "cpu")


def test_the_frozen_parts_cost_no_gradient(kernel: str) -> None:
    call = linear_call((3, 4), kept=9, sparse=True)
    every = run(call, kernel)
    t = call.tensors
    for learnt in ("hidden", "weight", "bias"):
        leaf = t[learnt].detach().clone().requires_grad_()
        out = ppo_fast.linear_token_logprobs(
            **call.replace(**{learnt: leaf}).tensors, **call.options, backend=kernel
        )
        c = call.cotangents
        loss = (out.logprobs * c["logprobs"] + out.entropy * c["entropy"]).sum()
        (grad,) = torch.autograd.grad(loss, leaf)
        assert same_bits(grad, every[f"grad_{learnt}"])


def test_inplace_backward_with_whole_rows(kernel: str) -> None:
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(1))
    grads = []
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        z = leaf * 1.0
        out = ppo_fast.token_logprobs(
            z, torch.tensor(TOKENS), support=given(), inplace_backward=inplace, backend=kernel
        )
        (out.logprobs + out.entropy).sum().backward()
        grads.append(leaf.grad)
        assert (z._version > 0) == inplace  # a second backward raises
    assert same_bits(*grads)


def test_forward_mode_is_the_references() -> None:
    logits = torch.randn(7, 11, dtype=torch.float64)
    tangent = torch.randn(7, 11, dtype=torch.float64)

    def op(z: torch.Tensor) -> torch.Tensor:
        with pytest.warns(RuntimeWarning, match="reference"):
            return ppo_fast.token_logprobs(z, torch.tensor(TOKENS), support=given()).logprobs

    _, forward = torch.func.jvp(op, (logits,), (tangent,))
    leaf = logits.clone().requires_grad_()
    ppo_fast.token_logprobs(leaf, torch.tensor(TOKENS), support=given()).logprobs.sum().backward()
    torch.testing.assert_close(forward.sum(), (leaf.grad * tangent).sum())


def test_supports_move_and_are_taken_by_rows() -> None:
    support = given()
    index = torch.tensor([4, 1, 0, 4])
    part = support.rows(index).to("cpu")
    assert part.ids.tolist() == [*range(11), 3, 1, 4, *range(11)]
    assert part.offsets.tolist() == [0, 11, 11, 14, 25] and part.ends.tolist() == [
        0,
        11,
        11,
        14,
        25,
    ]
    assert part.n_whole == 1 and part.whole_index.tolist() == [1]


@SPARSE
def test_a_nan_row_s_absent_pairs_reach_nothing(kernel: str, sparse: bool) -> None:
    """Of a row whose kept logits are all -inf, the weight of id 0 learns nothing."""
    hidden = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(13, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    bias = torch.zeros(13).index_fill(0, torch.tensor([5, 6]), -math.inf)
    support = Support(torch.tensor([[5, 6], [7, 8]]), sparse=sparse)
    out = ppo_fast.linear_token_logprobs(
        hidden, weight, torch.tensor([5, 7]), bias=bias, support=support, backend=kernel
    )
    out.logprobs.sum().backward()
    assert out.logprobs.isnan().tolist() == [True, False]
    assert not bool(weight.grad[0].any()) and bool(weight.grad[5:7].isnan().all())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_absent_ids_are_left_out(dtype: torch.dtype) -> None:
    """Of rows of one width, and between offsets."""
    padded = Support(
        torch.tensor([[[1, -1, 4], [-1, -1, -1]], [[0, 2, 3], [5, -1, -1]]]).to(dtype)
    )
    flat = Support(
        torch.tensor([1, -1, 4, -1, 0, 2, 3, 5]).to(dtype), torch.tensor([0, 3, 4, 7, 8])
    )
    for support in (padded, flat):
        assert support.ids.tolist() == [1, 4, 0, 2, 3, 5]
        assert support.offsets.tolist() == [0, 2, 2, 5, 6] and support.n_whole == 1


@pytest.mark.parametrize("shape", [(0,), (2, 0)], ids=str)
def test_no_rows(backend: str, shape: tuple[int, ...]) -> None:
    for sparse in (True, False):
        call = linear_call(shape, 19, mask=None, kept=5, sparse=sparse)
        out = run(call, backend)
        assert out["logprobs"].shape == shape and not bool(out["grad_weight"].any())
    out = run(logprobs_call(shape, 19, mask=None, kept=5), backend)
    assert out["logprobs"].shape == shape and out["grad_logits"].shape == (*shape, 19)


@pytest.mark.parametrize("inplace", [False, True])
def test_logits_of_any_strides(kernel: str, inplace: bool) -> None:
    """A cut of longer sequences, where gradients are added too, one id three times."""
    every = torch.randn(3, 4, 11, generator=torch.Generator().manual_seed(1))
    tokens = torch.tensor([[1, 2, 5], [3, 4, 5], [6, 7, 8]])
    support = Support(torch.tensor([[5, 5, 5, i] for i in range(9)]))
    grads = []
    for cut in (True, False):
        leaf = (every if cut else every[:, :-1].contiguous()).clone().requires_grad_()
        z = leaf * 1.0
        out = ppo_fast.token_logprobs(
            z[:, :-1] if cut else z,
            tokens,
            support=support,
            inplace_backward=inplace,
            backend=kernel,
        )
        (out.logprobs + out.entropy).sum().backward()
        grads.append(leaf.grad[:, :3])
    assert same_bits(*grads)
