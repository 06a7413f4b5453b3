"""The model that a GGUF file describes: its keys as a `DecoderConfig`.

Names of architectures are llama.cpp's. Mistral and SmolLM2 go by the name of `llama` there. A shape is
read from keys and held against the tensors when these are loaded.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from linspec.checkpoints.gguf.architectures import architecture_of
from linspec.checkpoints.gguf.keys import Keys
from linspec.checkpoints.gguf.reader import GgufFile
from linspec.errors import CheckpointError, ConfigError, UnsupportedModel
from linspec.models.config import DecoderConfig

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
# texts of tokens with which a turn of a chat ends
TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|end_of_text|>")


def read_config(file: GgufFile) -> DecoderConfig:
    """The configuration of the decoder in `file`.

    Raises UnsupportedModel for an architecture that linspec does not know or cannot compute, and
    CheckpointError for keys that are missing or contradict each other.
    """
    keys = Keys(file)
    architecture = architecture_of(keys)
    try:
        return DecoderConfig(**_shape(keys) | _ids(keys) | architecture.read(keys))
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
    if layers < 1 or f"blk.{layers - 1}.attn_output.weight" not in file.tensors:
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
