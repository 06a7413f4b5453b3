"""When a sequence has ended: with its last block, or with the block that holds an end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from linspec.diffusion.base import STOPS, StopPolicy
from linspec.diffusion.canvas import Canvas
from linspec.diffusion.commits.threshold import check_threshold
from linspec.diffusion.predictions import Predictions
from linspec.utils.options import option


@STOPS.register(
    "never",
    summary="compute every block, also behind the end of the text",
    paper="Nie et al. 2025 (LLaDA), arXiv 2502.09992",
    lossless="yes",
)
class NeverStop(StopPolicy):
    """The published sampler: the same output as `end-of-text`, for more forwards."""


@STOPS.register(
    "end-of-text",
    summary="end with the block in which the text ends",
    paper="Wu et al. 2025 (Fast-dLLM), arXiv 2505.22618",
    lossless="yes",
)
class EndOfText(StopPolicy):
    """Later blocks cannot change what is decided, so nothing of the output is lost."""

    def ends(self, block: Sequence[int], ends: frozenset[int]) -> bool:
        return not ends.isdisjoint(block)


@dataclass(frozen=True, slots=True)
class ForeseenEndOptions:
    """How likely an end must be."""

    least: float = option(
        "probability that an end needs where nothing is decided yet, above 0 and up to 1; the published "
        "rule has none",
        default=0.5,
        short=True,
    )

    def __post_init__(self) -> None:
        check_threshold("least", self.least)


@STOPS.register(
    "foreseen-end",
    summary="leave out what stands behind a decided end, or behind one that is likely; approximate",
    paper="Bao et al. 2025 (Learn2PD: end-of-text prediction), arXiv 2509.25188",
    options=ForeseenEndOptions,
)
class ForeseenEnd(EndOfText):
    """Later forwards compute, and see, a shorter text.

    An end that is only predicted cuts behind what is decided: nothing that was decided before it is lost.
    """

    options: ForeseenEndOptions

    def cuts(self, canvas: Canvas, predictions: Predictions, ends: frozenset[int]) -> int:
        output = range(canvas.prompt_length, len(canvas))
        decided = [position for position in output if position not in canvas.undecided]
        found = [position for position in decided if canvas.tokens[position] in ends]
        if found:
            return found[0] + 1
        behind = range(max(decided, default=canvas.prompt_length - 1) + 1, len(canvas))
        asked = [position for position in behind if predictions.knows([position])]
        likeliest = self._likeliest(asked, predictions, ends) if asked else None
        return len(canvas) if likeliest is None else likeliest + 1

    def _likeliest(
        self, positions: Sequence[int], predictions: Predictions, ends: frozenset[int]
    ) -> int | None:
        """The position where an end is likeliest, among those where it is the likeliest token."""
        best = predictions.logits(positions).softmax(-1).max(-1)
        found = [
            (probability, -position)
            for probability, token, position in zip(
                best.values.tolist(), best.indices.tolist(), positions, strict=True
            )
            if token in ends and probability >= self.options.least
        ]
        return -max(found)[1] if found else None
