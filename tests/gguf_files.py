"""Small GGUF files: a writer of our own, and tiny random models of transformers written with it.

    path = write(folder / "x.gguf", keys, tensors)      # any keys and tensors, sound or not
    model, path = tiny("qwen2", folder, "Q8_0")         # transformers' model with the file's values

The names and the order of llama's q and k rows are those of llama.cpp's converter, written down here once
more: the reader is held against transformers, not against itself.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from transformers import AutoConfig, AutoModelForCausalLM

from linspec.checkpoints.gguf.types import TYPES

IDS = {kind.name: number for number, kind in TYPES.items()}
ALIGNMENT = 32
WIDTH = 256
# number of a type, and how struct packs it
_SCALARS = {bool: (7, "<B"), float: (6, "<f"), int: (4, "<I")}
_ELEMENTS = {"i": (5, "<i4"), "f": (6, "<f4"), "b": (7, "u1"), "u": (4, "<u4")}
_BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up",
    "attention.query_key_value": "attn_qkv",
    "attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
    "self_attn.q_layernorm": "attn_q_norm",
    "self_attn.k_layernorm": "attn_k_norm",
}
# where the norm behind attention is one of its output, not of the MLP's input
_BEHIND = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_SANDWICHED = ("gemma2", "gemma3_text", "olmo2")
_GEMMA = ("gemma2", "gemma3_text")
# whose q and k rows lie in the order of rotary pairs
_PAIRS = ("llama", "mistral", "smollm3", "granite")
ARCHITECTURE_OF = {"mistral": "llama", "gemma3_text": "gemma3", "gpt_neox": "gptneox"}
_WHOLE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "gpt_neox.embed_in": "token_embd",
    "gpt_neox.final_layer_norm": "output_norm",
}


def packed(value: Any) -> bytes:
    """A value with its type in front."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + string(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(string, value))
    if isinstance(value, np.ndarray):
        number, kind = _ELEMENTS[value.dtype.kind]
        return struct.pack("<IIQ", 9, number, len(value)) + value.astype(kind).tobytes()
    number, kind = _SCALARS[type(value)]
    return struct.pack("<I", number) + struct.pack(kind, value)


def string(text: str) -> bytes:
    """A string with its length in front."""
    return struct.pack("<Q", len(text.encode())) + text.encode()


def written(
    keys: Mapping[str, Any], tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]]
) -> bytes:
    """The bytes of a file; a tensor is its format, its shape [out, in] and its bytes."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    head += b"".join(string(name) + packed(value) for name, value in keys.items())
    data = b""
    for name, (kind, shape, content) in tensors.items():
        dims = struct.pack(f"<{len(shape)}Q", *shape[::-1])
        head += string(name) + struct.pack("<I", len(shape)) + dims
        head += struct.pack("<IQ", IDS[kind], len(data))
        data += content + bytes(-len(content) % ALIGNMENT)
    return head + bytes(-len(head) % ALIGNMENT) + data


def write(path: Path, keys: Mapping[str, Any], tensors: Mapping[str, Any]) -> Path:
    """A file with these keys and tensors."""
    path.write_bytes(written(keys, tensors))
    return path


def byte_words() -> dict[str, Any]:
    """A byte-level tokenizer with a few pairs, as keys."""
    from tokenizers import pre_tokenizers

    pairs = [("a", "b"), ("c", "d"), ("ab", "cd"), ("e", "n"), ("en", "d"), ("Ġ", "t")]
    tokens = ["<|end|>", "<|start|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += ["".join(pair) for pair in pairs] + ["<tool>"]
    kinds = [3, 3] + [1] * (len(tokens) - 3) + [4]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in pairs],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
    }


def sentence_words(**changes: Any) -> dict[str, Any]:
    """SentencePiece's kind: bytes, letters, and two hundred longer pieces by score."""
    rng = random.Random(3)
    letters = "▁abcdeghinorst.,é日"
    longer: dict[str, None] = {}
    while len(longer) < 200:
        pair = [rng.choice([*letters, *longer]) for _ in range(2)]
        if len(piece := "".join(pair)) < 9 and not piece.endswith("▁"):
            longer[piece] = None
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(letters) + len(longer))
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(letters) + len(longer))]
    # pieces that are made last have the lowest scores, letters are given
    found = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*tokens, *longer, *letters],
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
    }
    return found | changes


# settings of a family that its files tell, and that differ from what is usual
_OWN: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 64},
    "gemma2": {
        "head_dim": 64,
        "query_pre_attn_scalar": 64,
        "sliding_window": 6,
        "attn_logit_softcapping": 0.5,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        "head_dim": 64,
        "query_pre_attn_scalar": 64,
        "sliding_window": 6,
        "num_hidden_layers": 7,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 5e4, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "smollm3": {"num_hidden_layers": 5},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.25,
        "attention_multiplier": 0.125,
        "logits_scaling": 4.0,
    },
    "starcoder2": {"norm_epsilon": 3e-6, "tie_word_embeddings": True},
    "stablelm": {"layer_norm_eps": 3e-6, "partial_rotary_factor": 0.25, "use_qkv_bias": True},
    # files have no base of the frequencies
    "gpt_neox": {
        "layer_norm_eps": 3e-6,
        "rotary_pct": 0.25,
        "rotary_emb_base": 1e4,
        "num_key_value_heads": 8,
    },
    "phi3": {"partial_rotary_factor": 0.75},
}


def hf_config(family: str, **changes: Any) -> Any:
    """A tiny configuration in which no two sizes that could be mixed up are equal."""
    shared = {"vocab_size": 288, "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": None}
    if family == "gpt2":
        sizes = {"n_embd": WIDTH, "n_layer": 3, "n_head": 4, "n_positions": 96}
    else:
        sizes = {
            "hidden_size": WIDTH,
            "intermediate_size": 512,
            "num_hidden_layers": 3,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "max_position_embeddings": 96,
            "rms_norm_eps": 3e-6,
            "rope_theta": 5e4,
            "tie_word_embeddings": family in ("qwen2", "smollm3", *_GEMMA),
        }
        sizes |= _OWN.get(family, {})
    return AutoConfig.for_model(family, **shared | sizes | changes)


def tiny(family: str, path: Path, kind: str = "F32", **changes: Any) -> tuple[Any, Path]:
    """A random model of transformers whose weights are the values in the GGUF file beside it."""
    config = hf_config(family, **changes)
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config).eval()
    tensors = {}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # norms and biases of a new model are ones and zeros, which hide mistakes
            weight.add_(torch.randn_like(weight) * 0.05)
            stored, back = _stored(_as_gguf(name, weight, family, config), kind)
            weight.copy_(_as_hf(name, back, family, config))
            tensors[_renamed(name, family)] = stored
    tensors = _stacked(tensors)
    if getattr(config, "rope_parameters", {}).get("rope_type") == "llama3":
        factors = _rope_factors(model, config)
        tensors["rope_freqs.weight"] = ("F32", factors.shape, factors.tobytes())
    if getattr(config, "rope_parameters", {}).get("rope_type") == "longrope":
        for length in ("long", "short"):
            factors = np.array(config.rope_parameters[f"{length}_factor"], np.float32)
            tensors[f"rope_factors_{length}.weight"] = ("F32", factors.shape, factors.tobytes())
    return model, write(path, {**_keys(family, config), **byte_words()}, tensors)


def _stacked(tensors: dict[str, Any]) -> dict[str, Any]:
    """Norms of single heads as the rows of one tensor."""
    found: dict[str, Any] = {}
    for name, (kind, shape, content) in tensors.items():
        whole, each, _ = name.partition(".norms.")
        if not each:
            found[name] = (kind, shape, content)
            continue
        _, rows, before = found.get(f"{whole}.weight", (kind, (0,), b""))
        found[f"{whole}.weight"] = (kind, (rows[0] + 1, *shape), before + content)
    return found


def _renamed(name: str, family: str) -> str:
    stem, _, end = name.rpartition(".")
    if stem in _WHOLE:
        return f"{_WHOLE[stem]}.{end}"
    _, _, layer, part = stem.split(".", 3)
    part, each, head = part.partition(".norms.")
    names = _BLOCK | (_BEHIND if family in _SANDWICHED else {})
    return f"blk.{layer}.{names[part]}{each}{head}.{end}"


def _conv(name: str, family: str) -> bool:
    return family == "gpt2" and any(part in name for part in (".c_attn.", ".c_proj.", ".c_fc."))


def _heads(name: str, config: Any) -> int:
    if ".q_proj." in name:
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if ".k_proj." in name else 0


def _as_gguf(name: str, weight: torch.Tensor, family: str, config: Any) -> np.ndarray:
    array = weight.detach().numpy()
    if _conv(name, family) and array.ndim == 2:
        return np.ascontiguousarray(array.T)
    if family in _GEMMA and "norm." in name:
        return array + np.float32(1)
    if ".query_key_value." in name:
        parts = array.reshape(config.num_attention_heads, 3, -1, *array.shape[1:])
        return np.ascontiguousarray(parts.swapaxes(0, 1).reshape(array.shape))
    heads = _heads(name, config) if family in _PAIRS else 0
    if heads:
        halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))
    return np.ascontiguousarray(array)


def _as_hf(name: str, array: np.ndarray, family: str, config: Any) -> torch.Tensor:
    if _conv(name, family) and array.ndim == 2:
        array = array.T
    if family in _GEMMA and "norm." in name:
        return torch.from_numpy(array - np.float32(1))
    if ".query_key_value." in name:
        parts = array.reshape(3, config.num_attention_heads, -1, *array.shape[1:])
        array = parts.swapaxes(0, 1).reshape(array.shape)
    heads = _heads(name, config) if family in _PAIRS else 0
    if heads:
        pairs = array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
        array = pairs.swapaxes(1, 2).reshape(array.shape)
    return torch.from_numpy(np.array(array))


def _stored(array: np.ndarray, kind: str) -> tuple[tuple[str, tuple[int, ...], bytes], np.ndarray]:
    """A tensor as it is stored, and the values that were stored; 1-d tensors stay as they are."""
    if array.ndim == 1 or kind == "F32":
        return ("F32", array.shape, array.astype("<f4").tobytes()), array
    blocks = TYPES[IDS[kind]]
    number = GGMLQuantizationType(IDS[kind])
    try:
        raw = quantize(array.astype(np.float32), number)
    except NotImplementedError:
        size = (array.shape[0], array.shape[1] // blocks.block * blocks.bytes)
        # small bytes: scales of every layout are then finite and small
        raw = np.random.default_rng(array.size).integers(0, 0x29, size, np.uint8)
    back = dequantize(raw, number).reshape(array.shape)
    return (kind, array.shape, raw.tobytes()), back


def _rope_factors(model: Any, config: Any) -> np.ndarray:
    size = config.hidden_size // config.num_attention_heads
    theta = config.rope_parameters["rope_theta"]
    plain = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    return (plain / model.model.rotary_emb.inv_freq.double()).float().numpy()


def _keys(family: str, config: Any) -> dict[str, Any]:
    arch = ARCHITECTURE_OF.get(family, family)
    found: dict[str, Any] = {"general.architecture": arch, "general.name": "tiny"}
    if family == "gpt2":
        sizes: dict[str, Any] = {
            "block_count": config.n_layer,
            "context_length": config.n_positions,
            "embedding_length": config.n_embd,
            "feed_forward_length": 4 * config.n_embd,
            "attention.head_count": config.n_head,
            "attention.layer_norm_epsilon": config.layer_norm_epsilon,
        }
        return found | {f"{arch}.{name}": value for name, value in sizes.items()}
    sizes = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": getattr(
            config, "num_key_value_heads", config.num_attention_heads
        ),
        **_norm_keys(config),
        **_rope_keys(family, config),
        **_own_keys(family, config),
    }
    if getattr(config, "head_dim", None) and family not in ("llama", "mistral", "qwen2"):
        sizes |= {
            "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim,
        }
    if family in ("mistral", "starcoder2", "phi3", *_GEMMA) and config.sliding_window:
        sizes["attention.sliding_window"] = config.sliding_window
    return found | {f"{arch}.{name}": value for name, value in sizes.items()}


def _norm_keys(config: Any) -> dict[str, Any]:
    for name in ("norm_epsilon", "layer_norm_eps"):
        if hasattr(config, name):
            return {"attention.layer_norm_epsilon": getattr(config, name)}
    return {"attention.layer_norm_rms_epsilon": config.rms_norm_eps}


def _rope_keys(family: str, config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    found: dict[str, Any] = {}
    if family != "gpt_neox":
        found["rope.freq_base"] = float(rope["rope_theta"])
    if family in ("stablelm", "gpt_neox", "phi3"):
        width = config.hidden_size // config.num_attention_heads
        found["rope.dimension_count"] = int(width * rope["partial_rotary_factor"])
    if rope["rope_type"] in ("linear", "yarn"):
        found |= {
            "rope.scaling.type": rope["rope_type"],
            "rope.scaling.factor": float(rope["factor"]),
        }
    if rope["rope_type"] in ("yarn", "longrope"):
        original = rope["original_max_position_embeddings"]
        found["rope.scaling.original_context_length"] = original
    if rope["rope_type"] == "longrope":
        grown = np.log(config.max_position_embeddings / original) / np.log(original)
        found["rope.scaling.attn_factor"] = float(np.sqrt(1 + max(0.0, grown)))
    return found


def _own_keys(family: str, config: Any) -> dict[str, Any]:
    if family == "gemma2":
        return {
            "attn_logit_softcapping": config.attn_logit_softcapping,
            "final_logit_softcapping": config.final_logit_softcapping,
        }
    if family == "gemma3_text" and config.final_logit_softcapping:
        return {"final_logit_softcapping": config.final_logit_softcapping}
    if family == "granite":
        return {
            "attention.scale": config.attention_multiplier,
            "embedding_scale": config.embedding_multiplier,
            "residual_scale": config.residual_multiplier,
            "logit_scale": config.logits_scaling,
        }
    if family in ("stablelm", "gpt_neox"):
        return {"use_parallel_residual": config.use_parallel_residual}
    return {}
