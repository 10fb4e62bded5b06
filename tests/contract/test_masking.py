"""The contents of masked slots reach no output and no gradient, whatever they are."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import shape_of

from ppo_fast import testing
from ppo_fast._boundary.schema import REDUCTIONS, VARIANTS
from ppo_fast.testing import Call, make_mask, run, same_bits

GARBAGE = (math.nan, math.inf, -math.inf)
MASKS = ("random", "row", "empty", "left")
PPO_EXTRAS = ("entropy", "ref_logprobs", "is_weights", "advantage_moments", "sequence_weights")
ENDS = ("next_values", "terminated", "truncated")

CALLS: dict[str, tuple[str, dict[str, object]]] = {
    "logprobs": ("token_logprobs", {}),
    **{f"ppo {v}": ("ppo_loss", {"variant": v}) for v in VARIANTS},
    **{f"ppo {r}": ("ppo_loss", {"reduction": r}) for r in REDUCTIONS},
    "ppo gspo sequences": ("ppo_loss", {"variant": "gspo", "reduction": "seq-mean-token-mean"}),
    "ppo weights": ("ppo_loss", {"kl_weight": "ratio", "extras": PPO_EXTRAS}),
    "ppo gspo weights": (
        "ppo_loss",
        {"kl_weight": "ratio", "variant": "gspo", "extras": PPO_EXTRAS},
    ),
    "ppo score": ("ppo_loss", {"kl_weight": "score", "kl_clamp": None}),
    "ppo unclamped": ("ppo_loss", {"log_ratio_clamp": None, "kl_clamp": None}),
    "value max": ("value_loss", {}),
    "value clipped": ("value_loss", {"form": "clipped", "reduction": "seq-mean-token-mean"}),
    "value unclipped": ("value_loss", {"clip": None}),
    "gae carry": (
        "gae",
        {"extras": ("bootstrap", "terminated", "rho", "c", "lam", "lam_returns")},
    ),
    "gae zero": ("gae", {"masked": "zero", "extras": ("bootstrap", "terminated", "rho", "c")}),
    "gae lam zero": ("gae", {"masked": "zero", "extras": ("bootstrap", "lam", "lam_returns")}),
    "gae ends carry": ("gae", {"extras": ENDS}),
    "gae ends zero": ("gae", {"masked": "zero", "extras": ENDS}),
    "rlhf last": ("rlhf_advantages", {}),
    "rlhf pad": ("rlhf_advantages", {"score_at": "first-pad", "masked": "zero"}),
    "rlhf token": ("rlhf_advantages", {"score_at": "per-token", "kl_estimator": "k3"}),
    "whiten": ("whiten", {}),
}


def live(call: Call) -> torch.Tensor:
    """The mask, and for "first-pad" the slot whose value is read."""
    keep = call.tensors["mask"]
    if call.options.get("score_at") != "first-pad":
        return keep
    out = keep.clone()
    for b, row in enumerate(keep.tolist()):
        last = max((t for t, kept in enumerate(row) if kept), default=None)
        if last is not None and last + 1 < len(row):
            out[b, last + 1] = True
    return out


@pytest.mark.case("X2")
@pytest.mark.parametrize("op, options", CALLS.values(), ids=CALLS.keys())
def test_garbage_is_as_good_as_zeros(
    backend: str, device: str, op: str, options: dict[str, object]
) -> None:
    """NaN and ±inf in every masked slot of every input give the same bits."""
    for mask in MASKS:
        call = testing.FACTORIES[op](shape_of(op), mask=mask, device=device, **options)
        read = live(call)
        clean = run(testing.with_garbage(call, 0.0, read), backend)
        for value in GARBAGE:
            dirty = run(testing.with_garbage(call, value, read), backend)
            for name, x in dirty.items():
                assert same_bits(x, clean[name]), (mask, value, name)


@pytest.mark.parametrize("op, options", CALLS.values(), ids=CALLS.keys())
def test_masked_slots_are_exactly_zero(
    backend: str, device: str, op: str, options: dict[str, object]
) -> None:
    for mask in MASKS:
        call = testing.FACTORIES[op](shape_of(op), mask=mask, device=device, **options)
        keep = call.tensors["mask"]
        for name, x in run(testing.with_garbage(call, math.nan, live(call)), backend).items():
            if name in ("loss", "stats", "moments"):
                assert not bool(x.isnan().any()), name
                continue
            dropped = ~live(call) if name in ("returns", "rewards") else ~keep
            assert bool((x[dropped] == 0).all()), name
            assert bool(x[keep].isfinite().all()), name


@pytest.mark.parametrize("op", ["ppo_loss", "value_loss", "gae"])
def test_packed_garbage(backend: str, device: str, op: str) -> None:
    """`mask` and `cu_seqlens` together."""
    call = testing.FACTORIES[op]((45,), packed=True, device=device)
    clean, dirty = (run(testing.with_garbage(call, x), backend) for x in (0.0, math.nan))
    assert all(same_bits(dirty[k], clean[k]) for k in clean)


@pytest.mark.case("X13")
@pytest.mark.parametrize("op", testing.FACTORIES)
@pytest.mark.parametrize(
    "dtype",
    [torch.uint8, torch.int8, torch.int32, torch.int64, torch.float32, torch.bfloat16],
    ids=str,
)
def test_masks_of_any_dtype_are_flags(
    backend: str, device: str, op: str, dtype: torch.dtype
) -> None:
    """Non-zero keeps: 2, −1, 0.5 are no weights."""
    call = testing.FACTORIES[op](shape_of(op), device=device)
    want = run(call, backend)
    flags = call.tensors["mask"].to(dtype)
    kinds = [flags, flags * 2, -flags] if dtype != torch.uint8 else [flags, flags * 255]
    for mask in kinds + ([flags * 0.5] if dtype.is_floating_point else []):
        got = run(call.replace(mask=mask), backend)
        assert all(same_bits(got[k], want[k]) for k in want)


@pytest.mark.parametrize("op", ["token_logprobs", "ppo_loss", "value_loss", "gae", "whiten"])
def test_no_mask_is_a_mask_of_ones(backend: str, device: str, op: str) -> None:
    call = testing.FACTORIES[op](shape_of(op), mask=None, device=device)
    full = call.replace(mask=make_mask(shape_of(op), "all", device=device))
    a, b = run(call, backend), run(full, backend)
    assert all(same_bits(a[k], b[k]) for k in a)


@pytest.mark.case("X11")
@pytest.mark.parametrize("op", [op for op in testing.FACTORIES if op != "whiten"])
def test_an_empty_row_leaves_the_others(backend: str, device: str, op: str) -> None:
    """Per-row outputs of the other rows are those of a batch without the empty one."""
    options = {"reduction": "token-sum"} if op in ("ppo_loss", "value_loss") else {}
    call = testing.FACTORIES[op](shape_of(op), mask="row", device=device, **options)
    rest = testing.with_rows(call, torch.arange(1, 4, device=device))
    a, b = run(call, backend), run(rest, backend)
    for name, x in a.items():
        if x.dim() >= 2:
            assert not bool(x[0].any()) and same_bits(x[1:], b[name]), name


HEADS: dict[str, tuple[str, dict[str, object]]] = {
    "linear logprobs": ("linear_token_logprobs", {"softcap": 4.0}),
    "linear logprobs at": ("linear_logprobs_at", {"softcap": 4.0}),
    "logits loss": ("logits_ppo_loss", {}),
    "logits loss gspo": ("logits_ppo_loss", {"variant": "gspo"}),
    "linear loss": ("linear_ppo_loss", {}),
    "linear loss gspo": ("linear_ppo_loss", {"variant": "gspo"}),
    "linear loss rows": ("linear_ppo_loss", {"head_extras": ("bias", "row_index")}),
}


@pytest.mark.case("X2")
@pytest.mark.parametrize("op, options", HEADS.values(), ids=HEADS.keys())
def test_garbage_reaches_nothing_of_the_head(
    backend: str, device: str, op: str, options: dict[str, object]
) -> None:
    """NaN hidden rows, logits, per-token numbers: dW, a sum over all rows, keeps its bits too."""
    slow = backend == "triton" and device == "cpu"
    for mask in MASKS[:1] if slow else MASKS:
        call = testing.HEADS[op]((4, 2), mask=mask, device=device, **options)
        clean = run(testing.with_garbage(call, 0.0), backend)
        for value in GARBAGE[:1] if slow else GARBAGE:
            dirty = run(testing.with_garbage(call, value), backend)
            for name, x in dirty.items():
                assert same_bits(x, clean[name]), (mask, value, name)
        for name in ("logprobs", "entropy", "grad_hidden", "grad_logits"):
            assert name not in dirty or not bool(dirty[name][~call.tensors["mask"]].any()), name


def test_garbage_in_rows_left_out_at_ids(backend: str, device: str) -> None:
    """Rows that row_index does not name are never read, nor are their ids."""
    call = testing.linear_at_call((2, 5), mask=None, device=device, extras=("row_index",))
    unread = torch.ones(10, dtype=torch.bool, device=device)
    unread = unread.index_fill(0, call.tensors["row_index"], False).view(2, 5, 1)
    assert unread.any()
    want = run(call, backend)
    hidden, ids = call.tensors["hidden"], call.tensors["ids"]
    dirty = {
        "hidden": hidden.masked_fill(unread, math.nan),
        "ids": ids.masked_fill(unread, 2**40),
    }
    got = run(call.replace(**dirty), backend)
    assert all(same_bits(got[k], want[k]) for k in want)


@pytest.mark.parametrize("op", ["linear_token_logprobs", "linear_ppo_loss"])
def test_garbage_in_rows_left_out(backend: str, device: str, op: str) -> None:
    """Rows that row_index does not name, and rows of ignored tokens, are never read."""
    extras = {"linear_ppo_loss": "head_extras"}.get(op, "extras")
    call = testing.HEADS[op]((2, 5), mask=None, device=device, **{extras: ("row_index",)})
    tokens, hidden = call.tensors["tokens"], call.tensors["hidden"].clone()
    named = torch.zeros(10, dtype=torch.bool, device=device)
    named[call.tensors["row_index"]] = True
    unread = ~named.view(2, 5) | (tokens == -100)
    assert bool((tokens == -100).any()) and not bool(named.all())
    want = run(call, backend)
    got = run(call.replace(hidden=hidden.masked_fill_(unread[..., None], math.nan)), backend)
    assert all(same_bits(got[k], want[k]) for k in want)


@pytest.mark.parametrize("op", testing.HEADS)
def test_masks_of_the_head_are_flags(op: str) -> None:
    call = testing.HEADS[op]((4, 9))
    want, flags = run(call, "cpu"), call.tensors["mask"]
    for mask in (flags.to(torch.int64) * 2, -flags.float(), flags.bfloat16() * 0.5):
        got = run(call.replace(mask=mask), "cpu")
        assert all(same_bits(got[k], want[k]) for k in want)


@pytest.mark.parametrize("op", testing.HEADS)
def test_no_mask_of_the_head_is_a_mask_of_ones(kernel: str, device: str, op: str) -> None:
    call = testing.HEADS[op]((2, 4), mask=None, device=device)
    full = call.replace(mask=make_mask((2, 4), "all", device=device))
    a, b = run(call, kernel), run(full, kernel)
    assert all(same_bits(a[k], b[k]) for k in a)
