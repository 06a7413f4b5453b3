"""Token trees: draft tokens with parents. A chain is a tree, a plain step is a tree of one node.

Nodes are in topological order. Node 0 is the root: the newest token of the sequence, already decided
but not yet committed to the state. Every other node is a draft token; its parent precedes it.

A tree has its tokens and its `Shape`. Trees of equal form share one shape, which computes depths, children
and ancestors once; whoever needs them reads them there.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import torch

from linspec.errors import ConfigError

# shapes of more nodes are those of prompts, which are long and seldom come again
_SHAPES_KEPT, _NODES_KEPT = 512, 128


@dataclass(frozen=True)
class Shape:
    """The parent of each node; parents precede their children. Made by `shape_of`.

    Nodes without a parent have -1: they follow the last committed token. A tree has one of them, its root;
    nodes that are staged over several steps may have more. Raises ConfigError for any other parents.
    """

    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        for node, parent in enumerate(self.parents):
            if not -1 <= parent < node:
                raise ConfigError(f"node {node} has parent {parent}, which is not before it")

    def __len__(self) -> int:
        return len(self.parents)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Distance of each node from the root."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        return tuple(depths)

    @cached_property
    def deepest(self) -> int:
        """The greatest depth; 0 without nodes."""
        return max(self.depths, default=0)

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Children of each node, in node order."""
        found: list[list[int]] = [[] for _ in self.parents]
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                found[parent].append(node)
        return tuple(map(tuple, found))

    @cached_property
    def is_chain(self) -> bool:
        """True when every node's parent is the node before it."""
        return all(p == i - 1 for i, p in enumerate(self.parents))

    @cached_property
    def ancestor_bits(self) -> tuple[int, ...]:
        """For each node an integer whose bit i says that node i is the node itself or an ancestor."""
        bits: list[int] = []
        for node, parent in enumerate(self.parents):
            bits.append((bits[parent] if parent >= 0 else 0) | 1 << node)
        return tuple(bits)

    @cached_property
    def ancestors(self) -> torch.Tensor:
        """[N, N] bool: entry (i, j) says that j is i or an ancestor of i. Do not write to it."""
        count = len(self)
        rows = [[bool(bits >> node & 1) for node in range(count)] for bits in self.ancestor_bits]
        return torch.tensor(rows, dtype=torch.bool).view(count, count)

    def path_to(self, node: int) -> tuple[int, ...]:
        """Nodes from the root to `node`, both included."""
        path = [node]
        while self.parents[path[-1]] >= 0:
            path.append(self.parents[path[-1]])
        return tuple(reversed(path))


def shape_of(parents: Iterable[int]) -> Shape:
    """The shape with `parents`; raises ConfigError unless each is -1 or an earlier node."""
    parents = tuple(parents)
    return _kept_shape(parents) if len(parents) <= _NODES_KEPT else Shape(parents)


@lru_cache(maxsize=_SHAPES_KEPT)
def _kept_shape(parents: tuple[int, ...]) -> Shape:
    return Shape(parents)


def chain_shape(nodes: int) -> Shape:
    """The shape of a chain."""
    return shape_of(range(-1, nodes - 1))


@dataclass(frozen=True, slots=True)
class Budget:
    """The largest tree that a sequence may get.

    Depth is limited apart from the nodes because it costs positions: a draft at depth d needs d more
    positions, however wide the tree is.

    Attributes:
        nodes: most draft nodes, the root not counted.
        depth: greatest depth of a node; the root has depth 0.
        model_nodes: most draft nodes where a model drafts them, for drafters that also draft without one;
            None for as many.
        price: draft tokens that drafts of a model must bring beyond what was found without one.
    """

    nodes: int
    depth: int
    model_nodes: int | None = None
    price: float = 0.0

    @classmethod
    def of(cls, nodes: int) -> Budget:
        """A budget of `nodes` draft nodes that may all form one chain."""
        return cls(nodes, nodes)

    def within(self, nodes: int, depth: int) -> Budget:
        """This budget with at most `nodes` nodes and at most this `depth`."""
        depth = min(self.depth, depth)
        return replace(self, nodes=min(self.nodes, nodes), depth=depth) if depth > 0 else NO_DRAFTS

    @property
    def of_models(self) -> Budget:
        """What a model may draft of it."""
        return self if self.model_nodes is None else self.within(self.model_nodes, self.depth)

    @property
    def chain(self) -> int:
        """Most draft tokens of a chain."""
        return min(self.nodes, self.depth)

    def allows(self, tree: TokenTree) -> bool:
        """Whether `tree` keeps to this budget."""
        return len(tree) <= self.nodes + 1 and tree.shape.deepest <= self.depth


NO_DRAFTS = Budget(0, 0)


@dataclass(frozen=True)
class TokenTree:
    """The draft of one sequence: tokens with parents. A chain is a tree; one node alone is a plain step.

    Node 0 is the root, the newest token of the sequence. Parents precede their children.

    Attributes:
        tokens: token id of each of the N nodes.
        parents: number of the parent of each node; -1 for the root.
        proposals: for each node whose children were *sampled* by the drafter, the distribution [vocab] that
            they were sampled from. The lossless verifier needs it. Deterministic drafts, such as those of
            heads or look-up, have none.
        confidences: for each node, how likely the drafter holds it that the node is accepted once its parent
            is; 1 for the root. None if the drafter has no estimate.
        cut: the tree that this one is a `part` of, and the number there of each node; None for a whole one.
        regrow: where each token of the next round's tree of this shape is found, if the drafter makes it of
            what a step computes for it (`Drafter.follow`): 0 for the token behind the accepted path, n for
            number n - 1 of what follows. () where a device cannot make it.

    Raises:
        ConfigError: the lengths differ, there is not exactly one root, or a parent does not precede its
            child.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    proposals: Mapping[int, torch.Tensor] = field(default_factory=dict)
    confidences: tuple[float, ...] | None = None
    cut: tuple[TokenTree, tuple[int, ...]] | None = field(default=None, repr=False, compare=False)
    regrow: tuple[int, ...] = field(default=(), repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.tokens or len(self.tokens) != len(self.parents):
            raise ConfigError(
                f"a tree needs as many parents as tokens and at least its root, got "
                f"{len(self.tokens)} tokens and {len(self.parents)} parents"
            )
        if self.parents[0] != -1 or self.parents.count(-1) > 1:
            raise ConfigError(f"a tree has one root, node 0, with parent -1; got {self.parents}")
        if self.confidences is not None and len(self.confidences) != len(self.tokens):
            raise ConfigError(
                f"a tree needs a confidence for each of its {len(self.tokens)} nodes or none at all, "
                f"got {len(self.confidences)}"
            )
        # made here, so that no broken tree goes further
        self.shape  # noqa: B018

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def shape(self) -> Shape:
        """Depths, children and ancestors, shared by all trees of this form."""
        return shape_of(self.parents)

    @property
    def depths(self) -> tuple[int, ...]:
        """Distance of each node from the root."""
        return self.shape.depths

    @property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Children of each node, in node order."""
        return self.shape.children

    def path_to(self, node: int) -> tuple[int, ...]:
        """Nodes from the root to `node`, both included."""
        return self.shape.path_to(node)

    def regrown(self, token: int, follow: Sequence[int]) -> tuple[int, ...]:
        """The tokens of the next round's tree behind `token`, by what a step computed for the drafter."""
        found = (token, *follow)
        return tuple(found[at] for at in self.regrow)

    def without_proposals(self) -> TokenTree:
        """This tree without its distributions, for those who keep it and do not judge it."""
        if not self.proposals:
            return self
        return TokenTree(self.tokens, self.parents, confidences=self.confidences)

    def first(self, nodes: int) -> TokenTree:
        """The tree of the first `nodes` nodes, the root included."""
        kept = {node: distribution for node, distribution in self.proposals.items() if node < nodes}
        sure = None if self.confidences is None else self.confidences[:nodes]
        cut = None if self.cut is None else (self.cut[0], self.cut[1][:nodes])
        regrow = self.regrow[:nodes]
        return TokenTree(self.tokens[:nodes], self.parents[:nodes], kept, sure, cut, regrow)

    def part(self, nodes: Sequence[int]) -> TokenTree:
        """The tree of some `nodes` in their order, the root and the parent of each among them."""
        place = {node: i for i, node in enumerate(nodes)}
        whole, numbers = (self, range(len(self))) if self.cut is None else self.cut
        return TokenTree(
            tuple(self.tokens[node] for node in nodes),
            (-1, *(place[self.parents[node]] for node in nodes[1:])),
            {place[node]: given for node, given in self.proposals.items() if node in place},
            None if self.confidences is None else tuple(self.confidences[n] for n in nodes),
            (whole, tuple(numbers[node] for node in nodes)),
        )

    def uncut(self, path: Sequence[int]) -> tuple[TokenTree, tuple[int, ...]]:
        """The tree that this one is a part of, up to the last node of the part, and `path` in it."""
        if self.cut is None:
            return self, tuple(path)
        whole, numbers = self.cut
        return whole.first(numbers[-1] + 1), tuple(numbers[node] for node in path)


def root_only(token: int) -> TokenTree:
    """The tree of a plain decoding step."""
    return TokenTree((token,), (-1,), regrow=(0,))


def chain(tokens: Iterable[int], proposals: Mapping[int, torch.Tensor] | None = None) -> TokenTree:
    """Every token is the only child of the one before it; the first is the root."""
    tokens = tuple(tokens)
    return TokenTree(tokens, chain_shape(len(tokens)).parents, proposals or {})


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
