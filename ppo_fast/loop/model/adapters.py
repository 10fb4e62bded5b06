"""LoRA through peft: low-rank adapters are trained, and switching them off gives the reference."""

from __future__ import annotations

from typing import Any

from torch import nn

from ppo_fast.loop.data.packages import require_installed
from ppo_fast.loop.model.layers import check_frozen, check_train_layers, decoder_layers


def require_peft() -> None:
    """Raise ModuleNotFoundError where peft is not installed."""
    require_installed("peft", "lora_rank", "pip install 'ppo_fast[lora]'")


def add_adapters(model: Any, rank: int, train_layers: int) -> tuple[Any, int]:
    """Put adapters of `rank` on the linear layers of the top `train_layers` layers (0: of all).

    Returns peft's handle of `model`, which is changed in place, and the number of layers below.
    The adapters' product starts at zero, so the model computes what it did (Hu et al. 2021,
    "LoRA: Low-Rank Adaptation of Large Language Models").
    """
    require_peft()
    from peft import LoraConfig, get_peft_model

    layers = decoder_layers(model)
    check_train_layers(train_layers, len(layers))
    split = len(layers) - train_layers if train_layers else 0
    path = next(name for name, module in model.named_modules() if module is layers)
    linear = {
        name.rsplit(".", 1)[-1]
        for name, module in layers[split].named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }
    lora = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        task_type="CAUSAL_LM",
        target_modules=sorted(linear),
        layers_to_transform=list(range(split, len(layers))),
        layers_pattern=path.rsplit(".", 1)[-1],
    )
    adapted = get_peft_model(model, lora)
    check_frozen(model, layers, split)
    return adapted, split
