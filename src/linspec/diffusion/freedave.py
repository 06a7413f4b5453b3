"""FreeDave: a forward that judges the canvas judges the next ones along, as the last forward foresaw them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from linspec.diffusion.base import VERIFIES, VerifyPolicy
from linspec.diffusion.canvas import Canvas
from linspec.errors import ConfigError
from linspec.utils.options import option
from linspec.utils.sizes import check_size

PAPER = "Wu and Zhang 2025 (FreeDave), arXiv 2510.00294"


@VERIFIES.register(
    "none",
    summary="a forward computes one canvas, that of the text",
    paper="Nie et al. 2025 (LLaDA), arXiv 2502.09992",
    lossless="yes",
)
class NoDrafts(VerifyPolicy):
    """Nothing is drafted."""

    drafts = False


@dataclass(frozen=True, slots=True)
class FreeDaveOptions:
    """How far a forward looks ahead."""

    drafts: int = option(
        "canvases of a forward, the true one included; each costs as much as that one",
        default=4,
        short=True,
    )
    least: float = option(
        "probability of all that a draft decides, below which it is not computed; 0 computes all drafts",
        default=0.0,
    )

    def __post_init__(self) -> None:
        check_size("drafts", self.drafts)
        if not 0 <= self.least <= 1:
            raise ConfigError(f"least must be in [0, 1], got {self.least}")


@VERIFIES.register(
    "freedave",
    summary="up to d rounds a forward, each checked; same output and order as without",
    paper=PAPER,
    options=FreeDaveOptions,
    lossless="yes",
)
class FreeDave(VerifyPolicy):
    """A draft counts if it is what the forward made of the canvas before it, token for token."""

    options: FreeDaveOptions

    @property
    def most_drafts(self) -> int:
        return self.options.drafts - 1

    def ahead(self, canvas: Canvas) -> int:
        return self.most_drafts

    def tries(self, sures: Sequence[float], rows: int) -> bool:
        return sures[-1] >= self.options.least

    def follows(self, canvas: Canvas, drafts: Sequence[Canvas]) -> int:
        return int(bool(drafts) and drafts[0].tokens == canvas.tokens)


@VERIFIES.register(
    "freedave-plus",
    summary="as freedave, and drafts count that lag behind the commit policy; approximate",
    paper=PAPER,
    options=FreeDaveOptions,
)
class FreeDavePlus(FreeDave):
    """The last draft counts whose tokens are all in what the forward made of the canvas.

    Tokens that the forward decided beyond that draft are dropped, and judged again by what it says of the
    draft: with them known, the commit policy might have decided otherwise.
    """

    def follows(self, canvas: Canvas, drafts: Sequence[Canvas]) -> int:
        fits = [n for n, draft in enumerate(drafts, 1) if _lies_in(draft, canvas)]
        return max(fits, default=0)


def _lies_in(draft: Canvas, canvas: Canvas) -> bool:
    """Whether all that is decided on the draft is so on the canvas."""
    pairs = zip(draft.tokens, canvas.tokens, strict=True)
    return all(mine in (theirs, draft.mask_id) for mine, theirs in pairs)
