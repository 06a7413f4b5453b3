"""A smaller model drafts as long as a trained head holds its drafts acceptable (SpecDec++).

A draft ends behind the first token at which the chance that any judged token before it is rejected exceeds a
threshold. That token was drafted already and stays: it is not judged, and has the mean chance of its depth.
The chances are confidences of the tree, so `specdec-pp` cuts where the costs of this machine say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch

from linspec.checkpoints.fingerprint import fingerprint
from linspec.decoding.sequence import RunningSequence
from linspec.decoding.tree import Budget, TokenTree
from linspec.drafters.acceptance_head import AcceptanceHead
from linspec.drafters.base import DRAFTERS, DrafterContext
from linspec.drafters.draft_model import DraftModel, matching_model
from linspec.drafters.found import find_drafter, is_at_hand, path_option
from linspec.drafters.saved import load_drafter, plain_files
from linspec.errors import ConfigError, DrafterError
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.utils.options import option
from linspec.utils.sizes import check_sizes


@dataclass(frozen=True, slots=True)
class SpecDecHeadOptions:
    """Where the head and its draft model are, and when a draft ends."""

    path: Path | None = path_option("the head", "specdec-head")
    draft: str | None = option(
        "the draft model's directory or name; none is where it was in training", default=None
    )
    threshold: float = option(
        "a draft ends where it is rejected more likely than this; best near 1 - the cost of a draft in steps",
        default=0.7,
    )
    least: int = option("draft tokens that are not asked about", default=2)
    most: int = option("most draft tokens of a chain", default=20)

    def __post_init__(self) -> None:
        check_sizes(self, "least most")
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"threshold must be in 0..1, got {self.threshold}; 0.7 is usual")


@DRAFTERS.register(
    "specdec-head",
    summary="a smaller model drafts a chain until a trained head expects a rejection",
    paper="Huang et al. 2024 (SpecDec++), arXiv 2405.19715",
    needs="a trained head: linspec train-drafter --kind specdec-head:draft=DIR",
    options=SpecDecHeadOptions,
)
class SpecDecHead(DraftModel):
    """Chains of a draft model with a chance of acceptance for each token."""

    files = plain_files(AcceptanceHead)
    confident = True

    def __init__(
        self,
        model: Decoder,
        target: DecoderConfig,
        slots: int,
        head: AcceptanceHead,
        options: SpecDecHeadOptions | None = None,
    ) -> None:
        super().__init__(model, target, slots)
        # chances of twenty tokens are multiplied
        self.head = head.float().eval()
        self.options = options or SpecDecHeadOptions()
        self.max_nodes = self.options.most
        # of each sequence of a round, the chances of its judged drafts
        self._chances: dict[int, list[float]] = {}

    @classmethod
    def build(cls, context: DrafterContext, options: Any) -> Self:
        """With a head and its draft model from disk."""
        target = context.decoder(cls.name)
        folder = find_drafter(cls.name, options.path, context)
        head = load_drafter(folder, target, AcceptanceHead)
        model = matching_model(options.draft or head.config.draft, context, cls.name)
        found = fingerprint(model)
        if found != head.config.draft_fingerprint:
            raise DrafterError(
                f"the head in {folder} judges drafts of {head.config.draft} (fingerprint "
                f"{head.config.draft_fingerprint}), and this draft model has {found}; train its own: linspec "
                "train-drafter --kind specdec-head:draft=DIR"
            )
        return cls(model, target.config, context.slots, head, options)

    @classmethod
    def at_hand(cls, context: DrafterContext) -> bool:
        return is_at_hand(cls.name, context)

    def propose(
        self, sequences: Sequence[RunningSequence], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        self._chances = {}
        trees = super().propose(sequences, budgets)
        return [
            replace(tree, confidences=(1.0, *self._confidences(i, len(tree) - 1)))
            for i, tree in enumerate(trees)
        ]

    def _confidences(self, sequence: int, drafts: int) -> list[float]:
        """The chances of judged drafts; the last one has the mean of its depth."""
        judged = self._chances.get(sequence, [])[:drafts]
        return [*judged, *self.rates(drafts)[len(judged) :]]

    @torch.inference_mode()
    def ended(
        self, live: Sequence[int], drafts: Sequence[Sequence[int]], hidden: torch.Tensor
    ) -> list[int]:
        if max(len(drafts[i]) for i in live) < 3:
            # the root was fed, and it is not judged
            return []
        found = []
        for i, chance in zip(live, self.head(hidden).tolist(), strict=True):
            chances = self._chances.setdefault(i, [])
            chances.append(chance)
            drafted = len(drafts[i]) - 1
            if drafted >= self.options.least and _rejection(chances) > self.options.threshold:
                found.append(i)
        return found


def _rejection(chances: Sequence[float]) -> float:
    """How likely any of some drafts is rejected."""
    accepted = 1.0
    for chance in chances:
        accepted *= chance
    return 1 - accepted
