"""Output head of a model as one product, with the factor and soft cap behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ppo_fast.loop.model.layers import UnsupportedModelError
from ppo_fast.loop.model.rounding import product, spacing

# Parts of the names by which configs call a factor or a soft cap of the logits.
_NAMES = ("logit", "multiplier", "scal", "cap")
_OTHER = "use --head logits (head='logits'), which takes the model's own logits"


class Product(NamedTuple):
    """logits = cap(scale · (hidden · weightᵀ + bias)), the product in `dtype`."""

    scale: float
    softcap: float | None
    dtype: torch.dtype

    def of(self, z: Tensor) -> Tensor:
        """The logits that the model makes of the head's output."""
        scaled = z * self.scale
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)

    def options(self) -> dict[str, Any]:
        """Options for the head's ops."""
        return {"softcap": self.softcap, "logit_scale": self.scale}


def described(model: Any) -> str:
    """Path and class of the output head, and whose it is."""
    head = model.get_output_embeddings()
    path = next((name for name, m in model.named_modules() if m is head), "")
    return f"output head {path} ({type(head).__name__}) of {type(model).__name__}"


class Adapter(NamedTuple):
    """A LoRA adapter on the head: logits += u · bᵀ with u = scale · dropout(hidden) · aᵀ.

    Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
    """

    a: Tensor  # (r, H)
    b: Tensor  # (V, r)
    scale: float
    dropout: Callable[[Tensor], Tensor]

    def u(self, hidden: Tensor) -> Tensor:
        """(n, r), of hidden states (n, H) and in their type."""
        x: Tensor = self.dropout(hidden.to(self.a.dtype)) @ self.a.t()
        return (x * self.scale).to(hidden.dtype)


class OutputHead(NamedTuple):
    """Weight (V, H) and bias (V,) of a model's output head, and peft's adapters on it."""

    weight: Tensor
    bias: Tensor | None
    adapters: list[Adapter]

    def extra(self, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        """(u, b) as the linear ops take it, (n, r) and (V, r); several adapters side by side."""
        if not self.adapters:
            return None
        u = [x.u(hidden) for x in self.adapters]
        b = [x.b.to(self.weight.dtype) for x in self.adapters]
        return (u[0], b[0]) if len(u) == 1 else (torch.cat(u, 1), torch.cat(b, 1))

    def low_rank(self) -> list[tuple[Tensor, Tensor]]:
        """b (V, r) and scale · a (r, H) of every adapter, wide: their products are added to the
        weight."""
        return [(x.b.double(), x.scale * x.a.double()) for x in self.adapters]

    def dense(self) -> Tensor:
        """Weight with the adapters added in, (V, H)."""
        weight = self.weight
        with torch.autocast(weight.device.type, enabled=False):
            for x in self.adapters:
                weight = weight + (x.scale * (x.b @ x.a)).to(weight.dtype)
        return weight


def output_head(model: Any) -> OutputHead:
    """The output head of a model, with those of peft's adapters on it that are active.

    Raises UnsupportedModelError, which names adapter and head, for one that adds no product of
    low rank to the logits, as DoRA.
    """
    head = model.get_output_embeddings()
    if not hasattr(head, "base_layer"):
        return OutputHead(head.weight, getattr(head, "bias", None), [])
    weight, bias = head.base_layer.weight, getattr(head.base_layer, "bias", None)
    if head.merged or head.disable_adapters:
        return OutputHead(weight, bias, [])
    adapters = []
    for name in head.active_adapters:
        if name not in _adapters_of(head):
            continue
        _check_adapter(model, head, name)
        a, b, scale = head.lora_A[name].weight, head.lora_B[name], head.scaling[name]
        adapters.append(Adapter(_whole(a), _whole(b.weight), scale, head.lora_dropout[name]))
        if b.bias is not None:
            added = _whole(b.bias) * scale
            bias = added if bias is None else bias + added
    return OutputHead(weight, bias, adapters)


def _adapters_of(head: Any) -> set[str]:
    """Names of all adapters on a layer of peft's."""
    layers = (getattr(head, name, {}) for name in head.adapter_layer_names)
    return {name for layer in layers for name in layer}


def _check_adapter(model: Any, head: Any, name: str) -> None:
    lora = getattr(head, "lora_A", {})
    variant = getattr(head, "lora_variant", {}).get(name)
    if variant is None and name in lora and isinstance(lora[name], nn.Linear):
        return
    kind = type(head if variant is None else variant)
    raise UnsupportedModelError(
        f"adapter {name!r} on the {described(model)} is a {kind.__module__}.{kind.__name__}:"
        f" {_OTHER}"
    )


def _whole(x: Any) -> Any:
    """A sharded tensor's whole; others as they are."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


@torch.no_grad()
def measured(model: Any, tokens: Tensor) -> Product:
    """The product between hidden states and logits, measured in one forward.

    In a forward over `tokens` (1, T) the head gets random hidden states,
    and in the place of the head's answer the rest of the model gets numbers of all magnitudes.
    Raises UnsupportedModelError, which names the head, where it is more than a product and the
    rest more than a factor and a soft cap.
    """
    generator = torch.Generator().manual_seed(0)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    given: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        given.append(torch.randn(args[0].shape, generator=generator).to(args[0]))
        return given[-1]

    def behind(_: nn.Module, args: object, out: Tensor) -> Tensor:
        size = torch.rand(out.shape, generator=generator) * 4 - 1  # decades, from 0.1 to 1000
        sign = torch.randint(2, out.shape, generator=generator) * 2 - 1
        sent = (sign * 10**size).to(out)
        seen.append((given[-1], out.clone(), sent))
        return sent.clone()  # the model may change it in place

    head = model.get_output_embeddings()
    with ExitStack() as stack:
        stack.enter_context(hooked(head.register_forward_pre_hook, before))
        stack.enter_context(hooked(head.register_forward_hook, behind))
        logits = model(input_ids=tokens, use_cache=False).logits
    if len(seen) != 1:
        raise UnsupportedModelError(
            f"{described(model)} is called {len(seen)} times in a forward: {_OTHER}"
        )
    hidden, out, sent = (x.flatten(0, -2) for x in seen[0])
    check_product(model, hidden, out)
    scale, cap = _factor_and_cap(model, sent, logits)
    return Product(scale, cap, out.dtype)


def check_product(model: Any, hidden: Tensor, out: Tensor) -> None:
    """Refuse a head whose `out` (n, V) is not hidden · weightᵀ + bias, up to rounding."""
    head = output_head(model)
    if out.shape[-1] != len(head.weight):
        raise UnsupportedModelError(
            f"{described(model)} gives {out.shape[-1]} numbers with a weight of"
            f" {len(head.weight)} rows: {_OTHER}"
        )
    want, bound = product(hidden, head.weight, head.bias, out.dtype, head.low_rank())
    error = (out.double() - want).abs()
    if bool((error > bound).any()):
        raise UnsupportedModelError(
            f"{described(model)} is not hidden · weightᵀ + bias (off by"
            f" {float(error.max()):.2g}): {_OTHER}"
        )


def _factor_and_cap(model: Any, sent: Tensor, logits: Tensor) -> tuple[float, float | None]:
    """The factor and the soft cap, of those in the config, that turn `sent` into `logits`."""
    found = logits.flatten(0, -2)
    if found.shape == sent.shape:
        numbers = sorted(set(_numbers(model.config.get_text_config())))
        scales = [1.0, *(y for x in numbers for y in (x, 1 / x))]
        eps = 8 * max(spacing(x.dtype) for x in (sent, logits))
        fits = [
            (float(_relative(Product(s, c, sent.dtype).of(sent.double()), found).max()), s, c)
            for s in scales
            for c in (None, *numbers)
        ]
        error, scale, cap = min(fits, key=lambda fit: fit[0])
        if error <= eps:
            return scale, cap
    raise UnsupportedModelError(
        f"{type(model).__name__} makes its logits of what its {described(model)} gives in a way"
        f" that is no factor and no soft cap of its config: {_OTHER}"
    )


def _numbers(config: Any) -> Iterator[float]:
    """Positive numbers of a config that may be a factor or a soft cap of the logits."""
    for name, value in vars(config).items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
        if number and any(part in name for part in _NAMES):
            yield float(value)


def _relative(a: Tensor, b: Tensor) -> Tensor:
    return ((a - b.double()).abs() / b.double().abs()).nan_to_num(torch.inf, torch.inf, torch.inf)


@torch.no_grad()
def check_distributions(model: Any, head: Product, hidden: Tensor, logits: Tensor) -> None:
    """Compare the distributions over the vocabulary, (n, V), with those of the model's own logits.

    Raises UnsupportedModelError where a log-probability differs by more than rounding explains.
    """
    own = output_head(model)
    z, bound = product(hidden, own.weight, own.bias, head.dtype, own.low_rank())
    mine, bound = head.of(z), bound * head.scale
    theirs = logits.double()
    if theirs.shape != mine.shape:
        raise UnsupportedModelError(
            f"{described(model)} has {mine.shape[1]} rows for {theirs.shape[1]} logits: {_OTHER}"
        )
    rounded = 8 * spacing(logits.dtype) * mine.abs()
    bound = bound + rounded
    bound = bound + bound.amax(1, keepdim=True)  # of the normaliser
    error = (mine.log_softmax(1) - theirs.log_softmax(1)).abs()
    worst = (error - bound).nan_to_num(-1.0, torch.inf)
    if bool((worst > 0).any()):
        token = int(worst.amax(0).argmax())
        raise UnsupportedModelError(
            f"the linear head's log-probabilities differ from those of the model's own logits by"
            f" {float(error[:, token].max()):.3g} nats at token {token}: {described(model)} is not"
            f" all that makes the logits of this batch; {_OTHER}"
        )


@contextmanager
def hooked(register: Callable[..., Any], hook: Callable[..., Any]) -> Iterator[None]:
    """Context that keeps a hook registered."""
    handle = register(hook)
    try:
        yield
    finally:
        handle.remove()
