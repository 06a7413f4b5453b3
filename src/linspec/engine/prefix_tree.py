"""Texts that share their beginnings, as a radix tree: what is kept of one serves all that go on from it.

An edge holds tokens and the pages that caches which grow have of them, so texts with a common beginning share
these. Two edges that meet within a page have one each, with their own tokens. A node that ended a text
may hold the rest of a state: sums, open groups, windows.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, NamedTuple

import torch

from linspec.kernels.step_plan import PAGE
from linspec.state.pages import Page
from linspec.state.sequence_states import Pages

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
        pages: those that tokens of the edge are in, with all that is ahead of these in a page.
        rest: of the state of the text that ends here; None if it is not kept.
        end: length of the text that ends here.
    """

    tokens: array[int]
    parent: Node | None
    pages: list[Pages] = field(default_factory=list)
    rest: list[Any] | None = None
    end: int = 0
    children: dict[int, Node] = field(default_factory=dict)

    @property
    def start(self) -> int:
        """Length of the text ahead of the edge."""
        return self.end - len(self.tokens)

    @property
    def bytes(self) -> int:
        """Bytes of the tokens of the edge and of the rest."""
        return _TOKEN_BYTES * len(self.tokens) + tensor_bytes(self.rest)

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
    first, at = node.start // PAGE, node.start + count
    upper = Node(node.tokens[:count], node.parent, node.pages[: -(-at // PAGE) - first], end=at)
    node.pages, node.tokens = node.pages[at // PAGE - first :], node.tokens[count:]
    node.parent.children[upper.tokens[0]] = upper
    upper.children[node.tokens[0]] = node
    node.parent = upper
    return upper


def pages_until(node: Node, length: int) -> list[Pages]:
    """The pages of the first `length` tokens of the text of `node`; none where no cache grows."""
    found: dict[int, Pages] = {}
    for each in node.path():
        if each.start < length:
            # the later of two edges that meet in a page has all of it
            found |= enumerate(each.pages, each.start // PAGE)
    return [pages for number, pages in sorted(found.items()) if number * PAGE < length]


def ends_within(leaf: Node) -> list[Node]:
    """The nodes above `leaf` that end in its first page: it has all that theirs has, and more."""
    if not leaf.pages:
        return []
    above, first = leaf.path()[:-1], leaf.start - leaf.start % PAGE
    return [node for node in above if node.end > first]


class PageUses:
    """How often pages are held: two edges may have one, which takes memory once."""

    def __init__(self) -> None:
        self._uses: Counter[Page] = Counter()

    def add(self, pages: Sequence[Pages]) -> int:
        """Hold these too; returns the bytes of those that were not held."""
        found = [page for each in pages for page in each]
        new = sum(page.bytes for page in found if page not in self._uses)
        self._uses.update(found)
        return new

    def remove(self, pages: Sequence[Pages]) -> int:
        """Hold these no longer; returns the bytes of those that nobody holds then."""
        gone = 0
        for page in (page for each in pages for page in each):
            self._uses[page] -= 1
            if not self._uses[page]:
                del self._uses[page]
                gone += page.bytes
        return gone


def tensor_bytes(kept: Any) -> int:
    """Bytes of all tensors in what is kept: lists, tuples, dictionaries and dataclasses of them."""
    if isinstance(kept, torch.Tensor):
        return kept.nbytes
    if isinstance(kept, list | tuple):
        return sum(map(tensor_bytes, kept))
    if isinstance(kept, dict):
        return sum(map(tensor_bytes, kept.values()))
    if is_dataclass(kept) and not isinstance(kept, type):
        return sum(tensor_bytes(getattr(kept, each.name)) for each in fields(kept))
    return 0
