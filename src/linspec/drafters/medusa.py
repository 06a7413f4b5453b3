"""Medusa (Cai et al. 2024, arXiv 2401.10774): heads on the last hidden state draft a token tree."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from linspec.drafters.base import DRAFTERS, Drafter
from linspec.drafters.heads import MedusaHeads
from linspec.row import Row
from linspec.row_state import STAGE_ROWS
from linspec.tree import TokenTree, best_first, root_only


@DRAFTERS.register(
    "medusa",
    summary="extra heads guess the next tokens; a tree calibrated on data is verified",
    paper="Cai et al. 2024, arXiv 2401.10774",
    needs="trained heads: linspec train-drafter",
)
class Medusa(Drafter):
    """Trees of the heads' likeliest tokens, shaped by their accuracies on held-out data.

    Head k guesses the token k places behind the root. The tree of n nodes holds the n rank paths that
    are likeliest to be right, so smaller budgets are prefixes of larger ones.
    """

    name = "medusa"

    def __init__(self, heads: MedusaHeads) -> None:
        self.heads, accuracies = heads, heads.accuracies
        self.max_nodes = STAGE_ROWS - 1
        self._paths = best_first(accuracies, self.max_nodes)
        index = {path: node for node, path in enumerate(self._paths, 1)}
        index[()] = 0
        self._parents = [-1] + [index[path[:-1]] for path in self._paths]
        # where each node's token stands among the heads' top guesses
        self._depths = torch.tensor([len(path) - 1 for path in self._paths])
        self._ranks = torch.tensor([path[-1] for path in self._paths])
        self._top = int(self._ranks.max()) + 1
        self._gains = [0.0]
        for path in self._paths:
            gain = 1.0
            for depth, rank in enumerate(path):
                gain *= accuracies[depth][rank]
            self._gains.append(self._gains[-1] + gain)

    def propose(self, rows: Sequence[Row], budgets: Sequence[int]) -> list[TokenTree]:
        ready = [row for row in rows if row.hidden is not None]
        guesses = iter(self._guess(ready) if ready else ())
        trees = []
        for row, budget in zip(rows, budgets, strict=True):
            if row.hidden is None:
                trees.append(root_only(row.root))
                continue
            tokens = next(guesses)[:budget]
            parents = self._parents[: len(tokens) + 1]
            trees.append(TokenTree((row.root, *tokens), tuple(parents)))
        return trees

    @torch.inference_mode()
    def _guess(self, rows: Sequence[Row]) -> list[list[int]]:
        """Tokens of all tree nodes for each row."""
        hidden = torch.stack([row.hidden for row in rows if row.hidden is not None])
        top = self.heads(hidden).topk(self._top, dim=-1).indices  # [R, heads, top]
        nodes: list[list[int]] = top[:, self._depths, self._ranks].tolist()
        return nodes

    def expected(self, nodes: int) -> float:
        return self._gains[min(nodes, len(self._gains) - 1)]
