"""The picture of one round: the token tree, what the target accepted, and its bonus token.

The accepted path runs straight along the top row, rejected branches hang below it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from html import escape

from linspec.report.data import Round

_CHARACTER, _PADDING = 8.0, 9.0
_HEIGHT, _ROW, _GAP = 26.0, 34.0, 30.0
_LONGEST = 14
_MARGIN = 4.0
_SPACES = re.compile(" {3,}")


@dataclass(frozen=True, slots=True)
class _Node:
    """A box: its text, kind (root, accepted, rejected, bonus), column and row."""

    text: str
    kind: str
    depth: int
    row: int
    parent: int


def visible(text: str) -> str:
    """A token's text with its white space made visible, shortened to fit a box."""
    shown = _SPACES.sub(lambda run: f"·×{len(run[0])}", text).replace(" ", "·")
    shown = shown.replace("\r", "␍").replace("\n", "↵").replace("\t", "⇥")
    shown = "".join(c if c.isprintable() else "�" for c in shown) or "∅"
    return shown if len(shown) <= _LONGEST else shown[: _LONGEST - 1] + "…"


def render_round(round_: Round) -> str:
    """The round as an <svg> element of fixed size, coloured by the page's classes."""
    nodes = _place(round_)
    columns = _columns(nodes)
    width = columns[-1] + _MARGIN - _GAP
    height = (max(node.row for node in nodes) + 1) * _ROW - (_ROW - _HEIGHT) + 2 * _MARGIN
    # rejected edges first: the accepted path is drawn over what they share with it
    drawn = sorted((n for n in nodes if n.parent >= 0), key=lambda n: n.kind != "rejected")
    parts = [_edge(nodes[node.parent], node, columns) for node in drawn]
    parts += [_box(node, columns) for node in nodes]
    label = f"{len(round_.texts) - 1} draft tokens, {len(round_.path) - 1} accepted"
    return (
        f'<svg class="tree" role="img" aria-label="{label}" width="{width:.0f}" '
        f'height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}">{"".join(parts)}</svg>'
    )


def _place(round_: Round) -> list[_Node]:
    """Depth-first, the accepted child first, so that it shares its parent's row."""
    texts, parents = [*round_.texts, round_.bonus], [*round_.parents, round_.path[-1]]
    bonus, accepted = len(round_.texts), set(round_.path)
    children: list[list[int]] = [[] for _ in texts]
    for node, parent in enumerate(parents):
        if parent >= 0:
            children[parent].append(node)
    # filled depth-first, so that a node's place is its index in the result
    placed: dict[int, _Node] = {}
    order: dict[int, int] = {}
    row, stack = -1, [(0, 0, True)]
    while stack:
        node, depth, opens = stack.pop()
        row += opens
        kind = "bonus" if node == bonus else "accepted" if node in accepted else "rejected"
        kind = "root" if node == 0 else kind
        order[node] = len(order)
        parent = order[parents[node]] if parents[node] >= 0 else -1
        placed[node] = _Node(visible(texts[node]), kind, depth, row, parent)
        ranked = sorted(children[node], key=lambda c: (c not in accepted and c != bonus, c))
        stack += [(child, depth + 1, i > 0) for i, child in reversed(list(enumerate(ranked)))]
    return list(placed.values())


def _columns(nodes: list[_Node]) -> list[float]:
    """Left edge of every column, and where one more would begin."""
    edges = [_MARGIN]
    for depth in range(max(node.depth for node in nodes) + 1):
        widest = max(_width(node) for node in nodes if node.depth == depth)
        edges.append(edges[-1] + widest + _GAP)
    return edges


def _width(node: _Node) -> float:
    return _CHARACTER * len(node.text) + 2 * _PADDING


def _edge(parent: _Node, node: _Node, columns: list[float]) -> str:
    x0, y0 = columns[parent.depth] + _width(parent), _middle(parent)
    x1, y1 = columns[node.depth], _middle(node)
    turn = x1 - _GAP / 2
    kind = "on" if node.kind != "rejected" else "off"
    return f'<path class="{kind}" d="M{x0:.1f} {y0:.1f}H{turn:.1f}V{y1:.1f}H{x1:.1f}"/>'


def _box(node: _Node, columns: list[float]) -> str:
    x, y = columns[node.depth], _middle(node)
    return (
        f'<g class="{node.kind}"><rect x="{x:.1f}" y="{y - _HEIGHT / 2:.1f}" '
        f'width="{_width(node):.1f}" height="{_HEIGHT:.0f}" rx="6"/>'
        f'<text x="{x + _PADDING:.1f}" y="{y + 4.5:.1f}">{escape(node.text)}</text></g>'
    )


def _middle(node: _Node) -> float:
    return _MARGIN + node.row * _ROW + _HEIGHT / 2
