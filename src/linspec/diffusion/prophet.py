"""Prophet: once the model is sure of everything that is left, take all of it at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from linspec.diffusion.base import STOPS
from linspec.diffusion.canvas import Canvas
from linspec.diffusion.predictions import Predictions
from linspec.diffusion.stops import EndOfText
from linspec.errors import ConfigError
from linspec.utils.messages import quoted
from linspec.utils.options import option
from linspec.utils.sizes import check_choice


@dataclass(frozen=True, slots=True)
class ProphetOptions:
    """How large the gap between the two best logits must be, by how much is decided."""

    early: float = option("gap in logits before a third of the output is decided", default=7.5)
    middle: float = option("gap before two thirds are decided", default=5.0)
    late: float = option("gap after that", default=2.5)
    over: str = option("mean: of the gaps of what is left; least: the smallest", default="mean")

    def __post_init__(self) -> None:
        check_choice("over", self.over, ("mean", "least"))
        for name in ("early", "middle", "late"):
            if math.isnan(getattr(self, name)):
                raise ConfigError(f"{name} must be a number, got {quoted(getattr(self, name))}")

    def gap(self, progress: float) -> float:
        """The gap that is asked for after this share of the output."""
        return self.early if progress < 0.33 else self.middle if progress < 0.67 else self.late


@STOPS.register(
    "prophet",
    summary="fill everything once the two best logits are far apart; end with the text; approximate",
    paper="Li et al. 2025, arXiv 2508.19982",
    options=ProphetOptions,
)
class Prophet(EndOfText):
    """Looks at all undecided positions, when a forward has computed them all.

    The gaps are in logits, whose scale is the model's: thresholds of one model mean nothing to another.
    """

    options: ProphetOptions

    def fills(self, canvas: Canvas, predictions: Predictions) -> bool:
        left: Sequence[int] = sorted(canvas.undecided)
        if not predictions.knows(left):
            return False
        # a forward that decides one token each time has progressed by itself
        progress = (canvas.decided + 1) / (len(canvas) - canvas.prompt_length)
        return float(self._gap(predictions.logits(left))) >= self.options.gap(progress)

    def _gap(self, logits: Tensor) -> Tensor:
        best = logits.topk(2).values
        gaps = best[:, 0] - best[:, 1]
        return gaps.mean() if self.options.over == "mean" else gaps.min()
