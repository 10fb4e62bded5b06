"""Random shapes, layouts, types and masks: within budget, and bitwise as laid out plainly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import ON_GPU, usable
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ppo_fast import testing
from ppo_fast._boundary.schema import ESTIMATORS, MASKED, REDUCTIONS, SCORE_AT, VARIANTS

ROWS = st.sampled_from([0, 1, 2, 5, 9])
STEPS = st.sampled_from([0, 1, 2, 7, 31, 32, 33])
VOCABULARIES = st.sampled_from([1, 2, 7, 31, 32, 33, 130])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
MASKS = st.sampled_from(["all", "empty", "random", "row", "right", "left"])
LAYOUTS = st.sampled_from(["contiguous", *testing.LAYOUTS])
GAE_EXTRAS = st.sampled_from(
    [
        (),
        ("bootstrap",),
        ("bootstrap", "terminated"),
        ("next_values", "terminated", "truncated"),
        ("next_values", "rho", "c", "lam", "lam_returns"),
        ("bootstrap", "row_lam"),
    ]
)
PPO_EXTRAS = st.sets(
    st.sampled_from(
        ["entropy", "ref_logprobs", "is_weights", "advantage_moments", "sequence_weights"]
    )
)


def options_of(op: str) -> st.SearchStrategy[dict[str, Any]]:
    """The options of one op."""
    return {
        "token_logprobs": st.fixed_dictionaries(
            {
                "vocab": VOCABULARIES,
                "scale": st.sampled_from([0.0, 3.0, 30.0]),
            }
        ),
        "ppo_loss": st.fixed_dictionaries(
            {
                "variant": st.sampled_from(VARIANTS),
                "reduction": st.sampled_from(REDUCTIONS),
                "kl_estimator": st.sampled_from([e + p for e in ESTIMATORS for p in ("", "+")]),
                "extras": PPO_EXTRAS.map(lambda x: tuple(sorted(x))),
            }
        ),
        "value_loss": st.fixed_dictionaries(
            {
                "form": st.sampled_from(["max", "clipped"]),
                "reduction": st.sampled_from(REDUCTIONS),
                "clip": st.sampled_from([None, 0.2]),
            }
        ),
        "gae": st.fixed_dictionaries({"masked": st.sampled_from(MASKED), "extras": GAE_EXTRAS}),
        "rlhf_advantages": st.fixed_dictionaries(
            {
                "masked": st.sampled_from(MASKED),
                "score_at": st.sampled_from(SCORE_AT),
                "kl_estimator": st.sampled_from(ESTIMATORS),
            }
        ),
        "whiten": st.fixed_dictionaries(
            {
                "shift_mean": st.booleans(),
                "unbiased": st.booleans(),
                "eps": st.just(1e-3),
            }
        ),
    }[op]


@st.composite
def calls(draw: st.DrawFn, op: str, device: str, small: bool) -> tuple[testing.Call, str]:
    shape = (draw(ROWS), draw(STEPS))
    if small:
        shape = (min(shape[0], 2), min(shape[1], 7))
    call = testing.FACTORIES[op](
        shape,
        dtype=draw(DTYPES),
        device=device,
        seed=draw(st.integers(0, 99)),
        mask=draw(MASKS),
        **draw(options_of(op)),
    )
    return call, draw(LAYOUTS)


def check(drawn: tuple[testing.Call, str], backend: str) -> None:
    call, layout = drawn
    if layout != "contiguous":
        view, call = testing.with_layout(call, layout)
        a, b = testing.run(view, backend), testing.run(call, backend)
        for name, x in b.items():
            assert testing.same_bits(a[name], x), name
    if layout != "expanded":  # its repeated rows are not kept clear of the losses' kinks
        testing.assert_agrees(call, backend)


@pytest.mark.case("D7")
@pytest.mark.parametrize("op", testing.FACTORIES)
@pytest.mark.parametrize("backend_name, examples", [("cpu", 60), ("triton", 8), ("cuda", 16)])
def test_any_input(op: str, backend_name: str, examples: int) -> None:
    backend = usable(backend_name)
    device = "cuda" if backend in ON_GPU and torch.cuda.is_available() else "cpu"

    # Triton's interpreter takes 40 ms a row of logits.
    small = op == "token_logprobs" and backend == "triton" and device == "cpu"

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(drawn=calls(op, device, small))
    def holds(drawn: tuple[testing.Call, str]) -> None:
        with testing.poisoned_allocations():
            check(drawn, backend)

    holds()
    assert usable(backend_name)


@st.composite
def packed_calls(draw: st.DrawFn, op: str, device: str) -> testing.Call:
    lengths = draw(st.lists(st.sampled_from([0, 1, 2, 5, 33]), max_size=6))
    ends = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    n, seed = ends[-1], draw(st.integers(0, 99))
    call = testing.FACTORIES[op](
        (n,),
        seed=seed,
        device=device,
        mask=draw(MASKS.filter(lambda m: m not in ("row", "left", "right"))),
        packed=True,
    )
    per_sequence = {
        k: torch.randn(len(lengths), generator=torch.Generator().manual_seed(seed)).to(device)
        for k in ("scores", "bootstrap")
        if k in call.tensors
    }
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    return call.replace(cu_seqlens=torch.tensor(ends, dtype=dtype, device=device), **per_sequence)


@pytest.mark.case("D7")
@pytest.mark.parametrize("op", ["ppo_loss", "value_loss", "gae", "rlhf_advantages"])
@pytest.mark.parametrize("backend_name, examples", [("cpu", 40), ("triton", 6), ("cuda", 12)])
def test_any_packing(op: str, backend_name: str, examples: int) -> None:
    backend = usable(backend_name)
    device = "cuda" if backend in ON_GPU and torch.cuda.is_available() else "cpu"

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(call=packed_calls(op, device))
    def holds(call: testing.Call) -> None:
        with testing.poisoned_allocations():
            testing.assert_agrees(call, backend)

    holds()
    assert usable(backend_name)
