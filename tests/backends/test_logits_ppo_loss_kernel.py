"""The one-pass kernels: the bits of logprobs_fwd, ppo_loss and logprobs_bwd in a row."""

from __future__ import annotations

import math
import re

import launches
import one_pass_helpers
import pytest
import torch
from conftest import usable
from one_pass_helpers import assert_narrowed, assert_same, composed, fused, half_width, make, op
from test_aot import inner_loops, ptx_of
from torch import Tensor

from ppo_fast._boundary.schema import ESTIMATORS, VARIANTS
from ppo_fast.testing import same_bits

pytestmark = pytest.mark.usefixtures("kernel")
INF, NAN = math.inf, math.nan
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PER_TOKEN = [v for v in VARIANTS if v != "gspo"]
OPTIONAL = ("mask", "temperature", "old_logprobs", "is_weights", "moments", "ref_logprobs")


@pytest.fixture(params=["triton", "cuda"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(one_pass_helpers, "BACKEND", usable(request.param))
    return request.param


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("variant", PER_TOKEN)
def test_variants(device: str, variant: str, dtype: torch.dtype) -> None:
    assert_same(make(device, dtype=dtype, variant=variant, seed=1))


@pytest.mark.parametrize("straight", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimators(device: str, estimator: str, straight: bool) -> None:
    for variant in ("clip", "penalty"):
        assert_same(
            make(
                device,
                variant=variant,
                estimator=estimator,
                straight=straight,
                kl_ratio_clip=1.05 if straight else INF,
            )
        )


@pytest.mark.parametrize("kl_weight", [1, 2])
@pytest.mark.parametrize("variant", ["clip", "cispo"])
def test_weights_of_the_kl_term(device: str, variant: str, kl_weight: int) -> None:
    """Not the gradient of the unweighted term either."""
    *_, weighted = assert_same(make(device, variant=variant, kl_coef=0.7, kl_weight=kl_weight))
    *_, plain = fused(make(device, variant=variant, kl_coef=0.7))
    assert not torch.equal(weighted, plain)


@pytest.mark.parametrize("vocab", [1, 33, 1009, 2048, 2052, 9000])
@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
def test_vocabularies(device: str, dtype: torch.dtype, vocab: int) -> None:
    """One lane, a narrow row, a wide one with and without full steps, odd and even."""
    assert_same(make(device, (2,), vocab, dtype=dtype, without=("mask",), entropy_coef=0.5))


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
def test_segments_merge_as_in_logprobs(device: str, dtype: torch.dtype) -> None:
    assert_same(make(device, (2,), 50257, dtype=dtype, without=("mask",)))


@pytest.mark.parametrize(
    "options",
    [
        {"dual_clip": 3.0},
        {"clip_low": 1.0, "clip_high": INF},
        {"kl_clamp": 0.05},
        {"kl_clamp": INF},
        {"log_ratio_min": -0.1, "log_ratio_max": 0.05},
        {"log_ratio_min": -INF, "log_ratio_max": INF},
        {"temperature": 0.3},
        {"entropy_coef": 0.0, "kl_coef": 0.0},
        {"entropy_coef": -0.2, "kl_coef": -0.1},
    ],
    ids=str,
)
def test_numbers(device: str, options: dict[str, float]) -> None:
    assert_same(make(device, without=("temperature",) * ("temperature" in options), **options))


@pytest.mark.parametrize("name", OPTIONAL)
def test_optional_arguments(device: str, name: str) -> None:
    """The linear variant's term takes them all."""
    assert_same(make(device, variant="linear", without=(name,)))
    others = tuple(x for x in OPTIONAL if x != name)
    assert_same(make(device, variant="linear", without=others))


def test_coefficients_on_the_device(device: str) -> None:
    """The tensors replace the numbers."""
    number = make(device, entropy_coef=0.3, kl_coef=0.2)
    coefs = {
        k: torch.tensor(v, device=device) for k, v in {"entropy_coef": 0.3, "kl_coef": 0.2}.items()
    }
    tensor = make(device, entropy_coef=7.0, kl_coef=7.0)._replace(**coefs)
    assert same_bits(assert_same(tensor)[2], assert_same(number)[2])


def test_one_weight_for_all(device: str) -> None:
    args = make(device)
    whole = torch.full_like(args.weights, 0.37)
    one = args._replace(weights=torch.tensor(0.37, device=device))
    assert same_bits(assert_same(one)[2], assert_same(args._replace(weights=whole))[2])


def test_narrow_per_token_arguments(device: str) -> None:
    args = make(device, dtype=torch.bfloat16)
    names = ("old_logprobs", "advantages", "is_weights", "ref_logprobs")
    args = args._replace(**{k: getattr(args, k).bfloat16() for k in names})
    assert_same(args._replace(tokens=args.tokens.int(), mask=args.mask.to(torch.uint8)))


@pytest.mark.parametrize("extra", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
def test_alignments(device: str, dtype: torch.dtype, extra: int) -> None:
    """Rows that start anywhere have the bits of contiguous ones, in place too."""
    args = make(device, (2, 2), 2048, dtype=dtype)
    buffer = torch.full((2, 2, 2048 + extra), NAN, dtype=dtype, device=device)
    view = buffer[..., extra:]
    view.copy_(args.logits)
    results = op("logits_ppo_loss_")(view, *args[1:])
    for x, y in zip((*results, view), op("logits_ppo_loss")(*args), strict=True):
        assert same_bits(x, y)
    assert bool(buffer[..., :extra].isnan().all())


@pytest.mark.parametrize("vocab", [1, 37, 2048, 2056, 9001, 40001])
def test_gradients_of_half_the_width(device: str, vocab: int) -> None:
    """Over fp32 logits, of which a row's writes overlap columns that it has read."""
    args = make(device, (5,) if vocab < 10000 else (2,), vocab, without=("moments",))
    assert_narrowed(args._replace(weights=args.weights * (torch.arange(len(args.weights)) != 3)))


@pytest.mark.parametrize("extra", [1, 2, 4])
def test_gradients_of_half_the_width_start_anywhere(device: str, extra: int) -> None:
    """And stay in their rows."""
    args = make(device, (2, 2), 2048)
    *_, want = op("logits_ppo_loss")(*args)
    buffer = torch.full((2, 2, 2048 + extra), NAN, device=device)
    view = buffer[..., extra:]
    view.copy_(args.logits)
    op("logits_ppo_loss_bf16_")(view, *args[1:])
    assert same_bits(half_width(view), want.bfloat16())
    assert bool(buffer[..., :extra].isnan().all())


def test_half_the_width_wants_fp32_logits(device: str) -> None:
    args = make(device, dtype=torch.bfloat16)
    with pytest.raises((ValueError, RuntimeError), match="logits must be float32"):
        op("logits_ppo_loss_bf16_")(*args)


def test_any_strides(device: str) -> None:
    """Transposed rows, expanded values, three leading dimensions that do not merge."""
    args = make(device, (2, 3, 2))
    want = assert_same(args)
    moved = {
        k: x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        for k, x in args._asdict().items()
        if isinstance(x, Tensor) and x.shape == args.tokens.shape
    }
    logits = args.logits.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    for got, x in zip(fused(args._replace(logits=logits, **moved)), want, strict=True):
        assert same_bits(got, x)
    assert_same(args._replace(advantages=args.advantages[:, :1, :1].expand(2, 3, 2)))


@pytest.mark.parametrize("ignore", [-100, 3])
def test_rows_that_do_not_count_are_never_read(device: str, ignore: int) -> None:
    """0, 0 and exact zeros, whatever stands in the logits and in the token's values."""
    args = make(device, (4,), without=("moments",))
    tokens = torch.where(args.tokens == ignore, 4, args.tokens)
    tokens[1] = ignore
    mask = torch.tensor([1, 1, 0, 1], dtype=torch.uint8, device=device)
    args = args._replace(tokens=tokens, mask=mask, ignore_index=ignore)
    clean = assert_same(args)
    garbage = torch.tensor([NAN, INF], device=device)
    for name in (
        "logits",
        "old_logprobs",
        "advantages",
        "is_weights",
        "ref_logprobs",
        "weights",
        "temperature",
    ):
        spoiled = getattr(args, name).clone()
        spoiled[1:3] = garbage.view(2, *[1] * (spoiled.dim() - 1))
        args = args._replace(**{name: spoiled})
    out = fused(args)
    assert all(bool((x[1:3] == 0).all()) for x in out)
    assert all(same_bits(x, y) for x, y in zip(out, clean, strict=True))


def test_minus_infinity(device: str) -> None:
    """Forbidden tokens get no gradient; a label that is one passes the entropy's alone."""
    args = make(device, (3,), without=("mask", "temperature"), entropy_coef=0.5)
    logits = args.logits.clone()
    logits[:, ::3] = -INF
    args = args._replace(logits=logits, tokens=torch.tensor([3, 4, 5], device=device))
    logprobs, entropy, grad = assert_same(args)
    assert logprobs[0] == -INF and bool(logprobs[1:].isfinite().all())
    assert bool(entropy.isfinite().all()) and bool(grad.isfinite().all())
    assert bool((grad[:, ::3] == 0).all()) and bool(grad[0].any())
    silent = args._replace(options=args.options._replace(entropy_coef=0.0))
    assert not bool(fused(silent)[2][0].any())


@pytest.mark.parametrize("variant", PER_TOKEN)
@pytest.mark.parametrize("poison", ["nan", "inf", "all -inf", "token -1", "token 37"])
def test_a_bad_row_is_nan_and_alone(device: str, variant: str, poison: str) -> None:
    """With slopes that the clamp of the log-ratio, or a weight of 0, would make 0, too."""
    args = make(device, (3,), variant=variant, without=("mask",), entropy_coef=0.0)
    clean = op("logits_ppo_loss")(*args)
    logits, tokens, weights = args.logits.clone(), args.tokens.clone(), args.weights.clone()
    if poison.startswith("token"):
        tokens[1] = int(poison.split()[1])
    elif poison == "all -inf":
        logits[1] = -INF
    else:
        logits[1, 20] = float(poison)
    for weight in (float(weights[1]), 0.0):
        weights[1] = weight
        spoiled = args._replace(logits=logits, tokens=tokens, weights=weights)
        for x, y in zip(op("logits_ppo_loss")(*spoiled), clean, strict=True):
            assert bool(x[1].isnan().all()) and same_bits(x[[0, 2]], y[[0, 2]])


def test_nothing_to_learn_is_exactly_zero(device: str) -> None:
    """A clipped token, one without an advantage, one without a weight: rows of zeros."""
    args = make(
        device, (4,), without=("mask", "moments", "is_weights"), entropy_coef=0.0, kl_coef=0.0
    )
    logprobs = fused(args)[0]
    args.old_logprobs.copy_(logprobs - torch.tensor([1.0, 0.0, 0.0, 0.0], device=device))
    args.advantages.copy_(torch.tensor([1.0, 0.0, 1.0, 1.0], device=device))
    args.weights.copy_(torch.tensor([1.0, 1.0, 0.0, 1.0], device=device))
    grad = assert_same(args)[2]
    assert not bool(grad[:3].any()) and bool(grad[3].any())


@pytest.mark.parametrize("shape", [(0,), (2, 0), ()], ids=str)
def test_leading_shapes_without_two_rows(device: str, shape: tuple[int, ...]) -> None:
    args = make(device, shape, without=("mask",))
    logprobs, entropy, grad = fused(args)
    assert logprobs.shape == entropy.shape == shape and grad.shape == (*shape, 37)
    if not shape:
        assert all(same_bits(x, y) for x, y in zip(fused(args), composed(args), strict=True))


def test_rows_are_independent(device: str) -> None:
    """Each row's bits are its own, whichever program takes it and whatever it took before."""
    args = make(device, (7,), 301)
    whole = fused(args)
    order = torch.tensor([5, 0, 3], device=device)
    picked = {
        k: x[order]
        for k, x in args._asdict().items()
        if isinstance(x, Tensor) and x.dim() and k != "moments"
    }
    for x, y in zip(fused(args._replace(**picked)), whole, strict=True):
        assert same_bits(x, y[order])


@pytest.mark.parametrize("kernel", ["triton"], indirect=True)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("vocab", [1, 16, 33, 2052, 40000])
def test_launches_are_registered(device: str, vocab: int, dtype: torch.dtype) -> None:
    if device != "cpu":
        pytest.skip("the interpreter's launches are what is watched")
    coefs = {k: torch.tensor(0.1) for k in ("entropy_coef", "kl_coef")}
    bare = make(device, (1,), vocab, dtype=dtype, without=OPTIONAL[:2] + OPTIONAL[3:])
    full = make(device, (1,), vocab, dtype=dtype)._replace(**coefs)
    full = full._replace(tokens=full.tokens.int())
    with launches.watch() as launched:
        for args in (bare, full, full._replace(old_logprobs=None)):
            op("logits_ppo_loss")(*args)
            op("logits_ppo_loss_")(*args)
            if dtype == torch.float32:
                op("logits_ppo_loss_bf16_")(*args)
    assert launched == {"logits_ppo_kernel"}


@pytest.mark.parametrize("kernel", ["triton"], indirect=True)
@pytest.mark.parametrize(
    "name", ["logits_ppo_loss.logits_ppo_kernel", "logprobs_grad.dlogits_kernel"]
)
def test_half_the_width_is_written_behind_a_barrier(name: str) -> None:
    """Every loop that writes the gradient reads its logits, waits, and then writes."""
    ptx = ptx_of(name, logits_ptr="*fp32:16", out_ptr="*bf16:16", ALIGN=4, LANES=1024)
    loops = [body for body in inner_loops(ptx) if re.search(r"ld\.global.*st\.global", body, re.S)]
    assert len(loops) == 2, "whole steps, and the row's end"
    for body in loops:
        order = re.findall(r"(ld|st)\.global|(bar)\.sync", body)
        kinds = [a or b for a, b in order]
        assert kinds.count("bar") == 1
        at = kinds.index("bar")
        assert set(kinds[:at]) == {"ld"} and set(kinds[at + 1 :]) == {"st"}


@pytest.mark.parametrize("kernel", ["triton"], indirect=True)
def test_both_passes_move_whole_vectors(device: str) -> None:
    """Rows on 16 bytes and a V of whole vectors: a thread's lanes of a step are one access."""
    widths = (("*bf16:16", 8, r"v2\.b32|\.b64"), ("*fp32:16", 4, r"v4\.b32|b128"))
    for kind, align, width in widths:
        ptx = ptx_of(
            "logits_ppo_loss.logits_ppo_kernel",
            logits_ptr=kind,
            out_ptr=kind,
            ALIGN=align,
            LANES=1024,
            V="i32:16",
        )
        hinted = re.findall(r"(?:ld|st)\.global\S*evict_\w+\S*", ptx)
        assert {"ld", "st"} == {access[:2] for access in hinted}
        assert all(re.search(width, access) for access in hinted)
    assert "L2::evict_last" in ptx and "L2::evict_first" in ptx, "the row waits in L2"
