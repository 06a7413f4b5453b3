"""Texts that share their beginnings, as a radix tree: what is kept of one serves all that go on from it.

An edge holds tokens and the rows that caches which grow have of them, so texts with a common beginning share
its rows. A node that was the end of a text may hold the rest of a state: sums, open groups, windows.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, NamedTuple

import torch

from linspec.state.sequence_states import Rows

_TOKEN_BYTES = 8


def as_tokens(tokens: Sequence[int]) -> array[int]:
    """Tokens in 8 bytes each."""
    return array("q", tokens)


@dataclass(eq=False, slots=True)
class Node:
    """The end of an edge.

    Attributes:
        tokens: of the edge.
        parent: None for a root.
        rows: of the tokens of the edge.
        rest: of the state of the text that ends here; None if it is not kept.
        end: length of the text that ends here.
    """

    tokens: array[int]
    parent: Node | None
    rows: Rows = ()
    rest: list[Any] | None = None
    end: int = 0
    children: dict[int, Node] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Bytes of the edge and of the rest."""
        return _TOKEN_BYTES * len(self.tokens) + tensor_bytes(self.rows) + tensor_bytes(self.rest)

    def path(self) -> list[Node]:
        """The nodes from the root, which is not among them, down to this one."""
        found: list[Node] = []
        node: Node | None = self
        while node is not None and node.parent is not None:
            found.append(node)
            node = node.parent
        return found[::-1]

    def text(self) -> array[int]:
        """All tokens from the root on."""
        found = as_tokens(())
        for node in self.path():
            found += node.tokens
        return found


class Match(NamedTuple):
    """How far a text is known.

    node: the last node that the text reaches. beyond: the end of an edge that it leaves half-way, if it does.
    shared: how many tokens the tree and the text have in common.
    """

    node: Node
    beyond: Node | None
    shared: int


def match(root: Node, tokens: array[int]) -> Match:
    """Follow `tokens` from `root` as far as they are known."""
    node, at = root, 0
    while at < len(tokens):
        child = node.children.get(tokens[at])
        if child is None:
            break
        same = common(child.tokens, tokens, at)
        at += same
        if same < len(child.tokens):
            return Match(node, child, at)
        node = child
    return Match(node, None, at)


def common(edge: array[int], tokens: array[int], at: int) -> int:
    """How many tokens of `edge` stand in `tokens` from `at` on."""
    count = min(len(edge), len(tokens) - at)
    if edge[:count] == tokens[at : at + count]:
        return count
    return next(i for i in range(count) if edge[i] != tokens[at + i])


def split(node: Node, count: int) -> Node:
    """Cut the edge of `node` behind `count` tokens; returns the new node there, which is its parent then."""
    assert node.parent is not None and 0 < count < len(node.tokens), "nothing is cut there"
    upper = Node(node.tokens[:count], node.parent, cut(node.rows, 0, count))
    upper.end = node.end - len(node.tokens) + count
    node.rows, node.tokens = cut(node.rows, count, len(node.tokens)), node.tokens[count:]
    node.parent.children[upper.tokens[0]] = upper
    upper.children[node.tokens[0]] = node
    node.parent = upper
    return upper


def cut(rows: Rows, start: int, stop: int) -> Rows:
    """Copies of some rows: a view would keep the memory of all of them."""
    return tuple((k[:, :, start:stop].clone(), v[:, :, start:stop].clone()) for k, v in rows)


def tensor_bytes(kept: Any) -> int:
    """Bytes of all tensors in what is kept: lists, tuples and dataclasses of them."""
    if isinstance(kept, torch.Tensor):
        return kept.nbytes
    if isinstance(kept, list | tuple):
        return sum(map(tensor_bytes, kept))
    if is_dataclass(kept) and not isinstance(kept, type):
        return sum(tensor_bytes(getattr(kept, each.name)) for each in fields(kept))
    return 0
