"""Blocks of one length, and one block in which a window slides."""

from __future__ import annotations

from dataclasses import dataclass

from linspec.diffusion.base import BLOCKS, BlockPolicy
from linspec.diffusion.canvas import Canvas
from linspec.diffusion.predictions import Predictions
from linspec.utils.options import option
from linspec.utils.sizes import check_size


@dataclass(frozen=True, slots=True)
class FixedBlockOptions:
    """How long."""

    length: int | None = option(
        "positions of a block; none for the whole output at once", default=32, short=True
    )

    def __post_init__(self) -> None:
        if self.length is not None:
            check_size("length", self.length)


@BLOCKS.register(
    "fixed",
    summary="blocks of one length, from left to right",
    paper="Nie et al. 2025 (LLaDA), arXiv 2502.09992",
    options=FixedBlockOptions,
)
class FixedBlocks(BlockPolicy):
    """The output is divided from its start; the last block may be shorter."""

    options: FixedBlockOptions

    def length(self, canvas: Canvas, predictions: Predictions) -> int:
        return self.options.length or len(canvas) - canvas.start


@dataclass(frozen=True, slots=True)
class SlidingOptions:
    """How wide."""

    window: int = option("masks that can be decided next", default=16, short=True)

    def __post_init__(self) -> None:
        check_size("window", self.window)


@BLOCKS.register(
    "sliding",
    summary="a window over the first masks, which moves on with every token",
    paper="Wu et al. 2025 (Elastic-Cache), arXiv 2510.14973",
    options=SlidingOptions,
)
class Sliding(BlockPolicy):
    """The whole output is one block, of which the first masks are open."""

    options: SlidingOptions

    def length(self, canvas: Canvas, predictions: Predictions) -> int:
        return len(canvas) - canvas.start

    @property
    def window(self) -> int:
        return self.options.window
