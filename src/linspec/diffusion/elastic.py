"""Elastic-Cache: all positions are computed again, from the layer on below which attention has drifted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from linspec.decoding.step import Look
from linspec.diffusion.base import CACHES, CachePolicy
from linspec.diffusion.canvas import Canvas
from linspec.errors import ConfigError
from linspec.utils.messages import quoted
from linspec.utils.options import option
from linspec.utils.sizes import check_choice, check_size


@dataclass(frozen=True, slots=True, kw_only=True)
class ElasticOptions:
    """What is tracked, and how much of its attention may drift."""

    gamma: float = option(
        "similarity of attention below which the layers above are computed again, at most 1",
        default=0.9,
        short=True,
    )
    tracked: int = option("positions with the most attention that each layer tracks", default=1)
    over: str = option(
        "what a similarity goes over: keys, as the paper says, or heads, as its code does",
        default="keys",
    )
    masks: str = option("which masks are computed: open, or all", default="open")
    every: int | None = option(
        "forwards from one that computes everything to the next; none for the first alone",
        default=None,
    )

    def __post_init__(self) -> None:
        if math.isnan(self.gamma) or self.gamma > 1:
            raise ConfigError(
                f"gamma must be a number of at most 1, got {quoted(self.gamma)}; every=1 computes everything"
            )
        check_size("tracked", self.tracked)
        check_choice("over", self.over, ("keys", "heads"))
        check_choice("masks", self.masks, ("open", "all"))
        if self.every is not None:
            check_size("every", self.every)


@dataclass(slots=True)
class Kept:
    """inputs: what went into each layer [T, D], as old as the entries there. tracked: positions."""

    inputs: dict[int, Tensor] = field(default_factory=dict)
    tracked: set[int] = field(default_factory=set)


@CACHES.register(
    "elastic",
    summary="compute layers again from where attention has drifted; goes with block=sliding; approximate",
    paper="Wu et al. 2025 (Elastic-Cache), arXiv 2510.14973",
    options=ElasticOptions,
)
class Elastic(CachePolicy):
    """A forward begins with open masks, what was decided last and what is tracked.

    Queries and keys of a layer are functions of its inputs, so these are all that is kept beside the cache.
    """

    options: ElasticOptions

    def rows(self, canvas: Canvas) -> Sequence[int]:
        every = self.options.every
        if canvas.new or (every is not None and canvas.forwards % every == 0):
            return range(len(canvas))
        masks = canvas.open if self.options.masks == "open" else sorted(canvas.undecided)
        asked = {position - canvas.logit_shift for position in masks}
        return sorted({*canvas.kept.tracked, *canvas.fresh, *asked})

    def watch(self, canvas: Canvas, rows: Sequence[int]) -> Drift:
        if canvas.new:
            canvas.kept = Kept()
        return Drift(self.options, canvas, rows)


class Drift:
    """Watches one forward.

    Attributes:
        boundary: the first layer that computes all positions; None if none does.
        computed: positions × layers.
    """

    def __init__(self, options: ElasticOptions, canvas: Canvas, rows: Sequence[int]) -> None:
        self.options, self.kept, self.size = options, canvas.kept, len(canvas)
        self.asking = [position - canvas.logit_shift for position in canvas.open]
        self.masks = sorted(canvas.undecided)
        self.tracked, self.kept.tracked = sorted(self.kept.tracked), set()
        self.boundary = 0 if len(rows) == self.size else None
        self.computed = 0
        self._place(rows)

    def _place(self, rows: Sequence[int]) -> None:
        self.rows = list(rows)
        self._at = {row: place for place, row in enumerate(rows)}

    @property
    def whole(self) -> bool:
        """Whether all positions are computed."""
        return len(self.rows) == self.size

    def before(self, layer: int, x: Tensor, look: Look) -> Tensor | None:
        inputs = self.kept.inputs
        if self.whole:
            # a copy of its own: x is a part of what others have too
            inputs[layer] = self.x = x.clone()
            return None
        tests = self.tracked and layer != self.boundary
        self.old = look(inputs[layer][self.tracked], self.tracked) if tests else None
        inputs[layer][self.rows] = self.x = x
        if layer != self.boundary:
            return None
        self._place(range(self.size))
        self.x = inputs[layer]
        return self.x

    def after(self, layer: int, look: Look) -> None:
        self.computed += len(self.rows)
        self._track(self._attention(self.asking, look))
        if self.whole or self.old is None:
            return
        dim = -1 if self.options.over == "keys" else 0
        new = self._attention(self.tracked, look)
        similarity = torch.cosine_similarity(self.old, new, dim=dim).mean()
        if float(similarity) < self.options.gamma:
            self.boundary = layer + 1

    def _attention(self, positions: list[int], look: Look) -> Tensor:
        return look(self.x[[self._at[position] for position in positions]], positions)

    def _track(self, attention: Tensor) -> None:
        """What the asking rows look at most, of all words."""
        received = attention.sum((0, 1))
        received[self.masks] = -math.inf
        count = min(self.options.tracked, self.size - len(self.masks))
        self.kept.tracked |= {*received.topk(count).indices.tolist()}
