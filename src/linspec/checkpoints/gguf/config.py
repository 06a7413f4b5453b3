"""The model that a GGUF file describes: its keys as a `DecoderConfig`.

Names of architectures are llama.cpp's. Mistral and SmolLM2 go by the name of `llama` there. A shape is
read from keys and held against the tensors when these are loaded.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from linspec.checkpoints.gguf.keys import Keys
from linspec.checkpoints.gguf.reader import GgufFile
from linspec.errors import CheckpointError, ConfigError, UnsupportedModel
from linspec.mixers.config import MixerConfig, RopeConfig
from linspec.mixers.rope import inverse_frequencies
from linspec.models.config import DecoderConfig

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
ROPE_FACTORS = "rope_freqs.weight"
ROPE_KINDS = {"none": "default", "linear": "linear"}
# the only numbers that llama3 scaling has been trained with
LOW, HIGH = 1.0, 4.0
ORIGINAL_POSITIONS = tuple(2**power for power in range(5, 22))
# texts of tokens with which a turn of a chat ends
TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|end_of_text|>")


def read_config(file: GgufFile) -> DecoderConfig:
    """The configuration of the decoder in `file`.

    Raises UnsupportedModel for an architecture that linspec does not know or cannot compute, and
    CheckpointError for keys that are missing or contradict each other.
    """
    keys = Keys(file)
    if keys.architecture not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{file.path}: architecture {keys.architecture!r} is not supported; supported: "
            f"{', '.join(ARCHITECTURES)}"
        )
    try:
        return DecoderConfig(**_shape(keys), **_ids(keys), **ARCHITECTURES[keys.architecture](keys))
    except ConfigError as error:
        raise CheckpointError(f"{file.path} describes no sound model: {error}") from error


def tied(file: GgufFile) -> bool:
    """Whether the output matrix is the embedding: left out of the file, or there as a copy."""
    if HEAD not in file.tensors:
        return True
    head, embedding = file.tensors[HEAD], file.tensors[EMBEDDING]
    alike = (head.shape, head.kind) == (embedding.shape, embedding.kind)
    return alike and bool(np.array_equal(file.raw(HEAD), file.raw(EMBEDDING)))


def _shape(keys: Keys) -> dict[str, Any]:
    """What the keys of all architectures say alike."""
    file = keys.file
    if EMBEDDING not in file.tensors:
        raise CheckpointError(f"{file.path} has no tensor {EMBEDDING!r}: it holds no whole model")
    layers = keys.whole("arch.block_count")
    if layers < 1 or f"blk.{layers - 1}.attn_norm.weight" not in file.tensors:
        raise CheckpointError(f"{file.path} claims {layers} layers but lacks tensors of the last")
    width, heads = keys.whole("arch.embedding_length"), keys.whole("arch.attention.head_count")
    if not heads:
        raise CheckpointError(f"{file.path} claims 0 attention heads; there must be 1 or more")
    head_width = keys.whole("arch.attention.key_length", width // heads)
    if not head_width:
        raise CheckpointError(
            f"{file.path} claims heads of 0 features ({heads} heads in a width of {width}); there must "
            "be 1 or more"
        )
    if keys.whole("arch.attention.value_length", head_width) != head_width:
        raise UnsupportedModel(
            f"{file.path}: keys and values of different widths are not supported"
        )
    return {
        "vocab_size": file.tensors[EMBEDDING].shape[0],
        "width": width,
        "layers": layers,
        "heads": heads,
        "kv_heads": keys.whole("arch.attention.head_count_kv", heads),
        "head_width": head_width,
        "mlp_width": keys.whole("arch.feed_forward_length"),
        "max_positions": keys.whole("arch.context_length"),
        "tied_embeddings": tied(file),
        "qkv_bias": "blk.0.attn_q.bias" in file.tensors or "blk.0.attn_qkv.bias" in file.tensors,
        "out_bias": "blk.0.attn_output.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in file.tensors,
    }


def _ids(keys: Keys) -> dict[str, Any]:
    """Special tokens; those that end a turn of the file's own chat template end a text too."""
    prefix = "tokenizer.ggml."
    ends = [
        keys.whole(prefix + name)
        for name in ("eos_token_id", "eot_token_id", "eom_token_id")
        if keys.has(prefix + name)
    ]
    template = keys.text("tokenizer.chat_template", "")
    tokens = keys.texts(prefix + "tokens", []) if template else []
    ends += [tokens.index(text) for text in TURN_ENDS if text in template and text in tokens]
    return {
        "bos_id": _id(keys, prefix + "bos_token_id"),
        "pad_id": _id(keys, prefix + "padding_token_id"),
        "eos_ids": tuple(dict.fromkeys(ends)),
    }


def _id(keys: Keys, name: str) -> int | None:
    return keys.whole(name) if keys.has(name) else None


def _llama(keys: Keys) -> dict[str, Any]:
    found: dict[str, Any] = {"family": "llama", **_rotary(keys)}
    window = keys.whole("arch.attention.sliding_window", 0)
    if window:
        mixers = (MixerConfig(name="window", window=window),) * keys.whole("arch.block_count")
        found |= {"family": "mistral", "mixers": mixers}
    return found


def _qwen2(keys: Keys) -> dict[str, Any]:
    return {"family": "qwen2", **_without_window(keys), **_rotary(keys)}


def _qwen3(keys: Keys) -> dict[str, Any]:
    return {"family": "qwen3", "qk_norm": True, **_without_window(keys), **_rotary(keys)}


def _gpt2(keys: Keys) -> dict[str, Any]:
    return {
        "family": "gpt2",
        "norm": "layer",
        "norm_eps": keys.real("arch.attention.layer_norm_epsilon"),
        "activation": "gelu_tanh",
        "gated_mlp": False,
        "positions": "learned",
    }


ARCHITECTURES = {"llama": _llama, "qwen2": _qwen2, "qwen3": _qwen3, "gpt2": _gpt2}


def _without_window(keys: Keys) -> dict[str, Any]:
    if keys.whole("arch.attention.sliding_window", 0):
        raise UnsupportedModel(
            f"{keys.file.path}: a {keys.architecture} whose layers see a window is not supported in GGUF "
            "files; use its Hugging Face directory"
        )
    return {}


def _rotary(keys: Keys) -> dict[str, Any]:
    """What architectures with RMS norms and rotary positions share."""
    heads, width = keys.whole("arch.attention.head_count"), keys.whole("arch.embedding_length")
    head_width = keys.whole("arch.attention.key_length", width // heads)
    turned = keys.whole("arch.rope.dimension_count", head_width)
    if turned != head_width or head_width % 2:
        raise UnsupportedModel(
            f"{keys.file.path} turns {turned} of {head_width} features of a head; linspec turns whole "
            "heads of an even width"
        )
    scale = keys.real("arch.attention.scale", head_width**-0.5)
    if not math.isclose(scale, head_width**-0.5, rel_tol=1e-5):
        raise UnsupportedModel(
            f"{keys.file.path}: an attention scale of {scale} is not supported; linspec divides by the "
            "root of the head width"
        )
    return {
        "norm_eps": keys.real("arch.attention.layer_norm_rms_epsilon"),
        "rope": _rope(keys, head_width),
    }


def _rope(keys: Keys, head_width: int) -> RopeConfig:
    theta = keys.real("arch.rope.freq_base", 10_000.0)
    if ROPE_FACTORS in keys.file.tensors:
        return _llama3(keys.file, theta, head_width)
    factor = keys.real("arch.rope.scaling.factor", 1.0)
    kind = keys.text("arch.rope.scaling.type", "linear")
    if kind not in ROPE_KINDS:
        raise UnsupportedModel(
            f"{keys.file.path}: rope scaling {kind!r} is not supported; supported: "
            f"{', '.join(ROPE_KINDS)}, and that of Llama 3 ({ROPE_FACTORS})"
        )
    if ROPE_KINDS[kind] == "default" or factor in (0.0, 1.0):
        return RopeConfig(theta=theta)
    return RopeConfig(theta=theta, kind="linear", factor=factor)


def _llama3(file: GgufFile, theta: float, head_width: int) -> RopeConfig:
    """The scaling of Llama 3, of which the file has only what each frequency is divided by."""
    factors = file.read(ROPE_FACTORS).double().flatten()
    largest = float(factors.max())
    plain = RopeConfig(theta=theta)
    if largest == 1.0:
        return plain
    for original in ORIGINAL_POSITIONS:
        found = RopeConfig(
            theta=theta,
            kind="llama3",
            factor=float(f"{largest:.6g}"),
            low_freq_factor=LOW,
            high_freq_factor=HIGH,
            original_max_positions=original,
        )
        ours = inverse_frequencies(plain, head_width) / inverse_frequencies(found, head_width)
        if ours.shape == factors.shape and torch.allclose(ours.double(), factors, rtol=1e-4):
            return found
    raise UnsupportedModel(
        f"{file.path}: the factors in {ROPE_FACTORS} are not those of Llama 3's scaling with "
        f"low_freq_factor {LOW:g} and high_freq_factor {HIGH:g}; use its Hugging Face directory"
    )
