"""Small random models of every causal-LM type that the installed transformers maps.

A type's own config class is made with its sizes shrunk: what it calls its widths, its layers, its
heads and its experts is known by name, and `SPECIAL` has what a type wants beside that.
"""

from __future__ import annotations

import inspect
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TYPES: list[str] = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
# Listed types that came after transformers 5.5, the lowest that is supported.
NEWER = {
    "dory",
    "dots3_note",
    "gemma4_assistant",
    "gemma4_unified_assistant",
    "hrm_text",
    "hyperclovax",
    "inkling2_loop_text",
    "inkling2_text",
    "minicpm3",
    "zaya",
}
VOCABULARY = 300  # the tiny model's tokenizer's
_SECONDS = 60

_SIZES: list[tuple[Any, str]] = [
    (
        32,
        "hidden_size d_model n_embd lru_width attention_hidden_size embedding_size emb_dim"
        " word_embed_proj_dim dim_model",
    ),
    (
        64,
        "intermediate_size ffn_dim d_ff n_inner decoder_ffn_dim encoder_ffn_dim dff dim_ff mlp_dim"
        " moe_intermediate_size shared_expert_intermediate_size feed_forward_size ffn_hidden_size"
        " intermediate_size_mlp expert_ffn_hidden_size moe_shared_expert_intermediate_size fc_dim"
        " dense_intermediate_size shared_intermediate_size mamba_d_ssm",
    ),
    (
        2,
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_blocks"
        " num_decoder_layers num_encoder_layers num_key_value_heads num_kv_heads"
        " num_experts_per_tok num_experts_per_token moe_topk top_k num_selected_experts"
        " moe_top_k moe_k linear_num_key_heads",
    ),
    (
        4,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads attention_heads"
        " encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads"
        " num_experts num_local_experts n_routed_experts moe_num_experts rotary_dim"
        " linear_num_heads mamba_n_heads mamba_num_heads mamba_dt_rank time_step_rank"
        " linear_num_value_heads",
    ),
    (512, "max_position_embeddings n_positions max_seq_len n_ctx max_sequence_length"),
    (16, "kv_lora_rank q_lora_rank mamba_d_head mamba_head_dim"),
    (
        8,
        "qk_rope_head_dim qk_nope_head_dim v_head_dim head_dim global_head_dim sliding_window"
        " attention_window_size window_size state_size mamba_d_state ssm_state_size chunk_size"
        " mamba_chunk_size linear_key_head_dim linear_value_head_dim linear_head_dim"
        " hidden_size_per_layer_input",
    ),
    (
        1,
        "n_group topk_group num_expert_group mamba_n_groups mamba_ngroups n_groups"
        " first_k_dense_replace",
    ),
    (0.2, "initializer_range init_std"),
    (0, "pad_token_id bos_token_id eos_token_id"),
    (VOCABULARY, "vocab_size vocab_size_per_layer_input"),
    (True, "is_decoder"),
]
_SMALL = {name: value for value, names in _SIZES for name in names.split()}

_LATENT = {"num_key_value_heads": 4}
_MIXED = {"layer_types": ["linear_attention", "full_attention"]}
_KIMI = {**_LATENT, **_MIXED, "mlp_layer_types": ["dense", "sparse"]}
_SHARED = {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2}
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            "axk1",
            "axk2",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "longcat_flash",
            "minicpm3",
            "sarvam_mla",
            "youtu",
        ),
        _LATENT,
    ),
    **dict.fromkeys(
        ("granitemoehybrid", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"),
        _MIXED,
    ),
    "bailing_hybrid": _KIMI,
    "bamba": {"attn_layer_indices": [1]},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dory": {
        "num_hidden_layers": 4,
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
    },
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {**_LATENT, "per_layer_config": {}},
    "falcon_h1": {"lm_head_multiplier": 0.5},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0, 0.0],
        "laurel_rank": 8,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite": {"logits_scaling": 4.0},
    "hyperclovax": {"logits_scaling": 0.5},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "kimi_linear": _KIMI,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "moshi": {"audio_vocab_size": 32},
    "qwen4_exp_text": {
        **_MIXED,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"num_key_value_heads": 1, "num_hidden_layers": 3, "logits_soft_cap": 3.0},
    "reformer": {
        "axial_pos_embds": False,
        "attn_layers": ["local", "local"],
        "attention_head_size": 8,
        "local_attn_chunk_length": 8,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {**_SHARED, **_LATENT, "attention_hidden_size": 64},
    "zamba2": _SHARED,
    "zaya": {"num_experts_per_tok": 1},
}


def small_config(kind: type[Any]) -> Any:
    """The config of class `kind` with its sizes, and those of the configs it holds, shrunk."""
    known = set(inspect.signature(kind).parameters)
    options = {name: value for name, value in _SMALL.items() if name in known}
    options |= SPECIAL.get(kind.model_type, {})
    for name, part in (getattr(kind, "sub_configs", None) or {}).items():
        if name in options:
            continue
        if part.__name__ == "AutoConfig":
            held = getattr(kind(), name, None)
            if held is None:
                continue
            part = type(held)
        options[name] = small_config(part).to_dict()
    return kind(**options)


def build(name: str) -> Any:
    """A random model of the type `name`, in fp32 and eval mode; the same at every call.

    Skips the test for a type in `NEWER` that the installed transformers does not have.
    """
    if name in NEWER and name not in TYPES:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    torch.manual_seed(0)
    with _at_most(_SECONDS):
        return AutoModelForCausalLM.from_config(small_config(CONFIG_MAPPING[name])).float().eval()


@contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    """A TimeoutError after so many seconds: some types cannot be made small."""

    def late(*_: object) -> None:
        raise TimeoutError(f"not built after {seconds} s")

    former = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)
