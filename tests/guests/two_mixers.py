"""A guest: one layer whose KV heads have two mixers. State and step of each, in one call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from linspec import MIXERS, ConfigError, Mixer


@MIXERS.register(
    "guest-two-mixers",
    summary="softmax for the first KV head of a layer, grouped attention for the others",
    paper="Xiao et al. 2024 (DuoAttention), arXiv 2410.10819",
    state="2·T·d for the first KV head, as `grouped` for each other",
    cost="2·T·d for the first KV head, as `grouped` for each other",
)
class TwoMixers(Mixer):
    """The layer's projections and norms are its own; its parts have none."""

    def __init__(self, config: Any, mixer: Any) -> None:
        super().__init__(config, mixer)
        if config.kv_heads < 2 or mixer.taps:
            raise ConfigError("mixer 'guest-two-mixers' needs two KV heads or more, and no taps")
        self.counts = (1, config.kv_heads - 1)
        self.parts = nn.ModuleList(
            self._part(name, count)
            for name, count in zip(("softmax", "grouped"), self.counts, strict=True)
        )

    def _part(self, name: str, count: int) -> Mixer:
        """A mixer of `count` KV heads without projections."""
        config = replace(self.config, heads=count * self.repeats, kv_heads=count, qk_norm=False)
        part = MIXERS[name](config, replace(self.mixer, name=name))
        for projection in ("q", "k", "v", "o"):
            delattr(part, projection)
        return part

    def state_makers(self) -> Any:
        return tuple(self.parts)

    def forward(self, x: torch.Tensor, rope: Any, real: torch.Tensor | None = None) -> torch.Tensor:
        mixed = []
        for part, features in self._shared_out(x, rope):
            q, k, v = (each.transpose(1, 2) for each in features)
            mixed.append(part.mix(q, k, v).transpose(1, 2))
        return self.o(torch.cat(mixed, dim=2).flatten(2))

    def step(
        self, x: torch.Tensor, rope: Any, dense_groups: Sequence[Any], state: Any, layer: int
    ) -> torch.Tensor:
        places = zip(self._shared_out(x, rope), state.parts, strict=True)
        mixed = [
            part.step_heads(features, dense_groups, *place) for (part, features), place in places
        ]
        return self.o(torch.cat(mixed, dim=1))

    def _shared_out(self, x: torch.Tensor, rope: Any) -> Iterator[tuple[Any, Any]]:
        """Each part with its features of x [..., D]."""
        both, v = self.split_heads(x)
        q, k = both.split((self.heads, self.kv_heads), dim=-2)
        q = q.unflatten(-2, (self.kv_heads, self.repeats))
        pieces = (q.split(self.counts, dim=-3), k.split(self.counts, -2), v.split(self.counts, -2))
        for part, own_q, own_k, own_v in zip(self.parts, *pieces, strict=True):
            own = torch.cat((own_q.flatten(-3, -2), own_k), dim=-2)
            yield part, part.to_features(own, own_v, rope)
