"""The target drafts for itself and reads of its own cache what each draft selects: near groups and pages.

The idea of TidalDecode and SpecAttn as drafters: a sparse pass drafts, the full cache verifies.
"""

from __future__ import annotations

from dataclasses import dataclass

from linspec.decoding.sequence import RunningSequence
from linspec.drafters.base import DRAFTERS, DrafterContext
from linspec.drafters.self_bits import check_drafting
from linspec.drafters.self_draft import SelfDraft
from linspec.errors import DrafterError
from linspec.mixers.paged import check_judge
from linspec.mixers.specs import make_mixer
from linspec.models.decoder import Decoder
from linspec.models.own_forms import sees_all, with_attention
from linspec.utils.options import option
from linspec.utils.sizes import check_size


@dataclass(frozen=True, slots=True)
class SelfPagesOptions:
    """What drafts read, and how much is drafted."""

    budget: int = option("tokens of earlier groups that a draft reads", default=256, short=True)
    group: int = option("tokens of a group; the nearest two groups are read whole", default=64)
    judge: str = option(
        "what groups are judged by, codes or bounds: see mixer pages", default="codes"
    )
    tokens: int = option("most draft tokens of a chain", default=16)
    least: float = option("drafting ends behind a token that is held less likely", default=0.3)

    def __post_init__(self) -> None:
        check_size("budget", self.budget)
        check_size("group", self.group)
        check_judge(self.judge)
        check_drafting(self.tokens, self.least)


@DRAFTERS.register(
    "self-pages",
    summary="the target itself drafts a tree, its softmax layers reading near tokens and selected pages only",
    paper="Tang et al. 2024 (Quest), arXiv 2406.10774",
    needs="a model with softmax layers; it pays at long contexts",
    options=SelfPagesOptions,
)
class SelfPages(SelfDraft):
    """The target's weights and the target's cache, of which drafts read the pages that they select."""

    def __init__(self, context: DrafterContext, options: SelfPagesOptions) -> None:
        super().__init__(context, tokens=options.tokens, least=options.least)
        read = f"budget={options.budget},group={options.group},judge={options.judge}"
        self.mixer = make_mixer(f"pages:{read}")
        self.read = options.budget + self.mixer.group * self.mixer.span
        model = context.decoder(self.name)
        if not any(sees_all(part) for part in model.modules()):
            raise DrafterError(
                f"drafter {self.name!r} thins softmax attention over all tokens, and this model has none: "
                "its mixers, or the attention that was chosen, read less already; use self-bits or swift"
            )

    def pays(self, sequence: RunningSequence) -> bool:
        # a selection of everything drafts at the cost of the target
        return len(sequence.tokens) > self.read

    def make(self, model: Decoder) -> Decoder:
        return with_attention(model, self.mixer)
