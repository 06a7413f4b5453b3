"""FiRST (Jain et al. 2024): from the prompt, routers tell which layers its draft does without.

The layers are chosen once for a sequence, by its prompt alone. The paper decodes without them, which changes
the output: that is the generation loop `first`. Here they are left out of drafts only, and the whole target
verifies.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from linspec.decoding.sequence import RunningSequence
from linspec.decoding.target import Target
from linspec.drafters.base import DRAFTERS, DrafterContext
from linspec.drafters.found import find_drafter, is_at_hand, path_option
from linspec.drafters.routed_forms import RoutedForms
from linspec.drafters.routers import Routers
from linspec.drafters.saved import load_drafter, plain_files
from linspec.drafters.self_bits import check_drafting
from linspec.drafters.self_draft import SelfDraft
from linspec.models.decoder import Decoder
from linspec.utils.options import option
from linspec.utils.sizes import check_size


@dataclass(frozen=True, slots=True)
class FirstOptions:
    """Where the routers are, how many layers they leave out, and how much is drafted."""

    path: Path | None = path_option("the routers", "first")
    skip: int | None = option(
        "layers that a draft does without; none is those that are needed less than by half",
        default=None,
    )
    tokens: int = option("most draft tokens of a chain", default=16)
    least: float = option("drafting ends behind a token that is held less likely", default=0.5)

    def __post_init__(self) -> None:
        check_drafting(self.tokens, self.least)
        if self.skip is not None:
            check_size("skip", self.skip)


@DRAFTERS.register(
    "first",
    summary="the target drafts a tree without the layers that, by trained routers, its prompt does not need",
    paper="Jain et al. 2024 (FiRST), arXiv 2410.12513",
    needs="trained routers: linspec train-drafter --kind first",
    options=FirstOptions,
)
class First(SelfDraft):
    """A form for each set of layers, chosen for each sequence."""

    files = plain_files(Routers)

    def __init__(
        self, context: DrafterContext, options: FirstOptions, routers: Routers | None = None
    ) -> None:
        super().__init__(context, tokens=options.tokens, least=options.least)
        target = context.decoder(self.name)
        self.skip = options.skip
        self.routers = routers or load_drafter(
            find_drafter(self.name, options.path, context), target, Routers
        )
        self._forms = RoutedForms(target, self.routers, self.skip, f"drafter {self.name!r}")

    @classmethod
    def at_hand(cls, context: DrafterContext) -> bool:
        return is_at_hand(cls.name, context)

    def attached(self, target: Target) -> None:
        super().attached(target)
        assert isinstance(target.model, Decoder), "checked when this was made"
        self._forms = RoutedForms(target.model, self.routers, self.skip, f"drafter {self.name!r}")

    def make(self, model: Decoder) -> Decoder:
        # a prompt that needs every layer
        return model

    def pays(self, sequence: RunningSequence) -> bool:
        return bool(self.skipped(sequence))

    def form_of(self, sequence: RunningSequence) -> Decoder:
        return self._forms.of(sequence)

    def skipped(self, sequence: RunningSequence) -> frozenset[int]:
        """The layers that the drafts of a sequence do without."""
        return self._forms.skipped(sequence)

    def started(self, sequence: RunningSequence) -> None:
        # another engine may have left a sequence of this number without a word
        self._forms.forget(sequence)

    def finished(self, sequence: RunningSequence) -> None:
        self._forms.forget(sequence)
