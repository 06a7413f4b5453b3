"""AdaBlock-dLLM: a block ends where the model expects a line to end."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from linspec.decoding.target import Target
from linspec.diffusion.base import BLOCKS, BlockPolicy
from linspec.diffusion.canvas import Canvas
from linspec.diffusion.commits.threshold import check_threshold
from linspec.diffusion.predictions import Predictions
from linspec.errors import ConfigError
from linspec.utils.messages import quoted, shown
from linspec.utils.options import option
from linspec.utils.sizes import check_choice, check_size

# models that were made from autoregressive ones are less sure of what is far ahead
_LEAST = {0: 0.3, 1: 0.5}
_IDS = re.compile(r"[0-9]{1,9}(\+[0-9]{1,9})*")


@dataclass(frozen=True, slots=True)
class AdaBlockOptions:
    """What ends a block, how sure it must be, and how far it may be away."""

    length: int = option("positions of a block without such a token", default=32, short=True)
    delimiters: str | None = option(
        "ids of the tokens that end a block, joined by plus signs, such as 198+13; none for all whose text "
        "ends a line",
        default=None,
    )
    least: float | None = option(
        "probability that a delimiter needs, above 0 and up to 1; none for 0.3, or 0.5 with a logit shift",
        default=None,
    )
    pick: str = option(
        "best: the likeliest delimiter; first: the first that is likely enough", default="best"
    )
    window: float = option("share of the masked output that is looked at", default=0.25)
    shortest: int = option("positions that a block has at least", default=1)
    ends: bool = option("whether an end of text is a delimiter too", default=False)

    def __post_init__(self) -> None:
        check_size("length", self.length)
        check_size("shortest", self.shortest)
        if self.least is not None:
            check_threshold("least", self.least)
        check_threshold("window", self.window)
        check_choice("pick", self.pick, ("best", "first"))
        if self.delimiters is not None and not _IDS.fullmatch(self.delimiters):
            raise ConfigError(
                f"delimiters must be ids such as 198 or 198+13, got {quoted(self.delimiters)}"
            )


@BLOCKS.register(
    "ada-block",
    summary="end a block with the likeliest line break that is predicted near its start",
    paper="Lu et al. 2025, arXiv 2509.26432",
    options=AdaBlockOptions,
)
class AdaBlock(BlockPolicy):
    """Looks at the likeliest tokens, at any temperature: the length of a block is not left to chance."""

    options: AdaBlockOptions

    def attached(self, target: Target) -> None:
        config: Any = target.model.config
        given = self.options.delimiters
        ids = _line_ends(target) if given is None else {int(each) for each in given.split("+")}
        foreign = sorted(each for each in ids if each >= config.vocab_size)
        if foreign:
            raise ConfigError(
                f"block policy 'ada-block': delimiters name token {shown(foreign[0])}, but the model has "
                f"{config.vocab_size} tokens"
            )
        self.delimiters = ids | set(config.eos_ids if self.options.ends else ())
        least = self.options.least
        self.least = _LEAST[config.logit_shift] if least is None else least

    def length(self, canvas: Canvas, predictions: Predictions) -> int:
        left = len(canvas) - canvas.start
        window = min(int(self.options.window * (len(canvas) - canvas.prompt_length)), left)
        seen = range(canvas.start + self.options.shortest - 1, canvas.start + window)
        if seen:
            found = self._delimiter(predictions.logits(seen))
            if found is not None:
                return self.options.shortest + found
        return max(self.options.length, self.options.shortest)

    def _delimiter(self, logits: Tensor) -> int | None:
        """The place of the delimiter that ends the block, among these positions; None if none is sure."""
        best = logits.softmax(-1).max(-1)
        sure = {
            place: float(probability)
            for place, (probability, token) in enumerate(
                zip(best.values, best.indices.tolist(), strict=True)
            )
            if token in self.delimiters and float(probability) >= self.least
        }
        if not sure:
            return None
        return min(sure) if self.options.pick == "first" else max(sure, key=sure.__getitem__)


def _line_ends(target: Target) -> set[int]:
    """All tokens whose text ends with a line break."""
    tokenizer, ids = target.tokenizer, range(target.model.config.vocab_size)
    known = () if tokenizer is None else ids
    found = {token for token in known if tokenizer.decode([token]).endswith("\n")}
    if not found:
        raise ConfigError(
            "block policy 'ada-block' ends blocks with lines, and this tokenizer has no token that ends one; "
            "name others: block=ada-block:delimiters=13"
        )
    return found
