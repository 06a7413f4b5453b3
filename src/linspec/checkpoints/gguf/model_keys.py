"""The keys of a GGUF file for a decoder, under llama.cpp's names: what `config` reads, written.

Whatever these keys cannot say is refused by name. `check_said` holds the keys against the configuration by
reading them as a file is read, so a setting that is new in linspec is never left out in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from linspec.checkpoints.families import known as families
from linspec.checkpoints.gguf.architectures import ARCHITECTURES, Architecture
from linspec.checkpoints.gguf.config import read_config
from linspec.checkpoints.gguf.reader import GgufFile
from linspec.checkpoints.gguf.ropes import ROPE_FACTORS
from linspec.errors import UnsupportedModel
from linspec.mixers.config import MixerConfig
from linspec.mixers.rope import inverse_frequencies
from linspec.mixers.rope_config import RopeConfig
from linspec.models.config import DecoderConfig

# family -> llama.cpp's architecture
WRITTEN = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gpt2": "gpt2",
}
# tensors of biases that llama.cpp reads
BIASES = {"qwen2": ("qkv_bias",), "qwen3": (), "gpt2": ("qkv_bias", "out_bias", "mlp_bias")}
# the tokenizer's keys say these, as far as a file can
_IDS = ("bos_id", "eos_ids", "pad_id")


@dataclass(frozen=True, slots=True)
class PlannedFile(GgufFile):
    """A file that is not written yet, for those who read one; `values` has the tensors that they look at."""

    values: dict[str, np.ndarray]

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a tensor; those of a matrix are its name, so no two are equal."""
        found = self.values.get(name, np.frombuffer(name.encode(), np.uint8))
        return found.view(np.uint8).copy()


def model_keys(config: DecoderConfig, source: Path) -> dict[str, Any]:
    """Keys and values for `config`; raises UnsupportedModel for a model that no GGUF file can hold."""
    _check_mixers(config, source)
    if config.family not in WRITTEN or families.family_of(config) is None:
        raise UnsupportedModel(
            f"{source} is of the family {config.family!r} in a form that linspec cannot write as GGUF; it "
            f"writes ordinary models of {', '.join(WRITTEN)}"
        )
    _check_biases(config, source)
    arch = WRITTEN[config.family]
    sizes: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_positions,
        "embedding_length": config.width,
        "block_count": config.layers,
        "feed_forward_length": config.mlp_width,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        **_OWN.get(arch, _gated)(config),
    }
    return {
        "general.architecture": arch,
        "general.type": "model",
        **{f"{arch}.{name}": value for name, value in sizes.items()},
    }


def architecture_for(config: DecoderConfig) -> Architecture:
    """The names and the order of rows in the file of a model that `model_keys` takes."""
    return ARCHITECTURES[WRITTEN[config.family]]


def rope_factors(config: DecoderConfig) -> dict[str, np.ndarray]:
    """The tensor that says what the scaling of Llama 3 divides each frequency by, where there is one."""
    rope = config.rope
    if config.positions != "rope" or rope.kind != "llama3":
        return {}
    plain = inverse_frequencies(RopeConfig(theta=rope.theta), config.head_width)
    ours = inverse_frequencies(rope, config.head_width)
    return {ROPE_FACTORS: (plain.double() / ours.double()).to(torch.float32).numpy()}


def check_said(config: DecoderConfig, file: PlannedFile, source: Path) -> None:
    """Raise UnsupportedModel unless the keys of `file` are read as `config`."""
    found, wanted = _comparable(read_config(file)), _comparable(config)
    lost = [
        f"{each.name} {getattr(wanted, each.name)!r} (read back as {getattr(found, each.name)!r})"
        for each in fields(wanted)
        if getattr(found, each.name) != getattr(wanted, each.name) and each.name not in _IDS
    ]
    if lost:
        raise UnsupportedModel(
            f"{source} has settings that its GGUF file would not say: {'; '.join(lost)}; use its Hugging "
            "Face directory"
        )


def _check_mixers(config: DecoderConfig, source: Path) -> None:
    names = dict.fromkeys(mixer.name for mixer in config.mixers)
    strange = [name for name in names if name not in ("softmax", "window")]
    if strange:
        raise UnsupportedModel(
            f"{source} has the mixers {', '.join(strange)}; a GGUF file has no tensors or keys for them, "
            "and llama.cpp computes softmax attention only. Convert the model that it was made from"
        )
    windows = {mixer.window for mixer in config.mixers if mixer.name == "window"}
    if windows and (config.family != "mistral" or len(names) > 1 or len(windows) > 1):
        raise UnsupportedModel(
            f"{source}: a {config.family} whose layers see windows of {sorted(windows)} tokens is not "
            "supported in GGUF files; use its Hugging Face directory"
        )


def _check_biases(config: DecoderConfig, source: Path) -> None:
    there = [name for name in ("qkv_bias", "out_bias", "mlp_bias") if getattr(config, name)]
    known = BIASES.get(config.family)
    if known is not None and there != list(known):
        raise UnsupportedModel(
            f"{source}: a {config.family} with the biases {there or 'none'} has no GGUF form; llama.cpp "
            f"reads {list(known) or 'none'} of this family"
        )


def _gated(config: DecoderConfig) -> dict[str, Any]:
    """RMS norms and rotary positions."""
    rope = config.rope
    windows = {mixer.window for mixer in config.mixers if mixer.name == "window"}
    scaling = {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope.factor)}
    return {
        "attention.key_length": config.head_width,
        "attention.value_length": config.head_width,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "rope.dimension_count": config.head_width,
        "rope.freq_base": float(rope.theta),
        **(scaling if rope.kind == "linear" else {}),
        **({"attention.sliding_window": max(windows)} if windows else {}),
    }


def _gpt2(config: DecoderConfig) -> dict[str, Any]:
    return {"attention.layer_norm_epsilon": float(config.norm_eps)}


_OWN: dict[str, Callable[[DecoderConfig], dict[str, Any]]] = {"gpt2": _gpt2}


def _comparable(config: DecoderConfig) -> DecoderConfig:
    """`config` with what files cannot tell apart made alike: Llama and Mistral, and digits beyond float32."""
    windows = any(mixer.name == "window" for mixer in config.mixers)
    family = "llama" if config.family == "mistral" and not windows else config.family
    mixers = tuple(MixerConfig(name=m.name, window=m.window) for m in config.mixers)
    numbers = {each.name: getattr(config.rope, each.name) for each in fields(config.rope)}
    rounded: dict[str, Any] = {n: _rounded(v) for n, v in numbers.items() if type(v) is float}
    rope = replace(config.rope, **rounded)
    return replace(
        config, family=family, mixers=mixers, rope=rope, norm_eps=_rounded(config.norm_eps)
    )


def _rounded(number: float) -> float:
    return float(str(np.float32(number)))
