"""Lexical unit decoding (Sun et al. 2024, arXiv 2405.15208): slots fill with what is certain.

The model was trained to say the rest of a unit, a span of tokens that it is sure of, in slots: places behind
the newest token whose input is one trained embedding. They ride in every step. What they say with enough
confidence is the next draft.

With an exact verifier that is speculation, lossless for the trained model. With the verifier `trusting`
drafts are taken as they are, as in the paper: no pass verifies them, and the output is an approximation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from linspec.decoding.probes import Probes
from linspec.decoding.sequence import RunningSequence
from linspec.decoding.step import MAX_STAGED
from linspec.decoding.target import Target
from linspec.decoding.tree import Budget, TokenTree, chain_shape
from linspec.drafters.base import DRAFTERS, ChainDrafter, DrafterContext
from linspec.drafters.found import find_drafter, is_at_hand, path_option
from linspec.drafters.saved import load_drafter, plain_files
from linspec.drafters.trained import TrainedDrafter, read_shape
from linspec.errors import ConfigError
from linspec.models.decoder import Decoder
from linspec.utils.options import option
from linspec.utils.sizes import check_sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotConfig:
    """How many slots a target of this width and vocabulary was trained with; units have one token more."""

    width: int
    vocab_size: int
    slots: int = 4

    def __post_init__(self) -> None:
        check_sizes(self, "width vocab_size slots")


class Slot(TrainedDrafter):
    """What every slot is fed: an embedding [1, width] that is no token's."""

    kind = "lud"

    def __init__(self, config: SlotConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.zeros(1, config.width))

    def described(self) -> dict[str, Any]:
        return asdict(self.config)

    @classmethod
    def from_description(cls, data: Mapping[str, Any], target: Decoder, path: Path) -> Self:
        return cls(read_shape(SlotConfig, data, target, path))


@dataclass(frozen=True, slots=True)
class LUDOptions:
    """Where the slot is, and what is certain enough."""

    path: Path | None = path_option("the slot", "lud")
    threshold: float = option("least confidence of a draft, above 0", default=0.9)

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ConfigError(f"threshold must be above 0, got {self.threshold}; 0.9 is usual")


@DRAFTERS.register(
    "lud",
    summary="slots behind the newest token fill with what the model is sure of; see verifier trusting",
    paper="Sun et al. 2024 (LUD), arXiv 2405.15208",
    needs="a model trained for it: linspec train-drafter --kind lud --out DIR",
    options=LUDOptions,
)
class LUD(ChainDrafter):
    """Chains of what the slots say, as far as they are sure; slots ride below the last node."""

    confident = True

    files = plain_files(Slot)
    probing = True

    def __init__(self, slot: Slot, options: LUDOptions | None = None) -> None:
        super().__init__()
        self.slot = slot.requires_grad_(False)
        self.threshold = (options or LUDOptions()).threshold
        self._slots: dict[RunningSequence, int] = {}
        self._limit: int | None = None

    @classmethod
    def build(cls, context: DrafterContext, options: LUDOptions) -> Self:
        """With a slot from disk."""
        target = context.decoder(cls.name)
        folder = find_drafter(cls.name, options.path, context)
        return cls(load_drafter(folder, target, Slot), options)

    @classmethod
    def at_hand(cls, context: DrafterContext) -> bool:
        return is_at_hand(cls.name, context)

    def attached(self, target: Target) -> None:
        self._limit = target.model.config.position_limit

    def propose(
        self, sequences: Sequence[RunningSequence], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        return [self._unit(each, budget) for each, budget in zip(sequences, budgets, strict=True)]

    def _unit(self, sequence: RunningSequence, budget: Budget) -> TokenTree:
        """The root and what is certain behind it; the rest of the budget is for slots."""
        tokens, sure = [sequence.root], [1.0]
        scores = sequence.probed
        if scores is not None and len(scores):
            best = scores.float().softmax(-1).max(-1)
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            for token, chance in list(pairs)[: budget.chain]:
                # parallel slots tend to say a token twice
                if chance < self.threshold or token == tokens[-1]:
                    break
                tokens.append(token)
                sure.append(chance)
        self._slots[sequence] = min(self.slot.config.slots, budget.nodes + 1 - len(tokens))
        return TokenTree(tuple(tokens), chain_shape(len(tokens)).parents, confidences=tuple(sure))

    def probes(self, sequence: RunningSequence, tree: TokenTree) -> Probes | None:
        nodes, count = len(tree), self._slots.pop(sequence, 0)
        if self._limit is not None:
            count = min(count, self._limit - len(sequence.tokens) - nodes + 1)
        count = min(count, MAX_STAGED - nodes)
        if count <= 0:
            return None
        parents = range(nodes - 1, nodes - 1 + count)
        return Probes(tuple(parents), self.slot.embedding.expand(count, -1))

    def finished(self, sequence: RunningSequence) -> None:
        self._slots.pop(sequence, None)
