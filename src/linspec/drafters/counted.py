"""Trees whose tokens are counted somewhere: how likely each is, and what came of it.

A share is how often a token followed where the drafter counted. `Trust` learns how much of it is true, and
`NodeRates` how often the n-th node of a tree is accepted. Old rounds fade in both.
"""

from __future__ import annotations

import heapq
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

from linspec.decoding.sequence import RunningSequence
from linspec.decoding.tree import Budget, TokenTree
from linspec.drafters.base import MAX_NODES, PRIOR_COUNT, PRIOR_RATE, Drafter, DrafterContext

_FORGET = 0.98


class Counted(NamedTuple):
    """A token that may follow.

    share: how often it did where that was counted. where: what the drafter finds the next tokens by.
    """

    token: int
    share: float
    where: Any


@dataclass(slots=True)
class Draft:
    """A tree that grows, likeliest nodes first. Node 0 is the root, which is in none of the lists.

    evidence: of each node, how much its share was counted from. score: draft tokens that are expected to be
    accepted. room: draft nodes that it might have had.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    evidence: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    score: float = 0.0
    room: int = 0

    def tree(self, root: int) -> TokenTree:
        """The whole tree."""
        return TokenTree(
            (root, *self.tokens), (-1, *self.parents), confidences=(1.0, *self.confidences)
        )


class CountingDrafter(Drafter):
    """A drafter without a model, whose trees are grown from counts; needs only `grow`.

    `self.trust` corrects its shares.
    """

    confident = True
    model_free = True

    def __init__(self, context: DrafterContext | None = None, options: Any = None) -> None:
        super().__init__(context, options)
        self.trust = Trust()
        self._rates = NodeRates(MAX_NODES)
        self._drafts: dict[int, Draft] = {}

    @abstractmethod
    def grow(self, sequence: RunningSequence, budget: Budget) -> Draft:
        """The tree of a sequence; the same one if it is asked for again in a round."""

    def propose(
        self, sequences: Sequence[RunningSequence], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        trees = []
        for sequence, budget in zip(sequences, budgets, strict=True):
            draft = self.grow(sequence, budget)
            draft.room = budget.nodes
            self._drafts[sequence.number] = draft
            trees.append(draft.tree(sequence.root))
        return trees

    def expected(self, budget: Budget) -> float:
        return self._rates.expected(budget)

    def observe(self, sequence: RunningSequence, tree: TokenTree, path: Sequence[int]) -> None:
        draft = self._drafts[sequence.number]
        whole = len(tree) - 1 == len(draft.tokens)
        self._rates.observe(draft.room if whole else len(tree) - 1, path)
        for depth, node in enumerate(path):
            children = [child - 1 for child in tree.children[node]]
            if children:
                share = sum(draft.shares[child] for child in children)
                hit = depth + 1 < len(path)
                self.trust.observe(draft.evidence[children[0]], share, hit)

    def finished(self, sequence: RunningSequence) -> None:
        self._drafts.pop(sequence.number, None)


@dataclass(frozen=True, slots=True)
class Bounds:
    """How large a tree may be: nodes, depth, the least chance of a node, and tokens that end a text."""

    nodes: int
    depth: int
    min_prob: float
    ends: Collection[int]


Follow = Callable[[Any, int], tuple[Iterable[Counted], int]]
"""(where, depth) -> the tokens that may follow there, and how much their shares are counted from."""


def grown(start: Any, follow: Follow, bounds: Bounds, trust: Trust) -> Draft:
    """The nodes with the highest chances, which are products of shares along their paths.

    No other tree of as many nodes has more tokens accepted, if the shares are true.
    """
    draft, heap, order = Draft(), list[Any](), count()

    def push(where: Any, node: int, depth: int, reach: float) -> None:
        counted, evidence = follow(where, depth)
        rate = trust.rate(evidence)
        for token, share, behind in counted:
            chance = reach * share * rate
            if chance >= bounds.min_prob:
                entry = (
                    -chance,
                    next(order),
                    token,
                    node,
                    depth + 1,
                    share,
                    rate,
                    evidence,
                    behind,
                )
                heapq.heappush(heap, entry)

    push(start, 0, 0, 1.0)
    while heap and len(draft.tokens) < bounds.nodes:
        negative, _, token, parent, depth, share, rate, evidence, behind = heapq.heappop(heap)
        draft.tokens.append(token)
        draft.parents.append(parent)
        draft.shares.append(share)
        draft.evidence.append(evidence)
        draft.confidences.append(share * rate)
        draft.score -= negative
        if depth < bounds.depth and token not in bounds.ends:
            push(behind, len(draft.tokens), depth, -negative)
    return draft


class NodeRates:
    """Of trees whose likeliest nodes come first: how often the n-th node is accepted.

    A tree that its drafter ended before the budget did counts for every size that it might have had. Rounds
    without drafts do not count: they are plain rounds and cost what those cost.
    """

    def __init__(self, most: int) -> None:
        self._tried, self._hits = [0.0] * most, [0.0] * most

    def observe(self, room: int, path: Sequence[int]) -> None:
        """Count the accepted nodes of a tree that had room for `room` draft nodes."""
        accepted = set(path)
        for i in range(min(room, len(self._tried))):
            self._tried[i] = _FORGET * self._tried[i] + 1
            self._hits[i] = _FORGET * self._hits[i] + (i + 1 in accepted)

    def expected(self, budget: Budget) -> float:
        """The mean number of accepted draft tokens of a tree within `budget`."""
        total, prior = 0.0, PRIOR_COUNT
        for tried, hits in zip(self._tried[: budget.nodes], self._hits, strict=False):
            prior *= PRIOR_RATE
            total += (hits + prior) / (tried + PRIOR_COUNT)
        # one path is accepted, and none is deeper
        return min(total, float(budget.depth))


class Trust:
    """Of shares that a drafter counted: how much of each is true, by how much it was counted from.

    A token that always followed a match of two tokens follows the next one less surely than its count says,
    and one behind a match of fifty tokens about as surely. Evidence counts in powers of two.
    """

    def __init__(self) -> None:
        self._predicted: dict[int, float] = {}
        self._hits: dict[int, float] = {}

    def rate(self, evidence: int) -> float:
        """What a share counted from so much evidence is to be multiplied by."""
        level = evidence.bit_length()
        prior = 1 - PRIOR_RATE**level
        predicted, hits = self._predicted.get(level, 0.0), self._hits.get(level, 0.0)
        return min(1.0, (hits + prior * PRIOR_COUNT) / (predicted + PRIOR_COUNT))

    def observe(self, evidence: int, predicted: float, hit: bool) -> None:
        """Learn from drafts that together had the share `predicted`: whether one of them was right."""
        level = evidence.bit_length()
        self._predicted[level] = _FORGET * self._predicted.get(level, 0.0) + predicted
        self._hits[level] = _FORGET * self._hits.get(level, 0.0) + hit
