"""Rows of logits of two models, the divergence ops' kernels on them, and exact results."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppo_fast._boundary import calls, calls_divergence
from ppo_fast._boundary.options import Scoring, Softmax, Teaching
from ppo_fast.reference.divergence import divergence_terms
from ppo_fast.teacher import KINDS
from ppo_fast.testing import assert_within_budget
from ppo_fast.testing.divergence_conditions import Pair
from ppo_fast.testing.loss_conditions import Softmax as Roundings
from ppo_fast.testing.loss_conditions import finite

INF = math.inf


class Rows(NamedTuple):
    """Rows of logits of two models, and what reaches each row's gradient."""

    logits: Tensor
    teacher: Tensor
    tokens: Tensor
    mask: Tensor | None
    temperature: Tensor | float
    teacher_temperature: Tensor | float
    g: Tensor  # incoming gradients: by log-probability, entropy, divergence
    h: Tensor
    c: Tensor

    def row(self, i: int) -> Rows:
        """One row, alone in its memory."""
        return Rows(*(x[i : i + 1].clone() if isinstance(x, Tensor) else x for x in self))

    def columns(self, first: int, last: int) -> Rows:
        """A share of the columns, by which the tokens count."""
        share = (x[..., first:last].contiguous() for x in (self.logits, self.teacher))
        return Rows(*share, self.tokens - first, *self[3:])


def make(
    device: str,
    shape: tuple[int, ...] = (5,),
    vocab: int = 70,
    dtype: torch.dtype = torch.float32,
    *,
    apart: float = 1.0,
    scale: float = 3.0,
    seed: int = 0,
) -> Rows:
    """Random rows; the teacher's are the student's, moved by `apart`."""
    r = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    z = scale * torch.randn(*shape, vocab, generator=r, dtype=torch.float64)
    y = z + apart * torch.randn(*shape, vocab, generator=r, dtype=torch.float64)
    tokens = torch.randint(vocab, shape, generator=r)
    t = [0.5 + torch.rand(shape, generator=r, dtype=torch.float64) for _ in range(2)]
    grads = [torch.randn(shape, generator=r, dtype=torch.float64) for _ in range(3)]
    logits = (x.to(device=device, dtype=dtype) for x in (z, y))
    numbers = (x.to(device=device, dtype=wide) for x in (*t, *grads))
    return Rows(*logits, tokens.to(device), None, *numbers)


def scoring(tokens: Tensor, mask: Tensor | None, temperature: Tensor | float) -> Scoring:
    per_token = temperature if isinstance(temperature, Tensor) else None
    number = 1.0 if isinstance(temperature, Tensor) else temperature
    return Scoring(tokens, mask, per_token, number, -(2**40))


class Given(NamedTuple):
    """Arguments of both ops besides the logits: the states of the softmaxes among them."""

    scoring: Scoring
    softmax: Softmax
    teaching: Teaching


def given(kernel: str, rows: Rows, kind: str, beta: float) -> Given:
    s = scoring(rows.tokens, rows.mask, rows.temperature)
    t = scoring(torch.zeros_like(rows.tokens), rows.mask, rows.teacher_temperature)
    # The states do not need the tokens, which may be of another share.
    own = s._replace(tokens=torch.zeros_like(rows.tokens))
    softmax = calls.logprobs_fwd(kernel, rows.logits, own)
    state = calls.logprobs_fwd(kernel, rows.teacher, t)
    teaching = Teaching(
        rows.teacher,
        state.row_max,
        state.log_sum,
        t.temperature_tensor,
        t.temperature,
        KINDS.index(kind),
        beta,
    )
    return Given(s, softmax, teaching)


def results(kernel: str, rows: Rows, kind: str, beta: float, at: Given | None = None) -> Any:
    """divergence, kl and dz of the kernel."""
    s, softmax, teaching = at or given(kernel, rows, kind, beta)
    teaching = teaching._replace(logits=rows.teacher)
    divergence, kl = calls_divergence.divergence_fwd(kernel, rows.logits, s, softmax, teaching)
    grads = (rows.g, rows.h, rows.c)
    dz = calls_divergence.divergence_bwd(kernel, rows.logits, s, softmax, teaching, kl, grads)
    return {"divergence": divergence, "kl": kl, "dz": dz}


def column(temperature: Tensor | float) -> Tensor:
    return torch.as_tensor(temperature, dtype=torch.float64)[..., None]


def log_probs(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Leaf of the student's logits, ln p and ln q, exact."""
    z = rows.logits.double().clone().requires_grad_()
    y = rows.teacher.double() / column(rows.teacher_temperature)
    return z, (z / column(rows.temperature)).log_softmax(-1), y.log_softmax(-1)


def exact(rows: Rows, kind: str, beta: float) -> dict[str, Tensor]:
    """The same by the reference's terms and autograd, in fp64."""
    z, P, Q = log_probs(rows)
    divergence = divergence_terms(P, Q, kind, beta).sum(-1)
    kl = torch.zeros_like(divergence)
    if kind == "jsd":
        m = torch.logaddexp(P + math.log1p(-beta), Q + math.log(beta))
        kl = divergence_terms(P, torch.where(m == -INF, 0.0, m), "reverse", beta).sum(-1)
    elif kind != "forward":
        kl = divergence_terms(P, Q, "reverse", beta).sum(-1)
    entropy = -(P.exp() * torch.where(P == -INF, 0.0, P)).sum(-1)
    inside = (rows.tokens >= 0) & (rows.tokens < P.shape[-1])
    # A token of probability 0 passes no gradient, one of another share has no column; but the
    # log-probability of the latter depends on all columns of this one.
    shift = (z / column(rows.temperature)).logsumexp(-1)
    at = (z / column(rows.temperature)).gather(
        -1, torch.where(inside, rows.tokens, 0)[..., None].long()
    )[..., 0]
    forbidden = inside & (at == -INF)
    chosen = torch.where(inside & ~forbidden, at, 0.0) - shift
    logprobs = torch.where(forbidden, 0.0, chosen)
    total = rows.g * logprobs + rows.h * entropy + rows.c * divergence
    (dz,) = torch.autograd.grad(total.sum(), z)
    return {"divergence": divergence.detach(), "kl": kl.detach(), "dz": dz}


def conditions(rows: Rows, kind: str, beta: float) -> dict[str, Tensor]:
    """The magnitudes whose roundings reach the results, in units of 8, as those of logprobs."""
    tau = column(rows.temperature)
    z, y = rows.logits.double() / tau, rows.teacher.double() / column(rows.teacher_temperature)
    inside = rows.tokens.clamp(0, z.shape[-1] - 1)
    student, teacher = Roundings(z, inside), Roundings(y, inside)
    pair = Pair(z, y, student, teacher, kind, beta)
    kl = pair.from_mixture(pair.s, 0) if kind == "jsd" else pair.kl(0)
    slope, error = pair.gradient()
    g, h, c = (x.abs()[..., None] for x in (rows.g, rows.h, rows.c))
    taught = c * (error + slope.abs())
    # A p below the smallest normal number may be 0, and with it what it multiplies.
    info = torch.finfo(torch.float64 if rows.logits.dtype == torch.float64 else torch.float32)
    ln_p = finite(pair.s).clamp(min=2 * math.log(info.smallest_normal)).abs()
    ln_q, own = finite(pair.t).abs(), finite(kl[0]).abs()[..., None]
    lost = g + h * (ln_p + math.log(1 + z.shape[-1])) + c * (ln_p + ln_q + own)
    lost = lost * info.smallest_normal / info.eps
    return {
        "divergence": pair.condition(),
        "kl": torch.zeros_like(kl[1]) if kind == "forward" else kl[0].abs() + kl[1],
        "dz": (student.gradient(rows.g, rows.h) + taught + lost) / tau,
    }


def assert_agrees(got: dict[str, Tensor], rows: Rows, kind: str, beta: float) -> None:
    want = exact(rows, kind, beta)
    wide = torch.float64 if rows.logits.dtype == torch.float64 else torch.float32
    assert got["divergence"].dtype == got["kl"].dtype == wide
    assert got["dz"].dtype == rows.logits.dtype
    for name, condition in conditions(rows, kind, beta).items():
        assert_within_budget(got[name], want[name], condition=condition, ops=8, name=name)
