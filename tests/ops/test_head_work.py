"""Work that the linear ops avoid: products of rows without a gradient, copies, whole logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from head_helpers import Allocations, products, short_chunks

import ppo_fast
from ppo_fast import testing
from ppo_fast.ops import gemm, head
from ppo_fast.testing import linear_at_call, linear_call, linear_ppo_call, run, same_bits

GRADS = ("grad_hidden", "grad_weight", "grad_bias")
BARE: dict[str, Any] = {"extras": (), "kl_coef": 0.0, "ignored": False, "temperature": 1.0}


CALLS: dict[str, testing.Call] = {
    "logprobs": linear_call((5, 12)),
    "logprobs at ids": linear_at_call((5, 12)),
    "clip": linear_ppo_call((5, 12)),
    "gspo": linear_ppo_call((5, 12), variant="gspo"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_frozen_leaves_cost_no_product(
    monkeypatch: pytest.MonkeyPatch, frozen: str, call: testing.Call
) -> None:
    want, rows = run(call, "cpu"), products(monkeypatch)
    leaves = {k: call.tensors[k].clone() for k in ("hidden", "weight", "bias")}
    for name, x in leaves.items():
        x.requires_grad_(name != frozen)
    op = getattr(ppo_fast, call.op)
    out = testing.output(op(**call.replace(**leaves).tensors, **call.options, backend="cpu"))
    torch.autograd.backward([out[k] for k in call.cotangents], list(call.cotangents.values()))
    for name, x in leaves.items():
        assert (x.grad is None) if name == frozen else same_bits(x.grad, want[f"grad_{name}"])
    assert ("hidden_gradient" in rows) == (frozen != "hidden")
    assert ("add_weight_gradient" in rows) == (frozen != "weight")


def test_only_rows_with_a_gradient_are_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the backward forms the logits of the rows whose gradient is not zero."""
    short_chunks(monkeypatch)
    call = linear_call((6, 11), mask=None, ignored=False)
    live = torch.arange(66).view(6, 11) % 5 == 0
    grads = {k: torch.where(live, v, 0.0) for k, v in call.cotangents.items()}
    rows = products(monkeypatch)
    out = run(call._replace(cotangents=grads), "cpu")
    assert rows["add_weight_gradient"] == int(live.sum()) == 14
    assert rows["hidden_gradient"] == 16
    assert rows["logits_into"] == 80 + 16  # 66 rows forward and 14 back, in tiles of 16
    assert not bool(out["grad_hidden"][~live].any()) and bool(out["grad_hidden"][live].any())


def test_masked_rows_are_not_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    short_chunks(monkeypatch)
    call = linear_call((6, 11), mask="right", extras=("bias", "row_index"))
    t, rows = call.tensors, products(monkeypatch)
    keep = (t["mask"] & (t["tokens"] != -100)).flatten()
    kept = int(keep[t["row_index"]].sum())
    run(call, "cpu")
    tiles = -(-kept // 16) * 16
    assert rows["logits_into"] == 2 * tiles and rows["add_weight_gradient"] == kept


def test_nothing_of_the_whole_size_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the logits nor a copy of strided hidden states: chunks and the gradients alone."""
    short_chunks(monkeypatch)
    call = linear_call((8, 33), 211, 64, mask=None, extras=(), ignored=False, temperature=1.0)
    leaves = {k: call.tensors[k].clone().requires_grad_() for k in ("hidden", "weight")}
    tokens = call.tensors["tokens"][:, :-1]
    with Allocations() as seen, torch.no_grad():
        ppo_fast.linear_token_logprobs(leaves["hidden"][:, :-1], leaves["weight"], tokens)
    assert 16 * 64 <= seen.largest() <= 16 * 211
    with Allocations() as seen:
        out = ppo_fast.linear_token_logprobs(leaves["hidden"][:, :-1], leaves["weight"], tokens)
        (out.logprobs + out.entropy).sum().backward()
    assert seen.largest() <= 8 * 33 * 64 and (256, 211) not in seen.shapes


def test_rows_without_a_slope_are_not_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Advantage 0, or clipped, with nothing else to learn: the exact gradient without a FLOP."""
    short_chunks(monkeypatch)
    call = linear_ppo_call((6, 11), mask=None, **BARE)
    adv = torch.where(torch.arange(66).view(6, 11) % 3 == 0, call.tensors["advantages"], 0.0)
    call, rows = call.replace(advantages=adv), products(monkeypatch)
    testing.assert_agrees(call, "cpu", out := run(call, "cpu"))
    live = out["grad_hidden"].any(-1)
    assert bool((live <= (adv != 0)).all()) and 0 < int(live.sum()) < int((adv != 0).sum())
    assert rows["add_weight_gradient"] == int(live.sum())
    # Each chunk of a tile's rows, where any is live, is one tile again.
    assert rows["hidden_gradient"] == 16 * sum(bool(x.any()) for x in live.flatten().split(16))
    assert rows["logits_into"] == 80


def test_nothing_to_learn_multiplies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    call = linear_ppo_call((4, 9), mask=None, **BARE)
    call = call.replace(advantages=torch.zeros(4, 9))
    rows = products(monkeypatch)
    out = run(call, "cpu")
    assert rows["hidden_gradient"] == rows["add_weight_gradient"] == 0
    assert all(not bool(out[k].any()) for k in GRADS) and bool(out["logprobs"].all())


def test_three_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits once, and both gradients; gspo forms the logits again; no gradient, one product."""
    call, rows = linear_ppo_call((4, 8), mask=None, ignored=False), products(monkeypatch)
    run(call, "cpu")
    assert rows == {"logits_into": 32, "hidden_gradient": 32, "add_weight_gradient": 32}
    rows.clear()
    run(call.option(variant="gspo", log_ratio_clamp=None), "cpu")
    assert rows["logits_into"] == 64
    rows.clear()
    run(call._replace(cotangents={}), "cpu")
    assert rows == {"logits_into": 32}


def test_the_logits_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    short_chunks(monkeypatch)
    call = linear_ppo_call((8, 32), 211, 64, mask=None, ignored=False)
    with Allocations() as seen:
        out = run(call, "cpu")
    assert seen.largest() == 256 * 64 and bool(out["grad_weight"].any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 63, 64, 65, 129, 1000])
def test_rows_are_rounded_over_their_own_memory(rows: int, dtype: torch.dtype) -> None:
    z = torch.randn(rows + 3, 37)[:rows]
    want, start = z.to(dtype), z.data_ptr()
    got = gemm.narrowed(z, dtype)
    assert torch.equal(got, want) and got.is_contiguous() and got.data_ptr() == start


@pytest.mark.parametrize("op", ["linear_token_logprobs", "linear_logprobs_at", "linear_ppo_loss"])
def test_blocks_of_chunks_multiply_less_often(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    """As on a GPU: two chunks of logits for one product each of dX and dW, within the budget."""
    short_chunks(monkeypatch)
    ignored = {} if op == "linear_logprobs_at" else {"ignored": False}
    call = testing.HEADS[op]((5, 13), mask=None, **ignored)
    rows = weight_products(monkeypatch)
    single = run(call, "cpu")
    monkeypatch.setattr(head, "_BLOCK", {"cpu": 2})
    double = run(call, "cpu")
    assert rows == [16, 16, 16, 16, 1, 32, 32, 1]
    assert all(same_bits(single[k], double[k]) for k in ("logprobs", "entropy"))
    testing.assert_agrees(call, "cpu", double)


def weight_products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each product for dW from here on."""
    rows: list[int] = []
    product = gemm.add_weight_gradient

    def call(total: Any, dz: torch.Tensor, *rest: Any, **options: Any) -> None:
        rows.append(dz.shape[0])
        product(total, dz, *rest, **options)

    monkeypatch.setattr(gemm, "add_weight_gradient", call)
    return rows


@pytest.mark.parametrize("vocab", [1, 1000, 32000, 50257, 128256, 151936, 152064, 256000, 1 << 21])
def test_heights_are_powers_of_two_on_a_gpu(vocab: int) -> None:
    """And a block's logits fit in 1.4 GB, or are those of the smallest chunk."""
    chunk, block = head.chunk_height(vocab, "cuda"), head.block_height(vocab, "cuda")
    assert chunk & (chunk - 1) == 0 and block in (chunk, 2 * chunk) and 256 <= chunk <= 4096
    assert 4 * vocab * block <= 1.4e9 or block == 256
