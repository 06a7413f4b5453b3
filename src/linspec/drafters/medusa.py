"""Medusa (Cai et al. 2024, arXiv 2401.10774): heads on the last hidden state draft a token tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Self

import torch
from torch import nn

from linspec.decoding.sequence import RunningSequence
from linspec.decoding.step import FINAL, Want
from linspec.decoding.tree import Budget, TokenTree, best_first, root_only
from linspec.drafters.base import DRAFTERS, MAX_NODES, Drafter, DrafterContext
from linspec.drafters.found import find_drafter, is_at_hand, path_option
from linspec.drafters.heads import Heads, MedusaHeads
from linspec.drafters.packed import PackedHeads
from linspec.drafters.saved_packed import HEADS
from linspec.drafters.trained import Files
from linspec.errors import DrafterError
from linspec.kernels.selector import pick_kernel
from linspec.models.decoder import Decoder
from linspec.models.linear import Quantizer, integer_bits
from linspec.models.native_linear import NativeLinear


@dataclass(frozen=True, slots=True)
class MedusaOptions:
    """Where the heads are."""

    path: Path | None = path_option("the heads", "medusa")


@DRAFTERS.register(
    "medusa",
    summary="extra heads guess the next tokens; a tree calibrated on data is verified",
    paper="Cai et al. 2024, arXiv 2401.10774",
    needs="trained heads: linspec train-drafter",
    options=MedusaOptions,
)
class Medusa(Drafter):
    """Trees of the heads' likeliest tokens, shaped by their accuracies on held-out data.

    Head k guesses the token k places behind the root. The tree of n nodes holds the n rank paths that
    are likeliest to be right, so smaller budgets are prefixes of larger ones of the same depth.
    """

    needs = Want((FINAL,))
    files = Files(HEADS.load, HEADS.pack)

    def __init__(self, heads: Heads) -> None:
        self.heads = heads
        self._ranked: dict[int, _Ranked] = {}
        self.max_nodes = len(self._within(len(heads.accuracies)).paths)
        # the most guesses of a head that a tree of any depth has
        ranks = max(map(len, heads.accuracies), default=0)
        self._top = min(ranks, heads.config.vocabulary or heads.config.vocab_size)
        if isinstance(heads, MedusaHeads):
            self.follow = self._follow
        if not self.max_nodes:
            raise DrafterError(
                "these heads were never calibrated, so no tree can be made of them; train them with "
                "linspec train-drafter"
            )

    @classmethod
    def build(cls, context: DrafterContext, options: MedusaOptions) -> Self:
        """With heads from disk."""
        target = context.decoder(cls.name)
        folder = find_drafter(cls.name, options.path, context)
        return cls(ready_heads(folder, target))

    @classmethod
    def at_hand(cls, context: DrafterContext) -> bool:
        return is_at_hand(cls.name, context)

    def _within(self, depth: int) -> _Ranked:
        """The rank paths of at most `depth`: near the end of its room a tree is wide, not small."""
        depth = min(depth, len(self.heads.accuracies))
        if depth not in self._ranked:
            self._ranked[depth] = _ranked(self.heads.accuracies[:depth])
        return self._ranked[depth]

    def propose(
        self, sequences: Sequence[RunningSequence], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        # those of the others came with the last step
        asked = [each for each in sequences if each.hidden and not each.follow]
        hidden = [each.hidden[FINAL][-1] for each in asked]
        shapes = [(self._within(budget.depth), budget.nodes) for budget in budgets]
        heads = max(ranked.heads(nodes) for ranked, nodes in shapes)
        top = max(ranked.top(nodes) for ranked, nodes in shapes)
        roots = [each.root for each in asked]
        guesses = iter(self.heads.guess(hidden, roots, heads, top) if asked else ())
        trees = []
        for sequence, (ranked, nodes) in zip(sequences, shapes, strict=True):
            if not sequence.hidden:
                trees.append(root_only(sequence.root))
                continue
            given: Sequence[int] = sequence.follow
            guessed, width = (given, self._top) if given else (next(guesses), top)
            found = [guessed[depth * width + rank] for depth, rank in ranked.ends[:nodes]]
            parents, regrow = ranked.parents[: len(found) + 1], self._regrow(ranked, nodes)
            trees.append(TokenTree((sequence.root, *found), parents, regrow=regrow))
        return trees

    def _regrow(self, ranked: _Ranked, nodes: int) -> tuple[int, ...]:
        """Where a tree finds its tokens behind what `_follow` computes."""
        if self.follow is None:
            return ()
        return (0, *(1 + depth * self._top + rank for depth, rank in ranked.ends[:nodes]))

    def _follow(self, hidden: torch.Tensor, roots: torch.Tensor) -> torch.Tensor:
        """All guesses that any tree can need, in the step that decides about its root."""
        return self.heads.likely(hidden, roots, len(self.heads.accuracies), self._top)

    def expected(self, budget: Budget) -> float:
        gains = self._within(budget.depth).gains
        return gains[min(budget.nodes, len(gains) - 1)]


@dataclass(frozen=True)
class _Ranked:
    """The rank paths of some heads, likeliest first; what the tree of the first n of them is.

    parents: of the nodes, root first. gains[n]: drafts that n nodes are expected to have accepted.
    """

    paths: list[tuple[int, ...]]
    parents: tuple[int, ...]
    gains: list[float]

    @cached_property
    def ends(self) -> list[tuple[int, int]]:
        """Where each node's token is found: which head guessed it, and as its which best."""
        return [(len(path) - 1, path[-1]) for path in self.paths]

    @cached_property
    def _heads(self) -> list[int]:
        return list(accumulate((len(path) for path in self.paths), max, initial=0))

    @cached_property
    def _tops(self) -> list[int]:
        return list(accumulate((path[-1] + 1 for path in self.paths), max, initial=0))

    def heads(self, nodes: int) -> int:
        """How many heads the first `nodes` nodes need."""
        return self._heads[min(nodes, len(self.paths))]

    def top(self, nodes: int) -> int:
        """How many guesses of each."""
        return self._tops[min(nodes, len(self.paths))]


def _ranked(accuracies: Sequence[Sequence[float]]) -> _Ranked:
    paths = best_first(accuracies, MAX_NODES)
    index = {path: node for node, path in enumerate(paths, 1)}
    index[()] = 0
    gains = (prod(accuracies[depth][rank] for depth, rank in enumerate(path)) for path in paths)
    return _Ranked(
        paths, (-1, *(index[path[:-1]] for path in paths)), list(accumulate(gains, initial=0.0))
    )


def ready_heads(folder: Path, target: Decoder) -> Heads:
    """The heads in `folder` in the form that suits `target`, which may be prepared later."""
    heads = HEADS.load(folder, target)
    on_cpu = target.device.type == "cpu"
    if on_cpu and isinstance(heads, MedusaHeads) and runs_natively(target.head):
        heads = PackedHeads.of(heads, Quantizer(integer_bits(target.head) or 8, {}))
    return heads


def runs_natively(head: nn.Module) -> bool:
    """Whether kernels of the CPU multiply by an output layer, or will when it is prepared."""
    if isinstance(head, nn.Linear):
        return pick_kernel(head.weight).own
    return isinstance(head, NativeLinear) and head.packed.device.type == "cpu"
