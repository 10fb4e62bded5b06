"""The magnitudes whose roundings reach each output of the head: through logits and softmax.

As `conditions.py`; `narrow` is the type that a GPU rounds dlogits to before their products.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppo_fast._sequences import Sequences
from ppo_fast.reference.common import keep_of, own_denom
from ppo_fast.reference.linear_logprobs import rows_of
from ppo_fast.testing.calls import Call, run
from ppo_fast.testing.loss_conditions import (
    Conditions,
    Softmax,
    finite,
    over_support,
    ppo_condition,
    temperature_of,
)

# A probability below the smallest normal number may be 0, whatever it is multiplied by later.
_FLUSHED = torch.finfo(torch.float32).smallest_normal / torch.finfo(torch.float32).eps


class Logits(NamedTuple):
    """Logits (N, V) of selected rows, what rounds them, and what the softcap's slope is."""

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
    tokens = call.tensors["tokens"]
    return keep_of(tokens, call.tensors.get("mask")) & (
        tokens != call.options.get("ignore_index", -100)
    )


def _adds(n: int) -> float:
    """A dot product of n terms, in units of `ops`."""
    return 1 + math.sqrt(n) / 4


def _logits(call: Call, keep: Tensor) -> Logits:
    t, cap = call.tensors, call.options.get("softcap")
    if "logits" in t:
        z = torch.where(keep[..., None], t["logits"], 0.0)
        return Logits(z, torch.zeros_like(z), 1.0, 0.0)
    x, weight = torch.where(keep[..., None], t["hidden"], 0.0), t["weight"]
    z = x @ weight.t()
    error = x.abs() @ weight.abs().t() * _adds(x.shape[-1])
    if "bias" in t:
        z = z + t["bias"]
        error = error + finite(z).abs()
    if cap is None:
        return Logits(z, error, 1.0, 0.0)
    u = torch.tanh(z / cap)
    bend = 1 - u * u
    off = finite(bend * (error + 2 * z.abs())) / cap + 2 * u.abs()
    return Logits(cap * u, cap * off, bend, 2 * u.abs() * off + 1)


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


def _gradients(
    call: Call, dz: Tensor, error: Tensor, eps: float, narrow: torch.dtype | None
) -> Conditions:
    """Of the products with the weight and the hidden states, whose operands may be `narrow`."""
    t = call.tensors
    if "logits" in t:
        return {"grad_logits": (8, error, False)}
    size, error = (x.reshape(-1, x.shape[-1]) for x in (dz.abs(), error))
    if narrow is not None:
        info = torch.finfo(narrow)
        error = error + (size * info.eps + info.smallest_normal * info.eps) / (16 * eps)
    x = torch.where(_kept(call)[..., None], t["hidden"], 0.0).abs()
    x = x.reshape(-1, x.shape[-1])
    rows, vocab = size.shape
    summed = error + _adds(rows) * size
    by_hidden = (error + _adds(vocab) * size) @ t["weight"].abs()
    return {
        "grad_hidden": (8, by_hidden.view(t["hidden"].shape), False),
        "grad_weight": (8, summed.t() @ x, False),
        "grad_bias": (8, summed.sum(0), False),
    }


def linear_logprobs_condition(
    call: Call, exact: dict[str, Tensor], eps: float, narrow: torch.dtype | None = None
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


def linear_logprobs_at_condition(
    call: Call, exact: dict[str, Tensor], eps: float, narrow: torch.dtype | None = None
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


def head_loss_condition(
    call: Call, exact: dict[str, Tensor], eps: float, narrow: torch.dtype | None = None
) -> Conditions:
    """Of the softmax, of the loss of what comes out of it, and back."""
    logits, temperature = _logits(call, _kept(call)), temperature_of(call)
    z = over_support(call, logits.z / temperature)
    rows = Softmax(z, call.tensors["tokens"], logits.error / temperature)
    loss = _loss_of(call, exact)
    result = run(loss, "reference")
    # Their 8·eps in units of the loss's 4·eps.
    out = ppo_condition(loss, result, eps, (2 * rows.logprobs, 2 * rows.entropy))
    if call.cotangents:
        up = Upstream(
            result["grad_logprobs"],
            result["grad_entropy"],
            out.pop("grad_logprobs")[1] / 2,
            out.pop("grad_entropy")[1] / 2,
        )
        out |= _gradients(call, *_upward(rows, logits, temperature, up), eps, narrow)
    return out | rows.outputs()


def _loss_of(call: Call, exact: dict[str, Tensor]) -> Call:
    """`ppo_loss` of the exact log-probabilities and entropies, over the computed rows."""
    t, o = call.tensors, call.options
    taken = ["old_logprobs", "advantages", "is_weights", "ref_logprobs", "cu_seqlens"]
    taken.append("sequence_weights")
    head = ("temperature", "softcap", "ignore_index", "inplace", "support")
    options: dict[str, Any] = {k: v for k, v in o.items() if k not in head}
    counted, index = _kept(call), t.get("row_index")
    tensors = {k: t[k] for k in taken if k in t} | {k: exact[k] for k in ("logprobs", "entropy")}
    tensors["mask"] = rows_of(t["tokens"], counted, index)
    if index is not None and options.get("denom") is None and options["reduction"] != "token-sum":
        seqs = Sequences(counted, t.get("cu_seqlens"))
        options["denom"] = own_denom(seqs, options["reduction"]).double()
    return Call("ppo_loss", tensors, options, call.cotangents)
