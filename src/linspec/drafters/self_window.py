"""The target drafts for itself with a short memory: what is near, and the first tokens (attention sinks).

The idea of MagicDec (Chen et al. 2024) and TriForce (Sun et al. 2024): with a long context most of a step is
reading the cache, and most of what is read hardly matters.
"""

from __future__ import annotations

from dataclasses import dataclass

from linspec.decoding.sequence import RunningSequence
from linspec.drafters.base import DRAFTERS, DrafterContext
from linspec.drafters.self_bits import check_drafting
from linspec.drafters.self_draft import SelfDraft
from linspec.errors import ConfigError, DrafterError
from linspec.models.decoder import Decoder
from linspec.models.own_forms import near_sighted, sees_all
from linspec.utils.options import option
from linspec.utils.sizes import check_size

# the window moves on by a quarter of its length
_SPAN = 4


@dataclass(frozen=True, slots=True)
class SelfWindowOptions:
    """What drafts see, and how much is drafted."""

    window: int = option("most near tokens that a draft sees", default=256, short=True)
    sinks: int = option("first tokens that it sees too", default=4)
    tokens: int = option("most draft tokens of a chain", default=16)
    least: float = option("drafting ends behind a token that is held less likely", default=0.3)

    def __post_init__(self) -> None:
        check_size("window", self.window)
        check_size("sinks", self.sinks, least=0)
        check_drafting(self.tokens, self.least)
        if self.window % _SPAN or self.sinks > self.window // _SPAN:
            raise ConfigError(
                f"window must be a multiple of {_SPAN} and have at least {_SPAN} tokens for each sink, got "
                f"window={self.window} and sinks={self.sinks}"
            )


@DRAFTERS.register(
    "self-window",
    summary="the target itself drafts a tree, its softmax layers seeing a window and the first tokens only",
    paper="Chen et al. 2024 (MagicDec), arXiv 2408.11049; Xiao et al. 2023, arXiv 2309.17453",
    needs="a model with softmax layers; it pays at long contexts",
    options=SelfWindowOptions,
)
class SelfWindow(SelfDraft):
    """The target's weights and the target's cache, of which drafts read a part that does not grow."""

    def __init__(self, context: DrafterContext, options: SelfWindowOptions) -> None:
        super().__init__(context, tokens=options.tokens, least=options.least)
        self.options = options
        model = context.decoder(self.name)
        if not any(sees_all(part) for part in model.modules()):
            raise DrafterError(
                f"drafter {self.name!r} shortens softmax attention over all tokens, and this model has none: "
                "its mixers, or the attention that was chosen, read less already; use self-bits or swift"
            )

    def pays(self, sequence: RunningSequence) -> bool:
        # a window over everything drafts at the cost of the target
        return len(sequence.tokens) > self.options.window

    def make(self, model: Decoder) -> Decoder:
        window, sinks = self.options.window, self.options.sinks
        return near_sighted(model, group=window // _SPAN, span=_SPAN, sinks=sinks)
