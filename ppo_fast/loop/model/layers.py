"""Decoder layers of a model: finding the stack, and freezing all but its top."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from ppo_fast.loop.config import OptionError
from ppo_fast.loop.model.memory import out_of_memory


class UnsupportedModelError(OptionError):
    """The model computes what the loop cannot train, or not as asked."""


@contextmanager
def refusing(model: Any) -> Iterator[None]:
    """Name the model in whatever a forward of it raises on made-up tokens; memory may run out."""
    try:
        yield
    except UnsupportedModelError:
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and out_of_memory(error):
            raise
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be trained by the loop: a forward of it raised"
            f" {type(error).__name__}: {error}"
        ) from error


def decoder_layers(model: Any) -> nn.ModuleList:
    """The model's stack of decoder layers: the module list next to its token embeddings.

    Of several, as where a model also sees images, the one whose path begins most like that of
    the embeddings; then one of `num_hidden_layers` entries, the nearest and longest.
    """
    embeddings = model.get_input_embeddings()
    paths = {id(m): name.split(".") for name, m in model.named_modules()}
    home = paths.get(id(embeddings), [])
    wanted = getattr(model.config.get_text_config(), "num_hidden_layers", None)

    def likeness(layers: nn.ModuleList) -> tuple[int, bool, int, int]:
        path = paths[id(layers)]
        shared = takewhile(lambda pair: pair[0] == pair[1], zip(path, home, strict=False))
        return len(list(shared)), len(layers) == wanted, -len(path), len(layers)

    lists = [m for m in _outer_lists(model) if len(m)]
    if not lists:
        name = type(model).__name__
        raise UnsupportedModelError(f"model must have a list of decoder layers, got {name}")
    return max(lists, key=likeness)


def _outer_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    """Module lists that lie in no other."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _outer_lists(child)


def plain_tokens(model: Any, count: int) -> Tensor:
    """Some tokens, (count,), that stand for words: none to which the config gives a meaning."""
    configs = {id(c): c for c in (model.config, model.config.get_text_config())}.values()
    special = set()
    for config in configs:
        for name, value in vars(config).items():
            if name.endswith(("_id", "_index", "_ids")):
                special |= set(value if isinstance(value, list | tuple) else [value])
    n = vocabulary(model)
    words = [token for token in range(min(n, 20 * count + 40)) if token not in special] or [0]
    picked = [words[(7 * i + 3) % len(words)] for i in range(count)]
    return torch.tensor(picked, device=model.get_input_embeddings().weight.device)


def vocabulary(model: Any) -> int:
    """The number of tokens that the model has an embedding for."""
    embeddings = model.get_input_embeddings()
    return int(getattr(embeddings, "num_embeddings", None) or len(embeddings.weight))


def check_train_layers(train_layers: int, layers: int) -> None:
    """Raise OptionError where a model of so many `layers` has too few."""
    if train_layers > layers:
        raise OptionError(f"train_layers must be at most {layers}, got {train_layers}")


def freeze_below(model: Any, train_layers: int) -> int:
    """Leave only the top `train_layers` layers and the final norm trainable (0: everything).

    Returns the number of frozen layers at the bottom. Raises OptionError where there are too few,
    or where a frozen layer shares weights with a trainable one.
    """
    layers = decoder_layers(model)
    check_train_layers(train_layers, len(layers))
    if train_layers == 0:
        return 0
    model.requires_grad_(False)
    split = len(layers) - train_layers
    for layer in layers[split:]:
        layer.requires_grad_(True)
    for norm in final_norms(model, layers):
        norm.requires_grad_(True)
    check_frozen(model, layers, split)
    return split


def check_frozen(model: Any, layers: nn.ModuleList, split: int) -> None:
    """Raise ValueError where one of the first `split` layers has a trainable weight."""
    if any(p.requires_grad for layer in layers[:split] for p in layer.parameters()):
        raise UnsupportedModelError(
            f"train_layers must be 0 for {type(model).__name__}, got {len(layers) - split}: a"
            " layer below shares weights with those that train"
        )


@torch.no_grad()
def final_norms(model: Any, layers: nn.ModuleList) -> list[nn.Module]:
    """The modules that hold vectors alone and run between the last layer and the output head."""
    ran: list[nn.Module] = []
    found: list[nn.Module] = []

    def layer_ends(*_: object) -> None:
        ran.clear()

    def runs(module: nn.Module, *_: object) -> None:
        ran.append(module)

    head = model.get_output_embeddings()
    hooks = [layer.register_forward_hook(layer_ends) for layer in layers]
    for module in model.modules():
        held = list(module.parameters(recurse=False))
        around_head = any(m is head for m in module.modules())  # its bias may be held there
        if held and all(p.dim() == 1 for p in held) and not around_head:
            hooks.append(module.register_forward_pre_hook(runs))
    hooks.append(head.register_forward_pre_hook(lambda *_: found.extend(ran)))
    try:
        with refusing(model):
            model(input_ids=plain_tokens(model, 2)[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found
