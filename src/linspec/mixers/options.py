"""What can be set behind a mixer's name, such as aug:softmax or window:window=128: one dataclass a kind.

None is what `linspec linearize` takes for this mixer. Fields are named as in MixerConfig. A mixer of another
package may have further ones, which MixerConfig keeps in its `options`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from linspec.utils.options import option


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheOptions:
    """Of mixers that keep a cache."""

    taps: int | None = option("taps of the convolution over values; 0 is none", default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowOptions(CacheOptions):
    """Of mixers that keep the end of a cache."""

    window: int | None = option("tokens that mixer 'window' sees", default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupOptions(CacheOptions):
    """Of mixers that close groups."""

    group: int | None = option("tokens of a group", default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanOptions(GroupOptions):
    """Of mixers that see the last groups exactly."""

    span: int | None = option("groups that a token sees exactly", default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkOptions(SpanOptions):
    """Of mixers that also see the first tokens of a text."""

    sinks: int | None = option("first tokens that every token sees", default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearOptions(SpanOptions):
    """Of mixers that can be had in the grouped arrangement."""

    kernel: str | None = option(
        "weights of the exact part: own, softmax or relu2", default=None, short=True
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomFeatureOptions(LinearOptions):
    """Of mixers with random features."""

    features: int | None = option("random features", default=None)
    seed: int | None = option("of what is drawn at random", default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressionOptions(SpanOptions):
    """Of mixers that compress what has closed."""

    features: int | None = option("rows that a closed group becomes", default=None)
    keep: int | None = option("closed groups that are remembered", default=None)


def given(options: Any) -> dict[str, Any]:
    """The settings that a spec gave, as JSON has them."""
    every = {field.name: getattr(options, field.name) for field in fields(options)}
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in every.items()
        if value is not None
    }
