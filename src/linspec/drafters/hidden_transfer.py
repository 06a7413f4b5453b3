"""Hidden transfer (Wu et al. 2024, arXiv 2404.12022): pseudo states of the next tokens.

A linear map makes the state of pseudo token i of the last token's state behind a layer. The pseudo tokens go
through the layers above as a chain of nodes that is dropped, so verified tokens never see them.

Only those behind the token that was accepted last are computed, in a step of the upper layers before each
round. The paper lets those of every node ride in the step that verifies: it then reads the upper layers'
weights once and not twice, for as many pseudo tokens beside each node. The guesses are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from linspec.decoding.sequence import RunningSequence
from linspec.decoding.step import StepInput, Want
from linspec.decoding.target import Target
from linspec.decoding.tree import Budget, TokenTree, root_only
from linspec.drafters.base import DRAFTERS, MAX_NODES, Drafter, DrafterContext
from linspec.drafters.found import find_drafter, is_at_hand, path_option
from linspec.drafters.guesses import GuessTree
from linspec.drafters.saved import load_drafter, plain_files
from linspec.drafters.trained import TrainedDrafter, check_calibrated, read_accuracies, read_shape
from linspec.errors import DrafterError
from linspec.models.decoder import Decoder
from linspec.utils.sizes import check_sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferConfig:
    """The shape of the maps.

    width, vocab_size: of the target. steps: pseudo tokens. layer: behind which of the target's layers they
    are made. rooted: the maps also see the embedding of the root, which is decided when a draft begins.
    """

    width: int
    vocab_size: int
    steps: int = 3
    layer: int = 0
    rooted: bool = True

    def __post_init__(self) -> None:
        check_sizes(self, "width vocab_size steps")
        check_sizes(self, "layer", least=0)


class TransferMaps(TrainedDrafter):
    """A linear map for each pseudo token; accuracies[i][k]: how often guess k of number i + 1 was right."""

    kind = "hidden-transfer"

    def __init__(
        self, config: TransferConfig, target: Decoder, accuracies: Sequence[Sequence[float]] = ()
    ) -> None:
        super().__init__()
        self.config = config
        self.accuracies = [list(row) for row in accuracies]
        read = config.width * (2 if config.rooted else 1)
        self.maps = nn.Parameter(torch.zeros(config.steps, config.width, read))
        # in a tuple, so that it is not registered as a part
        self._target = (target,)

    @property
    def target(self) -> Decoder:
        """The model that it drafts for."""
        return self._target[0]

    @cached_property
    def upper(self) -> tuple[int, ...]:
        """The layers that pseudo tokens go through."""
        return tuple(range(self.config.layer + 1, self.target.config.layers))

    def initialize(self) -> None:
        """Every pseudo token begins as the last token's own state."""
        with torch.no_grad():
            self.maps.zero_()
            self.maps[:, :, : self.config.width] = torch.eye(self.config.width)

    def described(self) -> dict[str, Any]:
        return {**asdict(self.config), "accuracies": self.accuracies}

    @classmethod
    def from_description(cls, data: Mapping[str, Any], target: Decoder, path: Path) -> Self:
        config = read_shape(TransferConfig, data, target, path)
        if config.layer >= target.config.layers - 1:
            raise DrafterError(
                f"{path} makes states behind layer {config.layer}, and layers above it are needed; this "
                f"model has {target.config.layers}; train it again: linspec train-drafter --kind {cls.kind}"
            )
        given = data.get("accuracies", [])
        accuracies = read_accuracies(given, config.steps, config.vocab_size, path)
        return cls(config, target, accuracies)

    def forward(self, hidden: torch.Tensor, roots: torch.Tensor) -> torch.Tensor:
        """Pseudo states [..., steps, D] of states [..., D] behind the layer and the tokens [...] after."""
        seen = hidden
        if self.config.rooted:
            embeddings = self.target.embed(roots.to(hidden.device)).to(hidden.dtype)
            # of whatever scale embeddings are; states are larger the deeper they come from
            unit = F.rms_norm(embeddings, embeddings.shape[-1:])
            seen = torch.cat((hidden, unit), dim=-1)
        return torch.einsum("...r,kdr->...kd", seen, self.maps)


def entering(target: Decoder, states: torch.Tensor, positions: Sequence[int]) -> torch.Tensor:
    """What to give a step as embeddings so that the first layer that it runs sees `states` [N, D]."""
    config = target.config
    if config.positions == "learned":
        states = states - target.embed_positions(torch.tensor(positions, device=states.device))
    return states / config.embedding_scale


@dataclass(frozen=True, slots=True)
class TransferOptions:
    """Where the maps are."""

    path: Path | None = path_option("the maps", "hidden-transfer")


@DRAFTERS.register(
    "hidden-transfer",
    summary="pseudo states of the next tokens go through the target's upper layers",
    paper="Wu et al. 2024, arXiv 2404.12022",
    needs="trained maps: linspec train-drafter --kind hidden-transfer",
    options=TransferOptions,
)
class HiddenTransfer(Drafter):
    """Trees of the pseudo tokens' likeliest tokens, shaped by their accuracies on held-out data."""

    files = plain_files(TransferMaps)

    def __init__(self, maps: TransferMaps) -> None:
        check_calibrated(maps.accuracies, maps.kind)
        self.maps = maps.requires_grad_(False)
        self.layer = maps.config.layer
        self.needs = Want((self.layer,))
        self.trees = [
            GuessTree.of(maps.accuracies[:depth], MAX_NODES)
            for depth in range(len(maps.accuracies) + 1)
        ]
        self.max_nodes = len(self.trees[-1].paths)
        self._target: Target | None = None

    @classmethod
    def build(cls, context: DrafterContext, options: TransferOptions) -> Self:
        """With maps from disk."""
        target = context.decoder(cls.name)
        folder = find_drafter(cls.name, options.path, context)
        return cls(load_drafter(folder, target, TransferMaps))

    @classmethod
    def at_hand(cls, context: DrafterContext) -> bool:
        return is_at_hand(cls.name, context)

    def attached(self, target: Target) -> None:
        self._target = target

    def _within(self, depth: int) -> GuessTree:
        return self.trees[min(depth, len(self.trees) - 1)]

    @torch.inference_mode()
    def propose(
        self, sequences: Sequence[RunningSequence], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        trees = [root_only(sequence.root) for sequence in sequences]
        known = [i for i, each in enumerate(sequences) if self.layer in each.hidden]
        if not known or self._target is None:
            return trees
        shapes = {i: self._within(budgets[i].depth) for i in known}
        steps = max(shapes[i].depth(budgets[i].nodes) for i in known)
        top = max(shapes[i].top(budgets[i].nodes) for i in known)
        scores = self._scores([sequences[i] for i in known], steps)
        for i, guesses in zip(known, scores.topk(top, dim=-1).indices.tolist(), strict=True):
            trees[i] = shapes[i].filled(sequences[i].root, guesses, budgets[i].nodes)
        return trees

    def _scores(self, sequences: Sequence[RunningSequence], steps: int) -> torch.Tensor:
        """Logits [sequences, steps, vocab] of pseudo tokens behind what each has committed."""
        assert self._target is not None
        state, decoder = self._target.state, self.maps.target
        hidden = torch.stack([sequence.hidden[self.layer][-1] for sequence in sequences])
        roots = torch.tensor([sequence.root for sequence in sequences])
        pseudo = self.maps(hidden, roots)[:, :steps]
        inputs = []
        for sequence, states in zip(sequences, pseudo, strict=True):
            begin = state.length(sequence.slot)
            given = entering(decoder, states, range(begin, begin + steps))
            inputs.append(StepInput(sequence.slot, (0,) * steps, embeddings=given))
        try:
            outputs = self._target.step(inputs, layers=self.maps.upper)
        finally:
            for sequence in sequences:
                state.drop(sequence.slot)
        return torch.stack([output.logits for output in outputs])

    def expected(self, budget: Budget) -> float:
        gains = self._within(budget.depth).gains
        return gains[min(budget.nodes, len(gains) - 1)]
