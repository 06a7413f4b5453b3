"""The numbers of a config.json, held against their types before transformers reads them.

transformers takes some texts for numbers, and fails at others without a word about which entry it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from linspec.checkpoints.families.ropes import ROPE_FIELDS, may_lack
from linspec.checkpoints.families.shared import LAYER_TYPES
from linspec.errors import ConfigError
from linspec.utils.messages import quoted
from linspec.utils.sizes import check_positive

# transformers derives it where it is left out
_ORIGINAL = "original_max_position_embeddings"
_ROPES = ("rope_parameters", "rope_scaling")
# of one kind of rotary positions, where older files have them beside the others
_NUMBERS = (
    *("rope_theta", "rope_local_base_freq", "rotary_emb_base"),
    *("partial_rotary_factor", "rotary_pct", _ORIGINAL),
    *("mscale", "mscale_all_dim"),
    *(key for fields in ROPE_FIELDS.values() for key in fields if not key.startswith("trunc")),
)
_LISTS = ("short_factor", "long_factor")
# which layers are of another kind than the others: every n-th one
_INTERVALS = ("no_rope_layer_interval", "sliding_window_pattern")
_FACTORS = (
    *("final_logit_softcapping", "attn_logit_softcapping", "query_pre_attn_scalar"),
    *("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"),
)


def check_given(data: Mapping[str, Any]) -> None:
    """Raise ConfigError for the first number that is none; what is null or left out is not asked about."""
    _check_numbers("", data)
    for key in _ROPES:
        _check_rope(key, data.get(key))
    for key in _INTERVALS:
        value = data.get(key)
        if value is not None and (type(value) is not int or not value):
            raise ConfigError(
                f"{key} must be a whole number other than 0, got {quoted(value)}; leave it out for that of "
                "the family"
            )
    for key in _FACTORS:
        if data.get(key) is not None:
            check_positive(key, data[key])


def _check_rope(where: str, given: object) -> None:
    """Check the settings of rotary positions, or of one kind for each type of layers."""
    if given is None:
        return
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"{where} must be an object such as {{'rope_type': 'default', 'rope_theta': 10000.0}}, got "
            f"{quoted(given)}"
        )
    by_layer = given.keys() & set(LAYER_TYPES.values())
    for key in sorted(by_layer):
        _check_rope(f"{where}.{key}", given[key])
    _check_numbers(f"{where}.", given)
    kind = given.get("rope_type", given.get("type"))
    for key in ROPE_FIELDS.get(kind, {}) if isinstance(kind, str) else ():
        if key not in given and key != _ORIGINAL and not may_lack(kind, key):
            raise ConfigError(f"{where}.{key} is missing, which scaling {kind!r} needs; add it")


def _check_numbers(where: str, given: Mapping[str, Any]) -> None:
    for key in _NUMBERS:
        value = given.get(key)
        listed = key in _LISTS
        if value is not None and not (_are_numbers(value) if listed else _is_number(value)):
            rule = "a list of numbers" if listed else "a number"
            raise ConfigError(
                f"{where}{key} must be {rule}, got {quoted(value)}; write numbers without quotes"
            )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_numbers(value: object) -> bool:
    return isinstance(value, list) and all(_is_number(each) for each in value)
