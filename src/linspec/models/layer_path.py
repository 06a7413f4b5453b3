"""The way of a step through the layers: all of them or some, and those whose states are handed out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch

from linspec.decoding.step import StepInput


@dataclass(frozen=True, slots=True)
class LayerPath:
    """layers: those that are computed, None for all. found: the states [M, D] behind each `wanted` one."""

    layers: Collection[int] | None = None
    wanted: tuple[int, ...] = ()
    found: dict[int, torch.Tensor] = field(default_factory=dict)

    def takes(self, layer: int) -> bool:
        """Whether `layer` is computed."""
        return self.layers is None or layer in self.layers

    def passed(self, layer: int, x: torch.Tensor) -> None:
        """Keep the states x [M, D] behind `layer` if they are wanted."""
        if layer in self.wanted:
            self.found[layer] = x


def node_slices(inputs: Sequence[StepInput]) -> list[slice]:
    """Where the new nodes of each input lie among all packed nodes."""
    ends = accumulate((len(each.tokens) for each in inputs), initial=0)
    return [slice(*each) for each in pairwise(ends)]


def given_embeddings(inputs: Sequence[StepInput]) -> list[tuple[int, torch.Tensor]]:
    """The embeddings that callers gave, each with the number of the packed node where they begin."""
    places = zip(inputs, node_slices(inputs), strict=True)
    return [(at.start, each.embeddings) for each, at in places if each.embeddings is not None]
