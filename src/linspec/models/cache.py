"""Which rows of a model's state are kept as 8-bit codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from linspec.errors import ConfigError
from linspec.mixers.base import Mixer
from linspec.quantization.rows import check_kv
from linspec.state.row_state import RowSpec


def row_specs(mixers: Sequence[Mixer], kv: str) -> list[RowSpec]:
    """The rows that `mixers` keep, softmax caches as `kv` says ('float' or 'int8').

    Rows of groups stay floats: they are few, and they are summed. Raises ConfigError for 'int8' when
    there is no cache.
    """
    check_kv(kv)
    specs = [mixer.row_spec() for mixer in mixers]
    if kv == "float":
        return specs
    if all(spec.group for spec in specs):
        raise ConfigError(
            "no layer of this model keeps a softmax cache, so there is nothing to keep as int8; "
            "leave out kv_cache_dtype (--kv-cache-dtype)"
        )
    return [spec if spec.group else replace(spec, quantized=True) for spec in specs]
