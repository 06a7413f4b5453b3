"""Parallel prompt decoding (Chen et al. 2024, arXiv 2405.18628).

Trained prompt tokens behind a node of a tree guess what follows it, so the step that verifies one draft makes
the next one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from linspec.decoding.probes import Probes
from linspec.decoding.sequence import RunningSequence
from linspec.decoding.step import MAX_STAGED
from linspec.decoding.target import Target
from linspec.decoding.tree import Budget, TokenTree, root_only
from linspec.drafters.base import DRAFTERS, MAX_NODES, Drafter, DrafterContext
from linspec.drafters.found import find_drafter, is_at_hand, path_option
from linspec.drafters.guesses import GuessTree
from linspec.drafters.layouts import Layouts
from linspec.drafters.saved import load_drafter, plain_files
from linspec.drafters.trained import TrainedDrafter, check_calibrated, read_accuracies, read_shape
from linspec.models.decoder import Decoder
from linspec.utils.sizes import check_sizes

# sizes of budget whose layouts are kept; a policy asks for a dozen
_SIZES_KEPT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptsConfig:
    """How many prompt tokens there are, for a target of this width and vocabulary."""

    width: int
    vocab_size: int
    prompts: int = 3

    def __post_init__(self) -> None:
        check_sizes(self, "width vocab_size prompts")


class PromptTokens(TrainedDrafter):
    """Embeddings [prompts, width]: behind a token, number i guesses the one i places behind the next.

    accuracies[i][k]: how often, on held-out text, guess k of prompt i + 1 was what the target chose.
    """

    kind = "ppd"

    def __init__(self, config: PromptsConfig, accuracies: Sequence[Sequence[float]] = ()) -> None:
        super().__init__()
        self.config = config
        self.accuracies = [list(row) for row in accuracies]
        self.embeddings = nn.Parameter(torch.zeros(config.prompts, config.width))

    def described(self) -> dict[str, Any]:
        return {**asdict(self.config), "accuracies": self.accuracies}

    @classmethod
    def from_description(cls, data: Mapping[str, Any], target: Decoder, path: Path) -> Self:
        config = read_shape(PromptsConfig, data, target, path)
        given = data.get("accuracies", [])
        return cls(config, read_accuracies(given, config.prompts, config.vocab_size, path))


@dataclass(frozen=True, slots=True)
class PPDOptions:
    """Where the prompt tokens are."""

    path: Path | None = path_option("the prompt tokens", "ppd")


@DRAFTERS.register(
    "ppd",
    summary="trained prompt tokens in the verified tree guess the next one",
    paper="Chen et al. 2024, arXiv 2405.18628",
    needs="trained prompt tokens: linspec train-drafter --kind ppd",
    options=PPDOptions,
)
class PPD(Drafter):
    """Budgets count prompt tokens as nodes: `expected` says what the best mix of both brings."""

    files = plain_files(PromptTokens)
    probing = True
    max_nodes = MAX_NODES

    def __init__(self, tokens: PromptTokens) -> None:
        check_calibrated(tokens.accuracies, tokens.kind)
        self.tokens = tokens.requires_grad_(False)
        self.trees = [
            GuessTree.of(tokens.accuracies[:level], MAX_NODES)
            for level in range(len(tokens.accuracies) + 1)
        ]
        self.layouts = lru_cache(_SIZES_KEPT)(lambda rows: Layouts(self.trees, rows))
        self._probes: dict[RunningSequence, tuple[int, ...]] = {}
        self._limit: int | None = None

    @classmethod
    def build(cls, context: DrafterContext, options: PPDOptions) -> Self:
        """With prompt tokens from disk."""
        target = context.decoder(cls.name)
        folder = find_drafter(cls.name, options.path, context)
        return cls(load_drafter(folder, target, PromptTokens))

    @classmethod
    def at_hand(cls, context: DrafterContext) -> bool:
        return is_at_hand(cls.name, context)

    def attached(self, target: Target) -> None:
        self._limit = target.model.config.position_limit

    def propose(
        self, sequences: Sequence[RunningSequence], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        return [self._tree(each, budget) for each, budget in zip(sequences, budgets, strict=True)]

    def _tree(self, sequence: RunningSequence, budget: Budget) -> TokenTree:
        """The likeliest guesses that are known, as deep as there is room."""
        scores = sequence.probed
        known = 0 if scores is None else len(scores)
        level = min(known, budget.depth)
        layout, tree = self.layouts(budget.nodes).of_level[level], self.trees[level]
        self._probes[sequence] = layout.probes
        if scores is None or not layout.nodes:
            return root_only(sequence.root)
        guesses = scores[:level].topk(tree.top(layout.nodes), dim=-1).indices.tolist()
        return tree.filled(sequence.root, guesses, layout.nodes)

    def probes(self, sequence: RunningSequence, tree: TokenTree) -> Probes | None:
        counts = self._probes.pop(sequence, ())
        nodes = range(len(tree)) if tree.cut is None else tree.cut[1]
        counts = tuple(counts[node] for node in nodes if node < len(counts))
        parents, numbers = list[int](), list[int]()
        for node, count in enumerate(counts):
            for number in range(self._fitting(count, len(sequence.tokens) + tree.depths[node])):
                parents.append(len(tree) + len(parents) - 1 if number else node)
                numbers.append(number)
        if not parents:
            return None
        # the tree may be one of another drafter in a mix
        kept = MAX_STAGED - len(tree)
        return Probes(tuple(parents[:kept]), self.tokens.embeddings[numbers[:kept]])

    def _fitting(self, count: int, position: int) -> int:
        """How many of `count` prompt tokens have a place, the first one at `position`."""
        return count if self._limit is None else max(0, min(count, self._limit - position))

    def expected(self, budget: Budget) -> float:
        return self.layouts(budget.nodes).gain

    def finished(self, sequence: RunningSequence) -> None:
        self._probes.pop(sequence, None)
