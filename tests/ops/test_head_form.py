"""A head's logit scale, before its cap, and rows of padding behind its vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import usable
from head_helpers import Allocations, shape_for, short_chunks

import ppo_fast
from ppo_fast import _checks, testing
from ppo_fast.testing import (
    Call,
    linear_at_call,
    linear_call,
    linear_divergence_call,
    linear_ppo_call,
    run,
    same_bits,
    token_divergence_call,
)

DOUBLE = torch.float64
TAUGHT = {"kind": "jsd", "coef": 0.5}
# Factories and options; all with a factor, with and without a cap, and padded.
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "logprobs": (linear_call, {}),
    "one temperature": (linear_call, {"temperature": 0.8}),
    "rows": (linear_call, {"extras": ("row_index",)}),
    "sparse": (linear_call, {"kept": 7, "sparse": True}),
    "dense": (linear_call, {"kept": 7, "sparse": False}),
    "bf16": (linear_call, {"dtype": torch.bfloat16}),
    "ids": (linear_at_call, {}),
    "loss": (linear_ppo_call, {"z_loss_coef": 0.25}),
    "gspo": (linear_ppo_call, {"variant": "gspo"}),
    "fp16": (linear_ppo_call, {"dtype": torch.float16}),
    "loss of bf16": (linear_ppo_call, {"dtype": torch.bfloat16}),
    "taught": (linear_ppo_call, {"teacher": TAUGHT}),
    "taught, sparse": (linear_ppo_call, {"teacher": TAUGHT, "kept": 7, "sparse": True}),
    "divergence of tokens": (token_divergence_call, {"kind": "reverse"}),
    "divergence": (linear_divergence_call, {"kind": "mixed"}),
}


def padded(case: str, cap: float | None, shape: tuple[int, int] = (3, 5), **more: Any) -> Call:
    make, options = CASES[case]
    form = {"logit_scale": 0.3, "padding": 6, **({} if cap is None else {"softcap": cap})}
    call: Call = make(shape, **form, **options, **more)
    return call


def cut(call: Call) -> Call:
    """The call of a head without padding."""
    size = call.options["vocab_size"]
    own = {k: call.tensors[k][:size] for k in ("weight", "bias") if k in call.tensors}
    return call.replace(**own).option(vocab_size=None)


@pytest.mark.parametrize("cap", [None, 4.0], ids=["", "cap"])
@pytest.mark.parametrize("case", CASES)
def test_within_budget(
    backend: str, device: str, monkeypatch: pytest.MonkeyPatch, case: str, cap: float | None
) -> None:
    """Of the fp64 reference, whose padding is NaN."""
    if backend == "cuda" and ("taught" in case or case[0] == "d" or case == "sparse"):
        pytest.skip("CUDA C++ has neither supports nor teachers")
    short_chunks(monkeypatch, backend)
    call = padded(case, cap, shape_for(backend, device), device=device)
    testing.assert_agrees(call, backend)


@pytest.mark.parametrize("cap", [None, 4.0], ids=["", "cap"])
@pytest.mark.parametrize("case", CASES)
def test_padding_changes_no_bit(kernel: str, device: str, case: str, cap: float | None) -> None:
    """Not of a result, not of a gradient; its own is 0."""
    if kernel == "cuda" and ("taught" in case or case[0] == "d" or case == "sparse"):
        pytest.skip("CUDA C++ has neither supports nor teachers")
    call = padded(case, cap, device=device)
    size, want = call.options["vocab_size"], run(cut(call), kernel)
    for name, x in run(call, kernel).items():
        if name in ("grad_weight", "grad_bias"):
            assert x.shape[0] == size + 6
            assert bool((x[size:] == 0).all())
            x = x[:size]
        assert same_bits(x, want[name]), name


@pytest.mark.parametrize("cap", [None, 4.0], ids=["", "cap"])
@pytest.mark.parametrize("temperature", [0.8, "token"])
def test_the_formula(backend: str, cap: float | None, temperature: Any) -> None:
    """z = cap·tanh(scale·(x·Wᵀ + b) / cap) / τ of logits that are formed here."""
    double = backend in ("reference", "cpu")
    more = {"dtype": DOUBLE} if double else {}
    call = padded("logprobs", cap, temperature=temperature, mask=None, ignored=False, **more)
    size, t = call.options["vocab_size"], call.tensors | call.options
    x, w, b = (t[k].double() for k in ("hidden", "weight", "bias"))
    z = 0.3 * (x @ w[:size].mT + b[:size])
    z = z if cap is None else cap * torch.tanh(z / cap)
    divisor = t["temperature"]
    z = z / (divisor[..., None].double() if isinstance(divisor, torch.Tensor) else divisor)
    want = z.log_softmax(-1).gather(-1, t["tokens"][..., None])[..., 0]
    got = run(call, backend)["logprobs"].double()
    # Both are off by some roundings of logits of up to 16.
    eps = torch.finfo(DOUBLE if double else torch.float32).eps
    assert float((got - want).abs().max()) <= 64 * 16 * eps


def test_without_a_cap_the_factor_is_the_temperature_s(kernel: str, device: str) -> None:
    call = cut(padded("loss", None, temperature="token", device=device))
    other = call.option(logit_scale=1.0)
    other = other.replace(temperature=call.tensors["temperature"] / 0.3)
    want = run(other, kernel)
    assert all(same_bits(x, want[name]) for name, x in run(call, kernel).items())


@pytest.mark.parametrize("case", ["logprobs", "ids", "loss"])
def test_tokens_in_the_padding_are_out_of_range(
    backend: str, device: str, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """The row is NaN, as for any other; an error under PPO_FAST_DEBUG."""
    call = padded(case, 4.0, mask=None, device=device)._replace(cotangents={})
    name, size = ("ids" if case == "ids" else "tokens"), call.options["vocab_size"]
    tokens = call.tensors[name].clone()
    tokens.view(15, -1)[7, 0] = size
    tokens[tokens < 0] = 0
    call = call.replace(**{name: tokens})
    out = run(call, backend)["logprobs"].reshape(15, -1)
    assert bool(out[7].isnan().all() and not out[6].isnan().any())
    monkeypatch.setattr(_checks, "DEBUG", True)
    with pytest.raises(IndexError, match=rf"{name} must be in \[0, {size}\), got {size} at"):
        run(call, backend)


@pytest.mark.parametrize("sparse", [True, False])
def test_kept_ids_in_the_padding_are_out_of_range(kernel: str, sparse: bool) -> None:
    """Their row is NaN; nothing reaches the padding's gradient."""
    if kernel == "cuda":
        pytest.skip("CUDA C++ has no supports")
    call = padded("logprobs", 4.0, mask=None, ignored=False)
    size = call.options["vocab_size"]
    ids = torch.randint(size, (15, 4), generator=torch.Generator().manual_seed(1))
    ids[7, 2] = size + 1
    out = run(call.option(support=ppo_fast.Support(ids, sparse=sparse)), kernel)
    odd = out["logprobs"].view(-1).isnan()
    assert bool(odd[7]) and int(odd.sum()) == 1
    assert bool((out["grad_weight"][size:] == 0).all())


@pytest.mark.parametrize("case", ["logprobs", "loss", "divergence"])
def test_padding_takes_no_copy_of_the_gradient(case: str) -> None:
    """As many tensors of the weight's size as without."""
    call = padded(case, None, extras=()) if case == "logprobs" else padded(case, None)
    counts = []
    for given in (call, cut(call)):
        with Allocations() as made:
            run(given, usable("cpu"))
        shape = given.tensors["weight"].shape
        counts.append(sum(s == shape for s in made.shapes))
    assert counts[0] == counts[1] > 0


def test_a_teacher_has_padding_of_its_own(kernel: str) -> None:
    if kernel == "cuda":
        pytest.skip("CUDA C++ has no teachers")
    call = padded("divergence", 4.0)
    want, t = run(call, kernel), call.tensors
    behind = {
        k: torch.cat([t[k], t[k].new_full((9, *t[k].shape[1:]), float("nan"))])
        for k in ("teacher_weight", "teacher_bias")
    }
    out = run(call.replace(**behind), kernel)
    assert all(same_bits(x, want[name]) for name, x in out.items())
    short = call.replace(teacher_weight=t["teacher_weight"][:-1], teacher_bias=None)
    with pytest.raises(ValueError, match=r"teacher\.weight must have the student's 43 rows"):
        run(short, kernel)


@pytest.mark.parametrize("cap", [None, 3.0], ids=["", "cap"])
@pytest.mark.parametrize("case", ["logprobs", "sparse", "ids", "loss", "divergence"])
def test_gradcheck(case: str, cap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By finite differences in fp64, padding of numbers among the inputs."""
    short_chunks(monkeypatch, "triton")
    more = {"dtype": DOUBLE, "mask": None, "width": 3}
    if case == "loss":  # whose log-ratios are far from its kinks
        more |= {"variant": "linear", "entropy_coef": 0.1}
    call = padded(case, cap, (2, 3), **more)
    names = ("hidden", "weight", "bias")
    leaves = [call.tensors[k].nan_to_num(0.5).requires_grad_() for k in names]
    keep, outputs = call._replace(cotangents={}), tuple(call.cotangents)

    def function(*given: torch.Tensor) -> Any:
        made = keep.replace(**dict(zip(names, given, strict=True)))
        args = testing.arguments(made.tensors | made.options)
        out = getattr(ppo_fast, made.op)(**args, backend=usable("cpu"))
        return tuple(getattr(out, x) for x in outputs)

    assert torch.autograd.gradcheck(function, leaves)
