"""Every causal-LM type of transformers: the loop trains it, or names why it cannot."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_helpers import TEXTS, tiny
from model_zoo import NEWER, SPECIAL, TYPES, build

from ppo_fast.loop import NonFiniteGradientError, TrainConfig, Trainer, UnsupportedModelError
from ppo_fast.loop.model.layers import decoder_layers
from ppo_fast.loop.model.rounding import allowed_gap, has_routed_experts
from ppo_fast.loop.rewards import letters

# What cannot be made small here, and the error that says so.
UNBUILT = {
    "dots3_note": "per_layer_config",  # its text config holds the layers of the large model
    "gemma3n": "timm",  # a package that is not installed; gemma3n_text is tried
    "gemma4_assistant": "hidden_size_per_layer_input",  # its config class has no valid default
    "musicgen": "dropout",  # the composed config is no language model's
    "musicgen_melody": "dropout",
}
# What the loop refuses by name, with any head and any number of layers.
_POSITIONS = "with the loop's positions and mask than without any"
_CACHE = "one token at a time with its cache than at once"
REFUSED = {
    "blt": "a forward of it raised",  # bytes in patches
    "cpmant": "a forward of it raised",  # a prompt of its own before each row
    "gemma4_unified_assistant": "shared_kv_states",  # drafts for another model
    "git": _CACHE,  # captions of images
    "inkling2_loop_text": "logits for .* tokens and embeddings for 300",
    "inkling2_text": "logits for .* tokens and embeddings for 300",
    "minimax": "cache of its own",
    "moshi": _CACHE,
    "openai-gpt": "takes none of 'cache'",
    "prophetnet": "a forward of it raised",
    "reformer": "a forward of it raised",
    "rwkv": "takes none of 'cache'",
    "xlm": "a forward of it raised",
    "xlnet": "takes none of 'cache'",
    "xlstm": "rnn_state",
    # their one-step update leaves out the bound of the time step
    "zamba2": f"{_CACHE}|shares weights",
    **dict.fromkeys(
        (
            "camembert",
            "data2vec-text",
            "roberta",
            "roberta-prelayernorm",
            "xlm-roberta",
            "xlm-roberta-xl",
            "xmod",
        ),
        _POSITIONS,
    ),
}
# What it refuses to train in part: layers that run twice, or hand on more than hidden states.
WHOLE_ONLY = {
    "dory": "of its frozen layers",
    "gemma3n_text": "of its frozen layers",
    "hrm_text": "of its frozen layers",
    "zamba": "shares weights",
    "zaya": "of its frozen layers",
}
# Types whose gradient is not finite at these sizes, which stops a run with a message of its own.
OVERFLOWING = {"gemma3n_text"}


COMBINATIONS = [
    (head, layers, critic)
    for head in ("linear", "logits")
    for layers in (0, 1)
    for critic in ("shared", "separate")
]


def made(out: Path, model: Any, head: Any, layers: int, critic: Any = "shared") -> Trainer:
    config = TrainConfig(
        out=out,
        updates=2,
        batch=8,
        micro_batch=4,
        max_new_tokens=12,
        lr=1e-3,
        warmup=0,
        train_layers=layers,
        head=head,
        critic=critic,
        model="mine",
        device="cpu",
        save_every=0,
        compare=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return Trainer(config, model, tiny()[1], TEXTS, letters)


@pytest.mark.long
@pytest.mark.parametrize(("head", "layers", "critic"), COMBINATIONS)
@pytest.mark.parametrize("name", TYPES)
def test_it_agrees_or_is_refused_by_name(
    tmp_path: Path, name: str, head: str, layers: int, critic: str
) -> None:
    if name in UNBUILT:
        with pytest.raises(Exception, match=UNBUILT[name]):
            build(name)
        return
    model = build(name)
    said = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    assert said is None or said >= len(decoder_layers(model))  # so that no early check is wrong
    refusal = REFUSED.get(name) or (WHOLE_ONLY.get(name) if layers else None)
    if refusal:
        with pytest.raises(UnsupportedModelError, match=refusal) as caught:
            made(tmp_path / "out", model, head, layers, critic)
        assert type(model).__name__ in str(caught.value)
        assert not (tmp_path / "out").exists()
        return
    t = made(tmp_path / "out", model, head, layers, critic)
    if name in OVERFLOWING:
        with pytest.raises(NonFiniteGradientError):
            t.step()
        return
    # A near tie of experts that is broken otherwise moves single tokens by more than rounding.
    which = "rollout_gap_mean" if has_routed_experts(model) else "rollout_gap_max"
    assert max(t.step()[which] for _ in range(2)) <= allowed_gap(torch.float32)
    assert t.updates == 2


def test_the_lists_name_types_that_there_are() -> None:
    listed = {*UNBUILT, *REFUSED, *WHOLE_ONLY, *OVERFLOWING}
    assert listed <= {*TYPES, *NEWER} and len(TYPES) > 100
    assert not set(UNBUILT) & set(REFUSED) and not set(REFUSED) & set(WHOLE_ONLY)
    assert len(SPECIAL) < len(TYPES) / 3
