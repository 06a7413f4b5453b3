"""Rotary positions as the keys and tensors of a GGUF file describe them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from linspec.checkpoints.gguf.keys import Keys
from linspec.checkpoints.gguf.reader import GgufFile
from linspec.errors import CheckpointError, UnsupportedModel
from linspec.mixers.rope import inverse_frequencies
from linspec.mixers.rope_config import RopeConfig

ROPE_FACTORS = "rope_freqs.weight"
# divisors of the frequencies in texts up to the original length, and in longer ones
SHORT_FACTORS, LONG_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"
ROPE_TENSORS = frozenset({ROPE_FACTORS, SHORT_FACTORS, LONG_FACTORS})
ROPE_KINDS = ("none", "linear", "yarn")
# the only numbers that llama3 scaling has been trained with
LOW, HIGH = 1.0, 4.0
ORIGINAL_POSITIONS = tuple(2**power for power in range(5, 22))


def head_width_of(keys: Keys) -> int:
    """Features of a head."""
    heads, width = keys.whole("arch.attention.head_count"), keys.whole("arch.embedding_length")
    return keys.whole("arch.attention.key_length", width // heads)


def read_rope(keys: Keys, *, partial: bool = False) -> RopeConfig:
    """The rotary positions; partial: whether the architecture may turn a part of each head."""
    head_width = head_width_of(keys)
    turned = keys.whole("arch.rope.dimension_count", head_width)
    if head_width % 2 or turned > head_width or (turned != head_width and not partial):
        raise UnsupportedModel(
            f"{keys.file.path} turns {turned} of {head_width} features of a head; in an architecture "
            f"{keys.architecture!r} linspec turns whole heads of an even width"
        )
    plain = RopeConfig(theta=keys.real("arch.rope.freq_base", 10_000.0))
    if turned != head_width:
        plain = replace(plain, partial_rotary_factor=share_of(turned, head_width))
    if ROPE_FACTORS in keys.file.tensors:
        return _llama3(keys.file, plain, head_width)
    if {SHORT_FACTORS, LONG_FACTORS} & keys.file.tensors.keys():
        return replace(plain, **_longrope(keys))
    return replace(plain, **_scaling(keys))


def share_of(turned: int, head_width: int) -> float:
    """The share of a head that is `turned` features of it."""
    share = turned / head_width
    # a quotient that was rounded down would turn one feature less
    return share if int(head_width * share) == turned else math.nextafter(share, 1)


def _scaling(keys: Keys) -> dict[str, Any]:
    factor = keys.real("arch.rope.scaling.factor", 1.0)
    kind = keys.text("arch.rope.scaling.type", "linear")
    if kind not in ROPE_KINDS:
        raise UnsupportedModel(
            f"{keys.file.path}: rope scaling {kind!r} is not supported; supported: "
            f"{', '.join(ROPE_KINDS)}, and those of Llama 3 ({ROPE_FACTORS}) and Phi-3 ({LONG_FACTORS})"
        )
    if kind == "none" or factor in (0.0, 1.0):
        return {}
    if kind == "linear":
        return {"kind": "linear", "factor": factor}
    # llama.cpp multiplies the key by what the factor alone gives
    grown = 1 + 0.1 * math.log(max(1.0, factor))
    return {
        "kind": "yarn",
        "factor": factor,
        "original_max_positions": keys.whole("arch.rope.scaling.original_context_length"),
        "beta_fast": keys.real("arch.rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": keys.real("arch.rope.scaling.yarn_beta_slow", 1.0),
        "attention_factor": keys.real("arch.rope.scaling.attn_factor", 1.0) * grown,
    }


def _longrope(keys: Keys) -> dict[str, Any]:
    file = keys.file
    for name in (SHORT_FACTORS, LONG_FACTORS):
        if name not in file.tensors:
            raise CheckpointError(
                f"{file.path} lacks {name}, a half of its rope scaling; convert the model again"
            )
    original = keys.whole("arch.rope.scaling.original_context_length")
    longest = keys.whole("arch.context_length")
    return {
        "kind": "longrope",
        "factor": longest / max(1, original),
        "original_max_positions": original,
        "attention_factor": keys.real("arch.rope.scaling.attn_factor", 1.0),
        "short_factors": tuple(file.read(SHORT_FACTORS).flatten().tolist()),
        "long_factors": tuple(file.read(LONG_FACTORS).flatten().tolist()),
        "long": longest > original,
    }


def _llama3(file: GgufFile, plain: RopeConfig, head_width: int) -> RopeConfig:
    """The scaling of Llama 3, of which the file has only what each frequency is divided by."""
    factors = file.read(ROPE_FACTORS).double().flatten()
    largest = float(factors.max())
    if largest == 1.0:
        return plain
    for original in ORIGINAL_POSITIONS:
        found = replace(
            plain,
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
