"""Bytes of cache that a step holds and reads, of a row of `benchmarks.long_context`.

    held, read = bytes_of(row)

Counted, not measured: where the row does not say what its states held, a state of each mixer is filled with
so many tokens, a head at a time; what the next token leaves unread follows from the options of the mixer.
"""

from __future__ import annotations

import functools
from typing import Any

from benchmarks.long_context_ways import Way, way_of
from linspec.checkpoints.delta import exact_heads
from linspec.checkpoints.hub import load_config
from linspec.decoding.step import StepInput
from linspec.mixers.config import MixerConfig
from linspec.mixers.exact_heads import read_exact
from linspec.mixers.paged import PagesOptions
from linspec.mixers.shadow import RANK, ShadowOptions
from linspec.mixers.specs import make_mixer
from linspec.mixers.tidal import Tidal, TidalOptions
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.models.lserve import is_lserve, lserve_options
from linspec.models.sparse import sparse_mixer
from linspec.state.registry import kv_of

Parts = list[tuple[int, MixerConfig]]


def bytes_of(row: dict[str, Any]) -> tuple[int, int]:
    """Bytes that are held behind the tokens of a row, and those of them that the next token reads."""
    if "read_bytes" in row:
        return row["state_bytes"], row["read_bytes"]
    way, length = way_of(row["way"]), row["length"]
    model = row.get("model") or way.model
    config = load_config(model)
    parts, kv = parts_of(way, model), kv_of("float32" if way.kv == "auto" else way.kv)
    held = row.get("state_bytes") or sum(
        count * held_bytes(mixer, kv, length, config.head_width) for count, mixer in parts
    )
    unread = sum(count * unread_bytes(mixer, kv, length, config) for count, mixer in parts)
    return held, held - unread


def parts_of(way: Way, model: str | None = None) -> Parts:
    """KV heads of the model by the mixer that they have: how many, and which."""
    config = load_config(model or way.model)
    total = config.layers * config.kv_heads
    plain = MixerConfig() if way.attention is None else None
    if way.attention is not None and is_lserve(way.attention):
        options = lserve_options(way.attention)
        wanted = read_exact(options.exact, config)
        count = wanted if isinstance(wanted, int) else sum(map(len, wanted))
        pages = make_mixer(f"pages:budget={options.budget}")
        return [(count, pages), (total - count, options.streaming)]
    exact = plain or sparse_mixer(str(way.attention))
    if exact.name == "tidal":
        layers = Tidal.for_layers(exact, config, config.layers)
        return [(config.kv_heads, layer) for layer in layers]
    others = [mixer for mixer in config.mixers if mixer.name not in ("softmax", "by-head")]
    count = exact_heads(config)
    return [(count, exact)] + ([(total - count, others[0])] if others else [])


@functools.cache
def held_bytes(mixer: MixerConfig, kv: str, length: int, width: int) -> int:
    """Bytes of the state of one KV head behind `length` tokens."""
    config = DecoderConfig(
        vocab_size=2,
        width=width,
        layers=1,
        heads=1,
        kv_heads=1,
        head_width=width,
        mlp_width=width,
        max_positions=length,
        mixers=(mixer,),
    )
    model = Decoder(config).eval().to_inference()
    state = model.new_state(1, kv if model.keeps_cache else "float")
    model.step([StepInput(0, [1] * length)], state)
    state.commit(0, range(length))
    return state.bytes(0)


def unread_bytes(mixer: MixerConfig, kv: str, length: int, config: DecoderConfig) -> int:
    """Bytes of one KV head's state that the next token does not read."""
    if mixer.name == "shadow":
        return _unread_of_shadow(mixer, length, config)
    near = mixer.span * mixer.group
    if mixer.name == "pages":
        rows = mixer.own_options(PagesOptions).budget + near
    elif mixer.name == "tidal" and not mixer.own_options(TidalOptions).selects:
        rows = mixer.own_options(TidalOptions).budget + near
    else:
        return 0
    return max(0, length - rows) * held_bytes(MixerConfig(), kv, 1, config.head_width)


def offloaded_bytes(row: dict[str, Any]) -> int:
    """Bytes of those that are held which `--offload` has in a file: the values of a shadow, in 16 bits."""
    way = way_of(row["way"])
    model = row.get("model") or way.model
    config = load_config(model)
    return sum(
        2 * count * _segments(mixer, row["length"]) * mixer.group * config.head_width
        for count, mixer in parts_of(way, model)
        if mixer.name == "shadow"
    )


def _segments(mixer: MixerConfig, length: int) -> int:
    """Segments of a shadow that are closed behind so many tokens."""
    return max(0, length // mixer.group - mixer.span + 1)


def _unread_of_shadow(mixer: MixerConfig, length: int, config: DecoderConfig) -> int:
    """As above, in 16 bits and with the values in memory: rows and factors of segments that are not read."""
    options, width = mixer.own_options(ShadowOptions), config.head_width
    segments = _segments(mixer, length)
    rank = min(options.rank or RANK, config.kv_heads * width, mixer.group)
    rows = max(
        0, segments * mixer.group - options.budget - segments * options.outliers * options.chunk
    )
    whole = max(0, segments - options.budget // options.chunk)
    return 2 * (rows * width + rows * rank // config.kv_heads + whole * rank * width)
