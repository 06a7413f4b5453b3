"""Medusa (Cai et al. 2024, arXiv 2401.10774): heads on the last hidden state draft a token tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Self

from torch import nn

from linspec.drafters.base import DRAFTERS, MAX_NODES, Drafter, DrafterContext
from linspec.drafters.heads import Heads, MedusaHeads
from linspec.drafters.packed import PackedHeads
from linspec.drafters.saved import load_heads
from linspec.errors import DrafterError
from linspec.kernels.cpu.linear import NativeLinear
from linspec.kernels.linear import Quantizer, integer_bits, pick_kernel
from linspec.models.decoder import Decoder
from linspec.options import option
from linspec.row import Row
from linspec.tree import TokenTree, best_first, root_only


@dataclass(frozen=True, slots=True)
class MedusaOptions:
    """Where the heads are."""

    path: Path | None = option(
        "directory of the heads; none is 'medusa' in the model's directory",
        default=None,
        short=True,
    )


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
    are likeliest to be right, so smaller budgets are prefixes of larger ones.
    """

    def __init__(self, heads: Heads) -> None:
        self.heads, accuracies = heads, heads.accuracies
        self._paths = best_first(accuracies, MAX_NODES)
        if not self._paths:
            raise DrafterError(
                "these heads were never calibrated, so no tree can be made of them; train them with "
                "linspec train-drafter"
            )
        self.max_nodes = len(self._paths)
        index = {path: node for node, path in enumerate(self._paths, 1)}
        index[()] = 0
        self._parents = (-1, *(index[path[:-1]] for path in self._paths))
        # what the tree of n nodes asks of the heads: how many of them, and how many guesses each
        self._depths = list(accumulate((len(path) for path in self._paths), max, initial=0))
        self._tops = list(accumulate((path[-1] + 1 for path in self._paths), max, initial=0))
        gains = (
            prod(accuracies[depth][rank] for depth, rank in enumerate(path)) for path in self._paths
        )
        self._gains = list(accumulate(gains, initial=0.0))

    @classmethod
    def build(cls, context: DrafterContext, options: MedusaOptions) -> Self:
        """With heads from disk."""
        target = context.decoder(cls.name)
        beside = context.source / "medusa" if context.source else None
        folder = options.path or beside
        if folder is None or not folder.exists():
            raise DrafterError(
                f"no Medusa heads in {folder}; train them with `linspec train-drafter MODEL`, or name "
                "their directory: medusa:DIR"
            )
        return cls(ready_heads(folder, target))

    def propose(self, rows: Sequence[Row], budgets: Sequence[int]) -> list[TokenTree]:
        hidden = [row.hidden for row in rows if row.hidden is not None]
        nodes = min(max(budgets), self.max_nodes)
        heads, top = self._depths[nodes], self._tops[nodes]
        guesses = iter(self.heads.guess(hidden, heads, top) if hidden else ())
        places = [(len(path) - 1) * top + path[-1] for path in self._paths[:nodes]]
        trees = []
        for row, budget in zip(rows, budgets, strict=True):
            if row.hidden is None:
                trees.append(root_only(row.root))
                continue
            guessed = next(guesses)
            tokens = (row.root, *(guessed[place] for place in places[:budget]))
            trees.append(TokenTree(tokens, self._parents[: len(tokens)]))
        return trees

    def expected(self, nodes: int) -> float:
        return self._gains[min(nodes, len(self._gains) - 1)]


def ready_heads(folder: Path, target: Decoder) -> Heads:
    """The heads in `folder` in the form that suits `target`, which may be prepared later."""
    heads = load_heads(folder, target)
    if isinstance(heads, MedusaHeads) and _runs_natively(target.head):
        heads = PackedHeads.of(heads, Quantizer(integer_bits(target.head) or 8, {}))
    heads.follow(target)
    return heads


def _runs_natively(head: nn.Module) -> bool:
    """Whether an output layer is one of linspec's own, or becomes one when it is prepared."""
    if isinstance(head, nn.Linear):
        return pick_kernel(head.weight).own
    return isinstance(head, NativeLinear)
