"""Llama, Mistral, Qwen2 and Qwen3, and all that have the same layers under these names, such as SmolLM2."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from linspec.checkpoints.families.base import Family, register
from linspec.checkpoints.families.shared import (
    IGNORED,
    LLAMA_RULES,
    layer_types,
    read_decoder,
    same_windows,
    window_of,
    write_decoder,
    written_layer_types,
)
from linspec.models.config import DecoderConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def _read_llama(hf: PreTrainedConfig) -> DecoderConfig:
    bias = hf.attention_bias
    return read_decoder(hf, qkv_bias=bias, out_bias=bias, mlp_bias=hf.mlp_bias)


def _write_llama(config: DecoderConfig) -> dict[str, Any]:
    return write_decoder(config) | {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


def _read_mistral(hf: PreTrainedConfig) -> DecoderConfig:
    return read_decoder(hf, mixers=same_windows(hf))


def _write_mistral(config: DecoderConfig) -> dict[str, Any]:
    return write_decoder(config) | {"sliding_window": window_of(config)}


def _read_qwen2(hf: PreTrainedConfig) -> DecoderConfig:
    return read_decoder(hf, qkv_bias=True, mixers=layer_types(hf))


def _write_qwen2(config: DecoderConfig) -> dict[str, Any]:
    window = window_of(config)
    return write_decoder(config) | {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": written_layer_types(config),
    }


def _read_qwen3(hf: PreTrainedConfig) -> DecoderConfig:
    bias = hf.attention_bias
    return read_decoder(hf, qkv_bias=bias, out_bias=bias, qk_norm=True, mixers=layer_types(hf))


def _write_qwen3(config: DecoderConfig) -> dict[str, Any]:
    return _write_qwen2(config) | {"attention_bias": config.qkv_bias}


def _like_llama(
    name: str,
    architecture: str,
    read: Callable[[PreTrainedConfig], DecoderConfig],
    write: Callable[[DecoderConfig], dict[str, Any]],
) -> Family:
    return register(
        Family(
            name=name,
            architecture=architecture,
            prefix="model.",
            rules=LLAMA_RULES,
            read=read,
            write=write,
            ignored=IGNORED,
        )
    )


LLAMA = _like_llama("llama", "LlamaForCausalLM", _read_llama, _write_llama)
MISTRAL = _like_llama("mistral", "MistralForCausalLM", _read_mistral, _write_mistral)
QWEN2 = _like_llama("qwen2", "Qwen2ForCausalLM", _read_qwen2, _write_qwen2)
QWEN3 = _like_llama("qwen3", "Qwen3ForCausalLM", _read_qwen3, _write_qwen3)
