"""Rotary positions as Hugging Face configurations name them, both ways."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from linspec.errors import UnsupportedModel
from linspec.mixers.rope_config import RopeConfig
from linspec.utils.sizes import check_positive

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_ORIGINAL = {"original_max_position_embeddings": "original_max_positions"}
# numbers of each kind, in configurations and here; those of _OPTIONAL may be left out
ROPE_FIELDS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        **_ORIGINAL,
    },
    "yarn": {
        "factor": "factor",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "truncate": "truncate",
        "attention_factor": "attention_factor",
        **_ORIGINAL,
    },
    "longrope": {
        "factor": "factor",
        "short_factor": "short_factors",
        "long_factor": "long_factors",
        "attention_factor": "attention_factor",
        **_ORIGINAL,
    },
}
_OPTIONAL = ("beta_fast", "beta_slow", "truncate", "attention_factor", "factor")


def may_lack(kind: str, key: str) -> bool:
    """Whether a number of this kind may be left out, because it follows from others."""
    return kind in ("yarn", "longrope") and key in _OPTIONAL


def read_rope(
    hf: PreTrainedConfig, *, partial: bool = False, data: Mapping[str, Any] | None = None
) -> RopeConfig:
    """The rotary positions of a configuration, or those that `data` of it describes.

    partial: whether the family's own code turns a part of each head where the configuration says so.
    """
    data = hf.rope_parameters if data is None else data
    kind = data.get("rope_type", "default")
    if kind not in ROPE_FIELDS:
        raise UnsupportedModel(
            f"rope scaling {kind!r} is not supported; supported: {', '.join(ROPE_FIELDS)}"
        )
    share = data.get("partial_rotary_factor", 1.0)
    if share != 1.0 and not partial:
        raise UnsupportedModel(
            f"partial_rotary_factor {share} is not supported; models of this family turn whole heads (1.0)"
        )
    check_positive("rope_theta", data["rope_theta"])
    return RopeConfig(
        theta=float(data["rope_theta"]),
        kind=kind,
        partial_rotary_factor=share,
        **_numbers(kind, data, hf.max_position_embeddings),
    )


def _numbers(kind: str, data: Mapping[str, Any], longest: int) -> dict[str, Any]:
    """The numbers of one kind of scaling, with what transformers derives where one is left out."""
    found = {
        ours: data[theirs]
        for theirs, ours in ROPE_FIELDS[kind].items()
        if not may_lack(kind, theirs) or data.get(theirs) is not None
    }
    if kind in ("yarn", "longrope"):
        original = found["original_max_positions"]
        check_positive("original_max_position_embeddings", original)
        found.setdefault("factor", longest / original)
        check_positive("factor", found["factor"])
        factors = _yarn_attention(data) if kind == "yarn" else _longrope_attention(original)
        found.setdefault("attention_factor", factors(found["factor"]))
    if kind == "longrope":
        found["short_factors"] = tuple(found["short_factors"])
        found["long_factors"] = tuple(found["long_factors"])
        found["long"] = longest > found["original_max_positions"]
    return found


def _yarn_attention(data: Mapping[str, Any]) -> Any:
    scale, of_all = data.get("mscale"), data.get("mscale_all_dim")

    def grown(factor: float, scale: float = 1.0) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if scale and of_all:
        return lambda factor: grown(factor, scale) / grown(factor, of_all)
    return grown


def _longrope_attention(original: int) -> Any:
    return lambda factor: (
        math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    )


def rope_parameters(rope: RopeConfig) -> dict[str, Any]:
    """What `rope_parameters` of a configuration says."""
    fields = {theirs: getattr(rope, ours) for theirs, ours in ROPE_FIELDS[rope.kind].items()}
    lists = {name: list(value) for name, value in fields.items() if isinstance(value, tuple)}
    found = {"rope_theta": rope.theta, "rope_type": rope.kind, **fields, **lists}
    if rope.partial_rotary_factor != 1.0:
        found["partial_rotary_factor"] = rope.partial_rotary_factor
    return found


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """In the style of transformers 5 and in that of older readers, which mean the same."""
    given = rope_parameters(rope)
    written = {"rope_parameters": given, "rope_theta": rope.theta}
    scaling = {
        name: given[name] for name in given if name not in ("rope_theta", "partial_rotary_factor")
    }
    if rope.partial_rotary_factor != 1.0:
        written["partial_rotary_factor"] = rope.partial_rotary_factor
    return written | ({"rope_scaling": scaling} if ROPE_FIELDS[rope.kind] else {})
