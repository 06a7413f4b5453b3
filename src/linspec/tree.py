"""Token trees: draft tokens with parents. A chain is a tree, a plain step is a tree of one node.

Nodes are in topological order. Node 0 is the root: the newest token of the sequence, already decided
but not yet committed to the state. Every other node is a draft token; its parent precedes it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch

from linspec.errors import ConfigError


@dataclass(frozen=True)
class TokenTree:
    """Tokens and parents of one sequence's draft.

    proposals: for a node whose children were *sampled* from a drafter's distribution, that
    distribution [vocab]; absent for drafts that are certain (heads, look-up). The lossless sampling
    verifier needs it.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    proposals: dict[int, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.tokens or len(self.tokens) != len(self.parents):
            raise ConfigError(
                f"a tree needs as many parents as tokens and at least its root, got "
                f"{len(self.tokens)} tokens and {len(self.parents)} parents"
            )
        if self.parents[0] != -1 or any(not 0 <= p < i for i, p in enumerate(self.parents) if i):
            raise ConfigError(
                f"parents must be topological with -1 for the root, got {self.parents}"
            )

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Distance of each node from the root."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        return tuple(depths)

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Children of each node, in node order."""
        found: list[list[int]] = [[] for _ in self.tokens]
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                found[parent].append(node)
        return tuple(map(tuple, found))

    @cached_property
    def is_chain(self) -> bool:
        """True when every node's parent is the node before it."""
        return all(p == i - 1 for i, p in enumerate(self.parents))

    @cached_property
    def ancestors(self) -> torch.Tensor:
        """[N, N] bool: entry (i, j) says that j is i or an ancestor of i."""
        return ancestor_matrix(self.parents)

    def path_to(self, node: int) -> tuple[int, ...]:
        """Nodes from the root to `node`, both included."""
        path = [node]
        while self.parents[path[-1]] >= 0:
            path.append(self.parents[path[-1]])
        return tuple(reversed(path))


@lru_cache(maxsize=256)
def ancestor_matrix(parents: tuple[int, ...]) -> torch.Tensor:
    """[N, N] bool of self-or-ancestor relations for topologically ordered parents; do not write to it."""
    rows: list[list[bool]] = []
    for node, parent in enumerate(parents):
        row = [False] * len(parents) if parent < 0 else rows[parent][:]
        row[node] = True
        rows.append(row)
    return torch.tensor(rows, dtype=torch.bool).view(len(parents), len(parents))


def root_only(token: int) -> TokenTree:
    """The tree of a plain decoding step."""
    return TokenTree((token,), (-1,))


def chain(tokens: Iterable[int]) -> TokenTree:
    """Every token is the only child of the one before it; the first is the root."""
    tokens = tuple(tokens)
    return TokenTree(tokens, tuple(range(-1, len(tokens) - 1)))


def ancestor_bits(parents: Sequence[int]) -> list[int]:
    """For each node an integer whose bit i says that node i is the node itself or an ancestor."""
    bits: list[int] = []
    for node, parent in enumerate(parents):
        bits.append((bits[parent] if parent >= 0 else 0) | 1 << node)
    return bits


def from_paths(root: int, paths: Iterable[Sequence[int]]) -> TokenTree:
    """The smallest tree that holds every path of draft tokens below `root`; shared prefixes merge."""
    tokens, parents = [root], [-1]
    index: dict[tuple[int, ...], int] = {(): 0}
    for path in paths:
        for end in range(1, len(path) + 1):
            prefix = tuple(path[:end])
            if prefix not in index:
                index[prefix] = len(tokens)
                tokens.append(path[end - 1])
                parents.append(index[prefix[:-1]])
    return TokenTree(tuple(tokens), tuple(parents))


def best_first(accuracies: Sequence[Sequence[float]], budget: int) -> list[tuple[int, ...]]:
    """Rank paths of the `budget` most likely draft nodes (Medusa, Cai et al. 2024, section 3.3).

    accuracies[d][k] is the probability that the rank-k guess for depth d + 1 is right. A path's
    probability is the product along it. The result lists paths of ranks, parents before children,
    most likely first; its first n entries are the best tree of n nodes for every n.
    """
    heap: list[tuple[float, tuple[int, ...]]] = []

    def push(path: tuple[int, ...], before: float) -> None:
        depth, rank = len(path) - 1, path[-1]
        if depth < len(accuracies) and rank < len(accuracies[depth]):
            heapq.heappush(heap, (-before * accuracies[depth][rank], path))

    # ranks are sorted by accuracy, so a node's next sibling is never likelier than the node
    push((0,), 1.0)
    chosen: list[tuple[int, ...]] = []
    while heap and len(chosen) < budget:
        negative, path = heapq.heappop(heap)
        chosen.append(path)
        rate = accuracies[len(path) - 1][path[-1]]
        before = -negative / rate if rate > 0 else 0.0
        push((*path[:-1], path[-1] + 1), before)
        push((*path, 0), -negative)
    return chosen
