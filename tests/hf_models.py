"""Tiny random models of transformers, one or more of each family that linspec reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 61
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    **IDS,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
DYNAMIC = LINEAR | {"rope_type": "dynamic"}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 6.0,
    "beta_slow": 1.0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.5],
    "long_factor": [1.0, 2.5, 5.0, 9.0],
    "original_max_position_embeddings": 16,
}
NEOX = {key: SIZES[key] for key in SIZES if key != "num_key_value_heads"}
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 96}
SLIDING, FULL = "sliding_attention", "full_attention"
GEMMA = SIZES | {
    "head_dim": 12,
    "sliding_window": 5,
    "query_pre_attn_scalar": 20,
    "rms_norm_eps": 3e-6,
    "layer_types": [SLIDING, FULL, SLIDING],
}
GEMMA3_ROPES = {
    FULL: {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0},
    SLIDING: {"rope_type": "default", "rope_theta": 100.0},
}
GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.5,
}
# family, its variant, and the settings of each
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SIZES),
    "llama-tied-biased": (
        "llama",
        SIZES | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-wide-heads": ("llama", SIZES | {"head_dim": 12}),
    "llama-gelu": ("llama", SIZES | {"hidden_act": "gelu_pytorch_tanh"}),
    "llama-rope-llama3": ("llama", SIZES | {"rope_parameters": LLAMA3}),
    "llama-rope-linear": ("llama", SIZES | {"rope_parameters": LINEAR}),
    "llama-rope-dynamic": ("llama", SIZES | {"rope_parameters": DYNAMIC}),
    "llama-rope-yarn": ("llama", SIZES | {"rope_parameters": YARN}),
    "llama-rope-yarn-derived": (
        "llama",
        SIZES
        | {
            "rope_parameters": YARN
            | {"factor": None, "mscale": 0.8, "mscale_all_dim": 0.5, "truncate": False}
        },
    ),
    "mistral": ("mistral", SIZES | {"sliding_window": None}),
    "mistral-window": ("mistral", SIZES | {"sliding_window": 5}),
    "qwen2": ("qwen2", SIZES | {"tie_word_embeddings": True}),
    "qwen2-window": (
        "qwen2",
        SIZES | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", SIZES | {"head_dim": 16}),
    "qwen3-biased-window": (
        "qwen3",
        SIZES
        | {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 3,
            "layer_types": [SLIDING, FULL, SLIDING],
        },
    ),
    "gpt2": ("gpt2", GPT2),
    "gpt2-untied-inner": (
        "gpt2",
        GPT2 | {"tie_word_embeddings": False, "n_inner": 40, "activation_function": "relu"},
    ),
    "gemma2": ("gemma2", GEMMA | {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0}),
    "gemma2-uncapped": (
        "gemma2",
        GEMMA | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3": ("gemma3_text", GEMMA | {"rope_parameters": GEMMA3_ROPES}),
    "gemma3-global-capped": (
        "gemma3_text",
        GEMMA | {"layer_types": [FULL] * 3, "final_logit_softcapping": 2.0},
    ),
    "olmo2": ("olmo2", SIZES),
    "olmo2-wide-heads": ("olmo2", SIZES | {"head_dim": 12, "attention_bias": True}),
    "smollm3": ("smollm3", SIZES | {"no_rope_layers": [1, 0, 1]}),
    "smollm3-window": (
        "smollm3",
        SIZES | {"no_rope_layers": [1, 1, 0], "use_sliding_window": True, "sliding_window": 5},
    ),
    "granite": ("granite", SIZES | GRANITE),
    "granite-biased": ("granite", SIZES | GRANITE | {"attention_bias": True, "mlp_bias": True}),
    "starcoder2": ("starcoder2", SIZES | {"sliding_window": 5}),
    "starcoder2-plain": (
        "starcoder2",
        SIZES | {"sliding_window": None, "use_bias": False, "tie_word_embeddings": False},
    ),
    "stablelm": ("stablelm", SIZES | {"use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    "stablelm-parallel": (
        "stablelm",
        SIZES
        | {"use_parallel_residual": True, "qk_layernorm": True, "partial_rotary_factor": 0.75},
    ),
    "gpt_neox": ("gpt_neox", NEOX | {"rotary_pct": 0.5}),
    "gpt_neox-sequential": (
        "gpt_neox",
        NEOX | {"use_parallel_residual": False, "rotary_pct": 1.0, "attention_bias": False},
    ),
    "phi3": ("phi3", SIZES | {"partial_rotary_factor": 0.5}),
    "phi3-longrope": (
        "phi3",
        SIZES
        | {
            "rope_parameters": LONGROPE,
            "original_max_position_embeddings": 16,
            "sliding_window": 20,
            "tie_word_embeddings": True,
        },
    ),
    # as in Phi-4-mini
    "phi3-longrope-partial": (
        "phi3",
        SIZES
        | {
            "rope_parameters": LONGROPE | {"short_factor": [1.0, 1.2], "long_factor": [1.0, 6.0]},
            "original_max_position_embeddings": 16,
            "partial_rotary_factor": 0.5,
        },
    ),
    "phi3-longrope-short": (
        "phi3",
        SIZES
        | {
            "rope_parameters": LONGROPE | {"partial_rotary_factor": 1.0},
            "original_max_position_embeddings": 96,
        },
    ),
}


# one model of each family
FAMILY_MODELS = {family: name for name, (family, _) in reversed(MODELS.items())}


def make(name: str, **changes: Any) -> PreTrainedModel:
    """A random model in which no norm is one and no bias is zero."""
    family, settings = MODELS[name]
    return make_of(family, settings | changes)


def make_of(family: str, settings: dict[str, Any]) -> PreTrainedModel:
    """As `make`, for any family of transformers."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **settings)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.0 if parameter.ndim > 1 else 0.5, std=0.15)
    return model


def save(name: str, folder: Path, **changes: Any) -> PreTrainedModel:
    """`make`, saved by transformers."""
    model = make(name, **changes)
    model.save_pretrained(folder)
    return model


def tokens(rows: int = 2, length: int = 23) -> torch.Tensor:
    """Random ids [rows, length]."""
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal to 1e-4, and not because nothing is there."""
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
