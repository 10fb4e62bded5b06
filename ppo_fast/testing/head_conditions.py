"""The magnitudes whose roundings reach each output of the head: through logits and softmax.

As `conditions.py`; `narrow` is the rounding of dlogits before their products.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppo_fast._results import STATS_FIELDS
from ppo_fast._sequences import Sequences
from ppo_fast.reference.common import keep_of, own_denom
from ppo_fast.reference.linear_logprobs import rows_of
from ppo_fast.testing.calls import Call, run
from ppo_fast.testing.divergence_conditions import (
    Pair,
    loss_conditions,
    temperatures,
    weighted_loss,
)
from ppo_fast.testing.loss_conditions import (
    Conditions,
    Narrow,
    Softmax,
    finite,
    over_support,
    ppo_condition,
    temperature_of,
)

# A probability below the smallest normal number may be 0, whatever it is multiplied by later.
_FLUSHED = torch.finfo(torch.float32).smallest_normal / torch.finfo(torch.float32).eps


class Logits(NamedTuple):
    """Logits (N, V) of selected rows, what rounds them, and their slope by the product's."""

    z: Tensor
    error: Tensor
    bend: Tensor | float
    bend_error: Tensor | float


class Upstream(NamedTuple):
    """Gradients that arrive at log-probabilities and entropies, and what rounds those."""

    g: Tensor
    h: Tensor
    g_error: Tensor | float = 0.0
    h_error: Tensor | float = 0.0


def _kept(call: Call) -> Tensor:
    """The unmasked slots whose token is not ignored."""
    tokens = call.tensors.get("tokens")
    if tokens is None:
        return keep_of(call.tensors["hidden"][..., 0], call.tensors.get("mask"))
    return keep_of(tokens, call.tensors.get("mask")) & (
        tokens != call.options.get("ignore_index", -100)
    )


def _adds(n: int) -> float:
    """A dot product of n terms, in units of `ops`."""
    return 1 + math.sqrt(n) / 4


def _logits(call: Call, keep: Tensor) -> Logits:
    t, cap, scale = call.tensors, call.options.get("softcap"), call.options.get("logit_scale", 1.0)
    if "logits" in t:
        z = torch.where(keep[..., None], t["logits"], 0.0)
        return Logits(z, torch.zeros_like(z), 1.0, 0.0)
    size = call.options.get("vocab_size")
    x, weight = torch.where(keep[..., None], t["hidden"], 0.0), t["weight"][:size]
    z = x @ weight.t()
    error = x.abs() @ weight.abs().t() * _adds(x.shape[-1])
    if "extra_u" in t:
        u, b = torch.where(keep[..., None], t["extra_u"], 0.0), t["extra_b"][:size]
        z = z + u @ b.t()
        error = error + u.abs() @ b.abs().t() * _adds(u.shape[-1]) + finite(z).abs()
    if "bias" in t:
        z = z + t["bias"][:size]
        error = error + finite(z).abs()
    if scale != 1.0:
        z, error = scale * z, scale * (error + finite(z).abs())
    if cap is None:
        return Logits(z, error, scale, 0.0 if scale == 1.0 else scale)
    u = torch.tanh(z / cap)
    bend = 1 - u * u
    off = finite(bend * (error + 2 * z.abs())) / cap + 2 * u.abs()
    return Logits(cap * u, cap * off, scale * bend, scale * (2 * u.abs() * off + 2))


def _upward(
    rows: Softmax, logits: Logits, temperature: Tensor, up: Upstream
) -> tuple[Tensor, Tensor]:
    """The gradient by the uncapped logits, and what rounds it."""
    # No gradient flows through a label of probability 0.
    g = torch.where(((rows.hit > 0) & logits.z.isneginf()).any(-1), 0.0, up.g)
    gh = (up.g_error + torch.zeros_like(g), up.h_error + torch.zeros_like(g))
    direct, of_entropy = rows.hit - rows.p, rows.p * rows.slope
    dz = (g[..., None] * direct - up.h[..., None] * of_entropy) / temperature
    error = rows.gradient(g, up.h)
    error = error + gh[0][..., None] * direct.abs() + gh[1][..., None] * of_entropy.abs()
    error = error + _FLUSHED * (g.abs()[..., None] + (up.h[..., None] * rows.slope).abs())
    return dz * logits.bend, error / temperature * logits.bend + dz.abs() * logits.bend_error


def _gradients(call: Call, dz: Tensor, error: Tensor, eps: float, narrow: Narrow) -> Conditions:
    """Of the products with the weight and the hidden states, whose operand dz may be `narrow`."""
    t = call.tensors
    if "logits" in t:
        return {"grad_logits": (8, error, False)}
    size, error = (x.reshape(-1, x.shape[-1]) for x in (dz.abs(), error))
    if narrow is not None:
        relative, absolute = narrow
        error = error + (size * relative + absolute) / (8 * eps)
    rows, vocab = size.shape
    summed = error + _adds(rows) * size
    # What is rounded in the gradient of padding is nothing.
    padded = torch.nn.functional.pad(summed, (0, t["weight"].shape[0] - vocab))
    out: Conditions = {"grad_bias": (8, padded.sum(0), False)}
    for of_rows, of_vocab in (("hidden", "weight"), ("extra_u", "extra_b")):
        if of_rows in t:
            x = torch.where(_kept(call)[..., None], t[of_rows], 0.0).abs()
            by_rows = (error + _adds(vocab) * size) @ t[of_vocab][:vocab].abs()
            out[f"grad_{of_rows}"] = (8, by_rows.view(x.shape), False)
            out[f"grad_{of_vocab}"] = (8, padded.t() @ x.reshape(-1, x.shape[-1]), False)
    return out


def linear_logprobs_condition(
    call: Call, exact: dict[str, Tensor], eps: float, narrow: Narrow = None
) -> Conditions:
    """Of the product, the softcap and the softmax, and of the two products of the backward."""
    logits, temperature = _logits(call, _kept(call)), temperature_of(call)
    z = over_support(call, logits.z / temperature)
    rows = Softmax(z, call.tensors["tokens"], logits.error / temperature)
    out = rows.outputs()
    if call.cotangents:
        live = rows_of(call.tensors["tokens"], _kept(call), call.tensors.get("row_index"))
        g, h = (torch.where(live, call.cotangents[k], 0.0) for k in ("logprobs", "entropy"))
        out |= _gradients(call, *_upward(rows, logits, temperature, Upstream(g, h)), eps, narrow)
    return out


def linear_token_stats_condition(
    call: Call, exact: dict[str, Tensor], eps: float, narrow: Narrow = None
) -> Conditions:
    """Of the product, the softcap and sums over a row's columns.

    Whether a token is the likeliest is exact, but where rounding could move another logit past it.
    """
    logits, temperature = _logits(call, _kept(call)), temperature_of(call)
    z, error = logits.z / temperature, logits.error / temperature
    rows = Softmax(z, call.tensors["tokens"], error)
    p, squares = rows.p, (2 * z).softmax(-1)
    of_lse, lse = (p * rows.reach).sum(-1), finite(z.logsumexp(-1)).abs()
    of_squares = 2 * ((squares * rows.reach).sum(-1) + of_lse)
    size = finite(z).abs()
    of_mean = (error + size * _adds(z.shape[-1])).mean(-1)
    # A row of one column has no second one.
    first, *second = z.topk(min(2, z.shape[-1]), -1)[0].unbind(-1)
    gap = first - second[0] if second else torch.full_like(first, torch.inf)
    # A budget of 1 or more, which lets the answer change, where rounding can close the gap.
    flips = torch.where(gap > 0, 2 * (error + size).amax(-1) / gap, torch.inf)
    return rows.outputs() | {
        "lse": (8, of_lse + lse, False),
        "log_sum_sq_probs": (8, of_squares + finite(exact["log_sum_sq_probs"]).abs(), False),
        "is_top1": (8, flips, False),
        "mean_logit": (8, of_mean, False),
    }


def linear_logprobs_at_condition(
    call: Call, exact: dict[str, Tensor], eps: float, narrow: Narrow = None
) -> Conditions:
    """The same at the ids of a row, whose gradients are summed before they meet its softmax."""
    ids = call.tensors["ids"]
    head = call.replace(tokens=ids.new_zeros(ids.shape[:-1]), ids=None)
    logits, temperature = _logits(head, _kept(head)), temperature_of(head)
    z = logits.z / temperature
    rows = Softmax(z, head.tensors["tokens"], logits.error / temperature)
    at = ids.clamp(0, z.shape[-1] - 1).long()
    reach = rows.reach + finite(z.log_softmax(-1)).abs()
    out = {"logprobs": (8, reach.gather(-1, at), False), "entropy": rows.outputs()["entropy"]}
    if call.cotangents:
        live = rows_of(head.tensors["tokens"], _kept(head), call.tensors.get("row_index"))
        h = torch.where(live, call.cotangents["entropy"], 0.0)
        passes = live[..., None] & (ids >= 0) & ~z.gather(-1, at).isneginf()
        g = torch.where(passes, call.cotangents["logprobs"], 0.0)
        own, size = (torch.zeros_like(z).scatter_add(-1, at, x) for x in (g, g.abs()))
        total, most = (x.sum(-1, keepdim=True) for x in (g, g.abs()))
        adds = _adds(ids.shape[-1])
        dz = (own - rows.p * total - h[..., None] * rows.p * rows.slope) / temperature
        error = rows.gradient(torch.zeros_like(h), h) + adds * size
        error = error + finite(rows.p * (rows.reach + adds)) * most
        error = error + _FLUSHED * (most + (h[..., None] * rows.slope).abs())
        error = error / temperature * logits.bend + dz.abs() * logits.bend_error
        out |= _gradients(head, dz * logits.bend, error, eps, narrow)
    return out


def _teacher_of(call: Call) -> Call:
    """The teacher's head as a call of its own."""
    own = {k: v for k, v in call.tensors.items() if k.startswith("teacher_")}
    tensors = {k.removeprefix("teacher_"): v for k, v in own.items()}
    return Call(call.op, tensors, call.options["teacher"], {})


def _pair(call: Call, keep: Tensor, logits: Logits, tokens: Tensor) -> tuple[Pair, Softmax]:
    """A head's rows beside its teacher's."""
    own, other = temperatures(call, keep)
    theirs = _logits(_teacher_of(call), keep)
    z, y = (over_support(call, x) for x in (logits.z / own, theirs.z / other))
    rows = Softmax(z, tokens, logits.error / own)
    o = call.options["teacher"]
    kind, beta = o["kind"], o.get("beta", 0.5)
    return Pair(z, y, rows, Softmax(y, tokens, theirs.error / other), kind, beta), rows


def _by_pair(
    pair: Pair, logits: Logits, temperature: Tensor, slopes: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of Σ slopes·divergence by the uncapped logits, and what rounds it."""
    slope, error = pair.gradient()
    flushed = _FLUSHED * slopes.abs()[..., None]
    dz = slopes[..., None] * slope / temperature
    error = (slopes.abs()[..., None] * (error + slope.abs()) + flushed) / temperature
    error = finite(error)
    return dz * logits.bend, error * logits.bend + dz.abs() * logits.bend_error


def linear_divergence_condition(
    call: Call, exact: dict[str, Tensor], eps: float, narrow: Narrow = None
) -> Conditions:
    """Of both heads' products, the divergences, and the products of the backward."""
    counted = _kept(call)
    keep = rows_of(counted, counted, call.tensors.get("row_index"))
    logits, temperature = _logits(call, keep), temperatures(call, keep)[0]
    pair, rows = _pair(call, keep, logits, torch.zeros_like(keep, dtype=torch.int64))
    h = torch.zeros_like(pair.value)
    if call.op == "linear_divergence":
        coef = float(call.options["teacher"].get("coef", 1.0))
        out, c = loss_conditions(call, exact, keep, pair, rows, coef)
    else:
        out = {"divergence": (8.0, pair.condition(), False), "entropy": rows.outputs()["entropy"]}
        c = call.cotangents.get("divergence", h)
        h = torch.where(keep, call.cotangents.get("entropy", h), 0.0)
    if call.cotangents:
        up = Upstream(torch.zeros_like(h), h)
        dz, error = _upward(rows, logits, temperature, up)
        more = _by_pair(pair, logits, temperature, torch.where(keep, c, 0.0))
        out |= _gradients(call, dz + more[0], error + more[1], eps, narrow)
    return out


def head_loss_condition(
    call: Call, exact: dict[str, Tensor], eps: float, narrow: Narrow = None
) -> Conditions:
    """Of the softmax, of the loss of what comes out of it, and back."""
    logits, temperature = _logits(call, _kept(call)), temperature_of(call)
    z = over_support(call, logits.z / temperature)
    rows = Softmax(z, call.tensors["tokens"], logits.error / temperature)
    loss = _loss_of(call, exact)
    result = run(loss, "reference")
    # Their 8·eps in units of the loss's 4·eps.
    out = ppo_condition(loss, result, eps, (2 * rows.logprobs, 2 * rows.entropy))
    extra = _other_terms(call, loss, exact, z, rows, logits)
    for name in ("loss", "stats"):
        out[name] = (4, out[name][1] + 2 * extra[name], False)
    if call.cotangents:
        up = Upstream(
            result["grad_logprobs"],
            result["grad_entropy"],
            out.pop("grad_logprobs")[1] / 2,
            out.pop("grad_entropy")[1] / 2,
        )
        dz, error = _upward(rows, logits, temperature, up)
        out |= _gradients(call, dz + extra["dz"], error + extra["error"], eps, narrow)
    return out | rows.outputs()


def _other_terms(
    call: Call,
    loss: Call,
    exact: dict[str, Tensor],
    z: Tensor,
    rows: Softmax,
    logits: Logits,
) -> dict[str, Tensor]:
    """Of the divergence and the z-loss beside a policy loss, in units of 8·eps; 0 without."""
    keep, o, stats = loss.tensors["mask"], call.options, exact["stats"]
    zero = torch.zeros_like(z)
    out = {"loss": zero.sum(), "stats": torch.zeros_like(stats), "dz": zero, "error": zero}
    own = float(stats[STATS_FIELDS.index("loss_denom")]) or 1.0
    divisor = own if loss.options.get("denom") is None else float(loss.options["denom"])
    passed = float(call.cotangents["loss"].abs()) if call.cotangents else 0.0
    temperature, of_lse = temperature_of(call), (rows.p * rows.reach).sum(-1)
    parts = []
    if "teacher" in o:
        pair, _ = _pair(call, keep, logits, call.tensors["tokens"])
        coef = float(o["teacher"].get("coef", 1.0))
        parts.append(("divergence", coef, pair.condition(), pair.gradient()))
    if o.get("z_loss_coef"):
        lse = finite(z.logsumexp(-1))
        off = of_lse + lse.abs()
        slope = 2 * lse[..., None] * rows.p
        error = 2 * rows.p * (off[..., None] + lse.abs()[..., None] * (rows.reach + 8))
        parts.append(("z_loss", float(o["z_loss_coef"]), 2 * lse.abs() * off, (slope, error)))
    for name, coef, of_value, (slope, error) in parts:
        adds, of_loss, w = weighted_loss(loss, keep, divisor, coef * of_value)
        out["loss"] = out["loss"] + of_loss
        out["stats"][STATS_FIELDS.index("loss")] += of_loss * divisor
        out["stats"][STATS_FIELDS.index(name)] = (
            finite(torch.where(keep, of_value, 0.0)).sum() * adds
        )
        c = (w * coef * passed)[..., None] / temperature
        out["dz"] = out["dz"] + finite(c * slope * logits.bend)
        size = finite(c * (error + slope.abs() + _FLUSHED))
        out["error"] = out["error"] + size * logits.bend
        out["error"] = out["error"] + (c * slope).abs() * logits.bend_error
    return out


def _loss_of(call: Call, exact: dict[str, Tensor]) -> Call:
    """`ppo_loss` of the exact log-probabilities and entropies, over the computed rows."""
    t, o = call.tensors, call.options
    taken = ["old_logprobs", "advantages", "is_weights", "ref_logprobs", "cu_seqlens"]
    taken.append("sequence_weights")
    head = ["temperature", "softcap", "ignore_index", "inplace", "support", "teacher"]
    head += ["z_loss_coef", "logit_scale", "vocab_size"]
    options: dict[str, Any] = {k: v for k, v in o.items() if k not in head}
    counted, index = _kept(call), t.get("row_index")
    tensors = {k: t[k] for k in taken if k in t} | {k: exact[k] for k in ("logprobs", "entropy")}
    tensors["mask"] = rows_of(t["tokens"], counted, index)
    if index is not None and options.get("denom") is None and options["reduction"] != "token-sum":
        seqs = Sequences(counted, t.get("cu_seqlens"))
        options["denom"] = own_denom(seqs, options["reduction"]).double()
    return Call("ppo_loss", tensors, options, call.cotangents)
