"""llama.cpp's architectures: what the keys of each say beyond what all say, and the names of its tensors.

Mistral and SmolLM2 go by the name of `llama` there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from linspec.checkpoints.families.base import Rule, qkv_rows
from linspec.checkpoints.gguf.keys import Keys
from linspec.checkpoints.gguf.ropes import head_width_of, read_rope
from linspec.errors import UnsupportedModel
from linspec.mixers.config import MixerConfig
from linspec.mixers.rope_config import RopeConfig

_QKV = ("blocks.{}.mixer.q", "blocks.{}.mixer.k", "blocks.{}.mixer.v")
COMMON = (
    Rule("token_embd", ("embed",)),
    Rule("blk.{}.attn_norm", ("blocks.{}.mixer_norm",)),
    Rule("blk.{}.attn_output", ("blocks.{}.mixer.o",)),
    Rule("blk.{}.post_attention_norm", ("blocks.{}.mixer_out_norm",)),
    Rule("blk.{}.ffn_norm", ("blocks.{}.mlp_norm",)),
    Rule("blk.{}.ffn_down", ("blocks.{}.mlp.down",)),
    Rule("blk.{}.post_ffw_norm", ("blocks.{}.mlp_out_norm",)),
    Rule("output_norm", ("norm",)),
    Rule("output", ("head",)),
)
SEPARATE = (
    *COMMON,
    Rule("blk.{}.attn_q", ("blocks.{}.mixer.q",)),
    Rule("blk.{}.attn_k", ("blocks.{}.mixer.k",)),
    Rule("blk.{}.attn_v", ("blocks.{}.mixer.v",)),
    Rule("blk.{}.attn_q_norm", ("blocks.{}.mixer.q_norm",)),
    Rule("blk.{}.attn_k_norm", ("blocks.{}.mixer.k_norm",)),
    Rule("blk.{}.ffn_gate", ("blocks.{}.mlp.gate",)),
    Rule("blk.{}.ffn_up", ("blocks.{}.mlp.up",)),
)
FUSED = (
    *COMMON,
    Rule("position_embd", ("embed_positions",)),
    Rule("blk.{}.attn_qkv", _QKV, sizes=qkv_rows),
    Rule("blk.{}.ffn_up", ("blocks.{}.mlp.up",)),
)
FUSED_GATED = (
    *COMMON,
    Rule("blk.{}.attn_qkv", _QKV, sizes=qkv_rows),
    Rule("blk.{}.ffn_up", ("blocks.{}.mlp.gate", "blocks.{}.mlp.up")),
)


@dataclass(frozen=True, slots=True)
class Architecture:
    """read: settings of a decoder from the keys. pairs: q and k rows lie in the order of rotary pairs."""

    read: Callable[[Keys], dict[str, Any]]
    rules: tuple[Rule, ...] = SEPARATE
    pairs: bool = False


def architecture_of(keys: Keys) -> Architecture:
    """The architecture of a file; raises UnsupportedModel with the known ones."""
    if keys.architecture not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{keys.file.path}: architecture {keys.architecture!r} is not supported; supported: "
            f"{', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[keys.architecture]


def _rms(keys: Keys, *, partial: bool = False) -> dict[str, Any]:
    """Of RMS norms and rotary positions."""
    return {
        "norm_eps": keys.real("arch.attention.layer_norm_rms_epsilon"),
        "rope": read_rope(keys, partial=partial),
    }


def _layer_norm(keys: Keys) -> dict[str, Any]:
    """Of LayerNorms."""
    return {"norm": "layer", "norm_eps": keys.real("arch.attention.layer_norm_epsilon")}


def _usual_scale(keys: Keys) -> None:
    """Raise UnsupportedModel if scores have another scale than usual, which no such model has."""
    usual = head_width_of(keys) ** -0.5
    scale = keys.real("arch.attention.scale", usual)
    if not math.isclose(scale, usual, rel_tol=1e-5):
        raise UnsupportedModel(
            f"{keys.file.path}: an attention scale of {scale} is not supported in an architecture "
            f"{keys.architecture!r}; linspec divides by the root of the head width there"
        )


def _without_window(keys: Keys) -> None:
    if keys.whole("arch.attention.sliding_window", 0):
        raise UnsupportedModel(
            f"{keys.file.path}: a {keys.architecture} whose layers see a window is not supported in GGUF "
            "files; use its Hugging Face directory"
        )


def _all_windows(keys: Keys) -> tuple[MixerConfig, ...]:
    """Mixers of all layers where one window is for all; none without."""
    window = keys.whole("arch.attention.sliding_window", 0)
    if not window:
        return ()
    return (MixerConfig(name="window", window=window),) * layers_of(keys)


def layers_of(keys: Keys) -> int:
    """Layers of the model."""
    return keys.whole("arch.block_count")


def _llama(keys: Keys) -> dict[str, Any]:
    _usual_scale(keys)
    mixers = _all_windows(keys)
    return {"family": "mistral" if mixers else "llama", "mixers": mixers, **_rms(keys)}


def _qwen2(keys: Keys) -> dict[str, Any]:
    _usual_scale(keys)
    _without_window(keys)
    return {"family": "qwen2", **_rms(keys)}


def _qwen3(keys: Keys) -> dict[str, Any]:
    return _qwen2(keys) | {"family": "qwen3", "qk_norm": True}


def _gpt2(keys: Keys) -> dict[str, Any]:
    return {
        "family": "gpt2",
        "activation": "gelu_tanh",
        "gated_mlp": False,
        "positions": "learned",
        **_layer_norm(keys),
    }


def _gemma(keys: Keys, every: int, wide_layers: int) -> dict[str, Any]:
    """What both have; every n-th layer sees all tokens. wide_layers: of the one model with another scale."""
    layers, width = layers_of(keys), keys.whole("arch.embedding_length")
    wide = layers == wide_layers
    scored = width // keys.whole("arch.attention.head_count") if wide else head_width_of(keys)
    size = keys.whole("arch.attention.sliding_window", 4096)
    window = MixerConfig(name="window", window=size)
    return {
        "activation": "gelu_tanh",
        "norms": "both",
        "norm_offset": True,
        "embedding_scale": width**0.5,
        "score_factor": scored**-0.5,
        "mixers": tuple(MixerConfig() if (i + 1) % every == 0 else window for i in range(layers)),
        **_rms(keys),
    }


def _gemma2(keys: Keys) -> dict[str, Any]:
    return _gemma(keys, 2, 46) | {
        "family": "gemma2",
        "score_cap": keys.real("arch.attn_logit_softcapping", 50.0),
        "logit_cap": keys.real("arch.final_logit_softcapping", 30.0),
    }


def _gemma3(keys: Keys) -> dict[str, Any]:
    found = _gemma(keys, keys.whole("arch.attention.sliding_window_pattern", 6), 62)
    ropes = tuple("local" if mixer.window else "main" for mixer in found["mixers"])
    local = RopeConfig(theta=keys.real("arch.rope.freq_base_swa", 10_000.0))
    return found | {
        "family": "gemma3_text",
        "qk_norm": True,
        "logit_cap": keys.real("arch.final_logit_softcapping", 0.0),
        "layer_ropes": ropes if "local" in ropes else (),
        "local_rope": local if "local" in ropes else None,
    }


def _olmo2(keys: Keys) -> dict[str, Any]:
    _without_window(keys)
    return {
        "family": "olmo2",
        "norms": "behind",
        "qk_norm": True,
        "qk_norm_of": "whole",
        **_rms(keys),
    }


def _smollm3(keys: Keys) -> dict[str, Any]:
    # no key says it
    ropes = tuple("main" if (i + 1) % 4 else "none" for i in range(layers_of(keys)))
    return {"family": "smollm3", "layer_ropes": ropes if "none" in ropes else (), **_rms(keys)}


def _granite(keys: Keys) -> dict[str, Any]:
    if keys.has("arch.rope.scaling.finetuned") and not keys.flag("arch.rope.scaling.finetuned"):
        raise UnsupportedModel(
            f"{keys.file.path}: a granite without rotary positions is not supported; use a dense one"
        )
    return {
        "family": "granite",
        "embedding_scale": keys.real("arch.embedding_scale", 1.0),
        "residual_scale": keys.real("arch.residual_scale", 1.0),
        "score_factor": keys.real("arch.attention.scale", head_width_of(keys) ** -0.5),
        "logit_scale": 1 / keys.above_zero("arch.logit_scale"),
        **_rms(keys),
    }


def _starcoder2(keys: Keys) -> dict[str, Any]:
    return {
        "family": "starcoder2",
        "activation": "gelu_tanh",
        "gated_mlp": False,
        "rope": read_rope(keys),
        "mixers": _all_windows(keys),
        **_layer_norm(keys),
    }


def _stablelm(keys: Keys) -> dict[str, Any]:
    normed = "blk.0.attn_q_norm.weight" in keys.file.tensors
    return {
        "family": "stablelm",
        "qk_norm": normed,
        "qk_norm_of": "each" if normed else "head",
        # what the tensors say: the key is true in files of models that are not
        "residual": "sequential"
        if "blk.0.ffn_norm.weight" in keys.file.tensors
        else "parallel-shared",
        "rope": read_rope(keys, partial=True),
        **_layer_norm(keys),
    }


def _gptneox(keys: Keys) -> dict[str, Any]:
    return {
        "family": "gpt_neox",
        "activation": "gelu",
        "gated_mlp": False,
        "residual": "parallel" if keys.flag("arch.use_parallel_residual", True) else "sequential",
        "rope": read_rope(keys, partial=True),
        **_layer_norm(keys),
    }


def _phi3(keys: Keys) -> dict[str, Any]:
    return {"family": "phi3", "mixers": _all_windows(keys), **_rms(keys, partial=True)}


ARCHITECTURES = {
    "llama": Architecture(_llama, pairs=True),
    "qwen2": Architecture(_qwen2),
    "qwen3": Architecture(_qwen3),
    "gpt2": Architecture(_gpt2, FUSED),
    "gemma2": Architecture(_gemma2),
    "gemma3": Architecture(_gemma3),
    "olmo2": Architecture(_olmo2),
    "smollm3": Architecture(_smollm3, pairs=True),
    "granite": Architecture(_granite, pairs=True),
    "starcoder2": Architecture(_starcoder2),
    "stablelm": Architecture(_stablelm),
    "gptneox": Architecture(_gptneox, FUSED),
    "phi3": Architecture(_phi3, FUSED_GATED),
}
