"""The search of ADED as published (arXiv 2407.12021): Monte-Carlo tree search with the PUCT rule."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

from linspec.drafters.trigrams import Pair, Trigrams


@dataclass
class Node:
    """A state of the search: the pair that is followed, its prior, and what iterations found."""

    pair: Pair
    prior: float
    visits: int = 0
    reward: float = 0.0
    children: list[Node] = field(default_factory=list)


def search(
    table: Trigrams,
    root: Pair,
    *,
    length: int = 4,
    iterations: int = 150,
    c1: float = 32.0,
    c2: float = 8.0,
    seed: int = 0,
) -> Node:
    """The root, with visits in the nodes below it."""
    rng, top = random.Random(seed), Node(root, 1.0)
    for _ in range(iterations):
        path = [top]
        while path[-1].children and len(path) <= length:
            parent = path[-1]
            path.append(max(parent.children, key=lambda child: _puct(parent, child, c1, c2)))
        if len(path) <= length:
            found = table.successors(path[-1].pair)
            path[-1].children = [Node((path[-1].pair[1], token), p) for token, p in found]
            path += path[-1].children[-1:]
        reward = 1.0 + sum(node.prior for node in path[1:])
        pair, rest = path[-1].pair, length + 1 - len(path)
        while rest and (found := table.successors(pair)):
            ((token, share),) = rng.choices(found, [share for _, share in found])
            pair, reward, rest = (pair[1], token), reward + share, rest - 1
        for node in path:
            node.visits += 1
            node.reward += reward
    return top


def _puct(parent: Node, child: Node, c1: float, c2: float) -> float:
    if not child.visits:
        return math.inf
    explore = c1 + math.log((parent.visits + c2 + 1) / c2)
    bonus = child.prior * explore * math.sqrt(parent.visits) / (1 + child.visits)
    return child.reward / child.visits + bonus


def paths(node: Node, before: tuple[int, ...] = ()) -> dict[tuple[int, ...], int]:
    """Visits of each path of tokens below `node`."""
    found = {}
    for child in node.children:
        path = (*before, child.pair[1])
        found[path] = child.visits
        found |= paths(child, path)
    return found
