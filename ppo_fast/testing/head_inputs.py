"""Input factories of the head: hidden states or logits, and the losses of their tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ppo_fast.testing.calls import Call, promoted, run
from ppo_fast.testing.inputs import (
    Shape,
    Source,
    finish,
    logprobs_call,
    make_mask,
    make_support,
    offsets,
    ppo_call,
)

_RANK = 3  # of `extra`
# What of a loss's call is not the head's.
_LOSS = (
    "old_logprobs",
    "advantages",
    "is_weights",
    "ref_logprobs",
    "cu_seqlens",
    "sequence_weights",
)


def linear_call(
    shape: Shape = (3, 5),
    vocab: int = 37,
    width: int = 24,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    mask: str | None = "random",
    scale: float = 3.0,
    temperature: str | float = "token",
    ignored: bool = True,
    extras: tuple[str, ...] = ("bias",),
    kept: int | None = None,
    sparse: bool | None = None,
    padding: int = 0,
    **options: Any,
) -> Call:
    """`linear_token_logprobs` of logits with deviation `scale`; extras: bias, row_index, and
    extra, of rank 3.

    `ignored`: every eleventh token is the ignored one, out of the vocabulary. `kept`: over a
    support of up to so many ids a row, `sparse` or not. `padding`: so many rows of NaN behind
    the vocabulary.
    """
    source = Source(dtype, device, seed)
    tensors: dict[str, Any] = {
        "hidden": source.normal((*shape, width)),
        "weight": source.normal((vocab, width), scale / width**0.5),
        "tokens": source.integers(shape, vocab),
        "bias": source.normal((vocab,)) if "bias" in extras else None,
        "mask": None if mask is None else make_mask(shape, mask, seed, device),
        "row_index": _rows(source, shape) if "row_index" in extras else None,
    }
    if "extra" in extras:
        tensors["extra_u"] = source.normal((*shape, _RANK))
        tensors["extra_b"] = source.normal((vocab, _RANK), scale / _RANK**0.5)
    if ignored:
        tensors["tokens"].view(-1)[3::11] = options.get("ignore_index", -100)
    if temperature == "token":
        tensors["temperature"] = source.uniform(shape, 0.5, 2.0)
    else:
        options["temperature"] = temperature
    if kept is not None:
        options["support"] = make_support(tensors["tokens"], vocab, kept, seed, sparse)
    if padding:
        options["vocab_size"] = vocab
        for name in ("weight", "bias"):
            x = tensors[name]
            if x is not None:
                behind = x.new_full((padding, *x.shape[1:]), float("nan"))
                tensors[name] = torch.cat([x, behind])
    grads = {name: source.cotangent(shape) for name in ("logprobs", "entropy")}
    return finish("linear_token_logprobs", tensors, options, **grads)


def token_stats_call(
    shape: Shape = (3, 5), vocab: int = 37, width: int = 24, **options: Any
) -> Call:
    """`linear_token_stats`; options as `linear_call`'s. Every other token is the likeliest."""
    call = linear_call(shape, vocab, width, **options)
    t = promoted(call).tensors
    z = t["hidden"] @ t["weight"].t() + t.get("bias", 0.0)
    if "extra_u" in t:
        z = z + t["extra_u"] @ t["extra_b"].t()
    best = z.argmax(-1)
    chosen = torch.arange(best.numel(), device=best.device).view(shape) % 2 == 0
    ignored = t["tokens"] == call.options.get("ignore_index", -100)
    tokens = torch.where(chosen & ~ignored, best, t["tokens"])
    return Call("linear_token_stats", call.tensors | {"tokens": tokens}, call.options, {})


def linear_at_call(
    shape: Shape = (3, 5),
    vocab: int = 37,
    width: int = 24,
    *,
    k: int = 5,
    absent: bool = True,
    seed: int = 0,
    **options: Any,
) -> Call:
    """`linear_logprobs_at`, k ids a row; other options as `linear_call`'s.

    `absent`: every seventh id is none. An id may stand twice in its row.
    """
    head = linear_call(shape, vocab, width, seed=seed, ignored=False, **options)
    tensors = {"ids" if name == "tokens" else name: x for name, x in head.tensors.items()}
    main, dtype = tensors["hidden"], tensors["hidden"].dtype
    source = Source(dtype, main.device, seed + 1)
    tensors["ids"] = source.integers((*shape, k), vocab)
    if absent:
        tensors["ids"].view(-1)[2::7] = -1
    grads = head.cotangents | {"logprobs": source.cotangent((*shape, k))}
    return Call("linear_logprobs_at", tensors, head.options, grads)


def _rows(source: Source, shape: Shape) -> Tensor:
    """About two thirds of the flat rows."""
    return source.chance((torch.Size(shape).numel(),), 0.67).nonzero()[:, 0]


def logits_ppo_call(
    shape: Shape = (3, 5),
    vocab: int = 37,
    *,
    temperature: str | float = "token",
    kept: int | None = None,
    **options: Any,
) -> Call:
    """`logits_ppo_loss`; other options as `ppo_call`'s."""
    given = {k: options[k] for k in ("dtype", "device", "seed", "mask") if k in options}
    head = logprobs_call(shape, vocab, temperature=temperature, kept=kept, **given)
    return _with_loss("logits_ppo_loss", head, shape, options)


def linear_ppo_call(
    shape: Shape = (3, 5),
    vocab: int = 37,
    width: int = 24,
    *,
    temperature: str | float = "token",
    softcap: float | None = None,
    logit_scale: float | None = None,
    padding: int = 0,
    ignored: bool = True,
    head_extras: tuple[str, ...] = ("bias",),
    kept: int | None = None,
    sparse: bool | None = None,
    teacher: dict[str, Any] | None = None,
    z_loss_coef: float = 0.0,
    **options: Any,
) -> Call:
    """`linear_ppo_loss`; `head_extras` are `linear_call`'s, `teacher` is as `with_teacher`'s,
    other options `ppo_call`'s."""
    given = {k: options[k] for k in ("dtype", "device", "seed", "mask") if k in options}
    form = {"softcap": softcap, "logit_scale": logit_scale}
    cap: dict[str, Any] = {k: v for k, v in form.items() if v is not None}
    head = linear_call(
        shape,
        vocab,
        width,
        temperature=temperature,
        ignored=ignored,
        extras=head_extras,
        kept=kept,
        sparse=sparse,
        padding=padding,
        **given,
        **cap,
    )
    call = _with_loss("linear_ppo_loss", head, shape, options)
    if z_loss_coef:
        call = call.option(z_loss_coef=z_loss_coef)
    return call if teacher is None else with_teacher(call, shape, vocab, **teacher)


def with_teacher(
    call: Call,
    shape: Shape,
    vocab: int,
    *,
    kind: str,
    width: int = 13,
    scale: float = 3.0,
    temperature: str | float | None = None,
    extras: tuple[str, ...] = ("bias",),
    seed: int = 5,
    **options: Any,
) -> Call:
    """A head's call beside a teacher of another width; extras: bias."""
    main = call.tensors["hidden"]
    source = Source(main.dtype, main.device, seed)
    tensors = {
        "teacher_hidden": source.normal((*shape, width)),
        "teacher_weight": source.normal((vocab, width), scale / width**0.5),
    }
    if "bias" in extras:
        tensors["teacher_bias"] = source.normal((vocab,))
    if temperature == "token":
        tensors["teacher_temperature"] = source.uniform(shape, 0.5, 2.0)
    elif temperature is not None:
        options["temperature"] = temperature
    return call.replace(**tensors).option(teacher={"kind": kind, **options})


def token_divergence_call(
    shape: Shape = (3, 5),
    vocab: int = 37,
    width: int = 24,
    *,
    kind: str = "reverse",
    teacher: dict[str, Any] | None = None,
    **options: Any,
) -> Call:
    """`linear_token_divergence`; `teacher` as `with_teacher`'s, the others `linear_call`'s."""
    head = linear_call(shape, vocab, width, ignored=False, **options)
    call = head.replace(tokens=None)._replace(op="linear_token_divergence")
    grads = {"divergence": call.cotangents["logprobs"], "entropy": call.cotangents["entropy"]}
    call = call._replace(cotangents=grads)
    return with_teacher(call, shape, vocab, kind=kind, **(teacher or {}))


def linear_divergence_call(
    shape: Shape = (3, 5),
    vocab: int = 37,
    width: int = 24,
    *,
    reduction: str = "token-mean",
    denom: float | None = None,
    packed: bool = False,
    **options: Any,
) -> Call:
    """`linear_divergence`; other options as `token_divergence_call`'s."""
    call = token_divergence_call(shape, vocab, width, **options)
    call = call._replace(op="linear_divergence", cotangents=_of_loss(call))
    if packed:
        call = call.replace(cu_seqlens=offsets(shape[0], call.tensors["hidden"].device))
    return call.option(reduction=reduction, denom=denom)


def divergence_call(
    shape: Shape = (3, 5),
    vocab: int = 37,
    *,
    kind: str = "reverse",
    beta: float = 0.5,
    teacher_temperature: str | float | None = None,
    reduction: str = "token-mean",
    denom: float | None = None,
    **options: Any,
) -> Call:
    """`divergence` of two rows of logits; other options as `logprobs_call`'s."""
    head = logprobs_call(shape, vocab, **options)
    call = head.replace(tokens=None)._replace(op="divergence", cotangents=_of_loss(head))
    main = call.tensors["logits"]
    source = Source(main.dtype, main.device, 5)
    call = call.replace(teacher_logits=source.normal((*shape, vocab), 3.0))
    if teacher_temperature == "token":
        call = call.replace(teacher_temperature=source.uniform(shape, 0.5, 2.0))
    elif teacher_temperature is not None:
        call = call.option(teacher_temperature=teacher_temperature)
    return call.option(kind=kind, beta=beta, reduction=reduction, denom=denom)


def _of_loss(call: Call) -> dict[str, Tensor]:
    """A loss's own gradient, in the outputs' precision."""
    like = call.cotangents["entropy"]
    return {"loss": torch.tensor(1.25, dtype=like.dtype, device=like.device)}


def _with_loss(op: str, head: Call, shape: Shape, options: dict[str, Any]) -> Call:
    """The loss around the exact log-probabilities, so that its kinks can be kept clear of."""
    exact = run(promoted(head._replace(cotangents={})), "reference")["logprobs"]
    loss = ppo_call(shape, logprobs=exact, **options)
    tensors = head.tensors | {k: v for k, v in loss.tensors.items() if k in _LOSS}
    return Call(op, tensors, head.options | loss.options, loss.cotangents)


HEADS: dict[str, Callable[..., Call]] = {
    "linear_token_logprobs": linear_call,
    "linear_logprobs_at": linear_at_call,
    "logits_ppo_loss": logits_ppo_call,
    "linear_ppo_loss": linear_ppo_call,
}
# Ops with a teacher, which CUDA C++ has not.
DIVERGENCES: dict[str, Callable[..., Call]] = {
    "divergence": divergence_call,
    "linear_token_divergence": token_divergence_call,
    "linear_divergence": linear_divergence_call,
}
