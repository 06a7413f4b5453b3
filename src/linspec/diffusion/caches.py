"""Which positions are computed again: all, all from the block on (prefix cache), the block (dual cache)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from linspec.diffusion.base import CACHES, CachePolicy
from linspec.diffusion.canvas import Canvas
from linspec.utils.options import option
from linspec.utils.sizes import check_size

_PAPER = "Wu et al. 2025 (Fast-dLLM), arXiv 2505.22618"


@dataclass(frozen=True, slots=True)
class RefreshOptions:
    """When all positions are computed."""

    every: int | None = option(
        "forwards of a block from one that computes everything to the next; none for one a block",
        default=None,
        short=True,
    )

    def __post_init__(self) -> None:
        if self.every is not None:
            check_size("every", self.every)

    def due(self, canvas: Canvas) -> bool:
        """Whether the next forward computes everything."""
        return canvas.step == 0 or (self.every is not None and canvas.step % self.every == 0)


@CACHES.register(
    "none",
    summary="every forward computes all positions",
    paper="Nie et al. 2025 (LLaDA), arXiv 2502.09992",
)
class NoCache(CachePolicy):
    """Nothing is older than the forward that reads it."""

    def rows(self, canvas: Canvas) -> Sequence[int]:
        return range(len(canvas))


@CACHES.register(
    "prefix",
    summary="what stands before a block is computed once for the block; approximate",
    paper=_PAPER,
    options=RefreshOptions,
)
class PrefixCache(CachePolicy):
    """The block and all masks behind it are computed in every forward."""

    options: RefreshOptions

    def rows(self, canvas: Canvas) -> Sequence[int]:
        return range(0 if self.options.due(canvas) else canvas.start, len(canvas))


@CACHES.register(
    "dual",
    summary="what stands before and behind a block is computed once for the block; approximate",
    paper=_PAPER,
    options=RefreshOptions,
)
class DualCache(CachePolicy):
    """Only the block is computed in every forward."""

    options: RefreshOptions

    def rows(self, canvas: Canvas) -> Sequence[int]:
        if self.options.due(canvas) or canvas.end is None:
            return range(len(canvas))
        return range(canvas.start, canvas.end)


@CACHES.register(
    "blocks",
    summary="a finished block of a block-diffusion model is computed once; exact",
    paper="Arriola et al. 2025, arXiv 2503.09573; Cheng et al. 2025 (SDAR), arXiv 2510.06303",
    lossless="yes",
)
class BlockCache(CachePolicy):
    """The first forward of a block computes the block before it along, whose last words it has not seen.

    Published code spends a forward of its own on that. Later blocks are never seen, so nothing is stale.
    """

    def rows(self, canvas: Canvas) -> Sequence[int]:
        if canvas.new or canvas.unit is None:
            return range(canvas.reach)
        first = canvas.start // canvas.unit - (canvas.step == 0)
        return range(max(first, 0) * canvas.unit, canvas.reach)
