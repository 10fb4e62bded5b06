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


def weight_and_bias(model: Any) -> tuple[Tensor, Tensor | None]:
    """Weight (V, H) and bias (V,) of the output head, with peft's LoRA adapters on it added in.

    The sum is made anew at every call, so that adapters get their gradient.
    """
    head = model.get_output_embeddings()
    lora = getattr(head, "lora_A", None)
    if lora is None or not hasattr(head, "base_layer"):
        return head.weight, getattr(head, "bias", None)
    weight, bias = head.base_layer.weight, head.base_layer.bias
    if head.merged or head.disable_adapters:
        return weight, bias
    for name in head.active_adapters:
        if name not in lora:
            continue
        if name in head.lora_variant:
            kind = type(head.lora_variant[name]).__name__
            raise UnsupportedModelError(
                f"adapter {name!r} on the {described(model)} is a {kind}: {_OTHER}"
            )
        with torch.autocast(weight.device.type, enabled=False):
            weight = weight + head.get_delta_weight(name)
        added = head.lora_B[name].bias
        if added is not None:
            added = added * head.scaling[name]
            bias = added if bias is None else bias + added
    return weight, bias


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
    weight, bias = weight_and_bias(model)
    if out.shape[-1] != len(weight):
        raise UnsupportedModelError(
            f"{described(model)} gives {out.shape[-1]} numbers with a weight of {len(weight)}"
            f" rows: {_OTHER}"
        )
    want, bound = product(hidden, weight, bias, out.dtype)
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
    weight, bias = weight_and_bias(model)
    z, bound = product(hidden, weight, bias, head.dtype)
    mine, bound = head.of(z), bound * head.scale
    own = logits.double()
    if own.shape != mine.shape:
        raise UnsupportedModelError(
            f"{described(model)} has {mine.shape[1]} rows for {own.shape[1]} logits: {_OTHER}"
        )
    rounded = 8 * spacing(logits.dtype) * mine.abs()
    bound = bound + rounded
    bound = bound + bound.amax(1, keepdim=True)  # of the normaliser
    error = (mine.log_softmax(1) - own.log_softmax(1)).abs()
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
