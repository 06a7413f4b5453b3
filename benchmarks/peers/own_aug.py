"""linspec with the linear mixer `aug` in every layer: groups of 64, two of them exact, 32 taps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.peers.base import Format, Peer
from benchmarks.peers.own import Own

if TYPE_CHECKING:
    from linspec.mixers.config import MixerConfig


class OwnAug(Own):
    """Its state does not grow, so no byte of a cache counts."""

    name = "linspec-aug"
    formats = (
        Format(name="float32", bits=32, weight_bytes=4, cache_bytes=0),
        Format(name="int8", bits=8, weight_bytes=1, cache_bytes=0),
        Format(name="int4", bits=4, weight_bytes=0.5 + 2 / 32, cache_bytes=0),
    )

    def mixer(self) -> MixerConfig | None:
        from linspec.mixers.config import MixerConfig

        return MixerConfig(name="aug", group=64, span=2, kernel="softmax", taps=32)


PEER: Peer = OwnAug()
