"""What a step is to compute, as the C side reads it: nodes of trees, a chain, nodes that overwrite."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterator, Sequence
from ctypes import c_int32, c_uint64, c_void_p
from itertools import groupby

from linspec.decoding.tree import chain_shape
from linspec.errors import InputError, StateError
from linspec.kernels.cpu.structs import MAX_NODES, InputStruct
from linspec.kernels.step_plan import NewNodes
from linspec.utils.messages import shown


def packed(nodes: Sequence[NewNodes]) -> tuple[list[int], list[int]]:
    """Tokens and positions of all new nodes."""
    tokens: list[int] = []
    positions: list[int] = []
    for new in nodes:
        tokens += new.tokens
        positions += new.positions
    return tokens, positions


def staged_inputs(nodes: Sequence[NewNodes]) -> ctypes.Array[InputStruct]:
    """Nodes of trees, one for each slot."""
    table, first = (InputStruct * len(nodes))(), 0
    for entry, new in zip(table, nodes, strict=True):
        bits = new.shape.ancestor_bits
        entry.slot, entry.first = new.slot, first
        entry.nodes, entry.staged = len(new.tokens), len(bits)
        entry.committed = ints(new.committed)
        entry.ancestors = (c_uint64 * len(bits))(*bits)
        first += len(new.tokens)
    return table


def overwriting_pieces(nodes: Sequence[NewNodes], group: int = 0) -> ctypes.Array[InputStruct]:
    """Nodes that overwrite, in pieces: nothing is staged, and all of a piece see the same committed rows.

    group: rows of the groups that nodes see as sums; 0 without. A piece then has nodes of few groups.
    """
    # as many groups as a piece can have
    unit = group * max(1, MAX_NODES // group) if group else None
    pieces = [
        (new, rows[part], part)
        for new, rows in zip(nodes, map(_overwritten, nodes), strict=True)
        for part in _parts(rows, new.blocks or unit)
    ]
    table, first = (InputStruct * len(pieces))(), 0
    for entry, (new, rows, part) in zip(table, pieces, strict=True):
        entry.slot, entry.first, entry.nodes = new.slot, first, len(rows)
        entry.committed, entry.overwritten = ints(_seen(new, rows[0])), ints(rows)
        if new.carried is not None:
            entry.behind, entry.carried = ints(new.behind), ints(new.carried[part])
        first += len(rows)
    return table


def _parts(rows: Sequence[int], blocks: int | None) -> Iterator[slice]:
    """Parts of rows that follow each other in one block, which is all of them without `blocks`."""
    first = 0
    for _, run in groupby(rows, lambda row: blocks and row // blocks):
        count = len(list(run))
        yield from _cut(first, count)
        first += count


def _cut(first: int, count: int) -> Iterator[slice]:
    """Parts of like sizes, none too large: a small one would read a whole cache for few rows."""
    parts = -(-count // MAX_NODES)
    for part in range(parts):
        yield slice(first + part * count // parts, first + (part + 1) * count // parts)


def _seen(new: NewNodes, row: int) -> Sequence[int]:
    """How many committed rows a node sees that replaces `row`, in the state of each kind."""
    if new.blocks is None:
        return new.committed
    end = (row // new.blocks + 1) * new.blocks
    return [min(end, rows) for rows in new.committed]


def _overwritten(new: NewNodes) -> Sequence[int]:
    """The rows that are overwritten, each once: the C side writes to them unseen."""
    rows, held = new.overwrite, min(new.committed)
    assert rows is not None, "the caller knows that the nodes overwrite"
    counts = {len(rows), len(set(rows)), len(new.tokens), len(new.positions)}
    if len(counts) > 1 or not 0 <= min(rows) <= max(rows) < held or min(new.positions) < 0:
        raise StateError(
            f"{len(new.tokens)} nodes at positions {shown(repr(list(new.positions)))} cannot overwrite rows "
            f"{shown(repr(list(rows)))} of slot {new.slot}, which has {held}; give each a row of its own"
        )
    return rows


def chain_pieces(new: NewNodes) -> ctypes.Array[InputStruct]:
    """A chain in pieces, each of which finds those before it among the committed rows of its slot."""
    count = len(new.tokens)
    table = (InputStruct * -(-count // MAX_NODES))()
    for entry, first in zip(table, range(0, count, MAX_NODES), strict=True):
        nodes = min(MAX_NODES, count - first)
        entry.slot, entry.first, entry.nodes, entry.staged = new.slot, first, nodes, nodes
        entry.committed = ints([rows + first for rows in new.committed])
        entry.ancestors = (c_uint64 * nodes)(*chain_shape(nodes).ancestor_bits)
    return table


def given(nodes: Sequence[NewNodes], width: int) -> ctypes.Array[c_void_p] | None:
    """For each new node the address of its embedding, null where it is that of its token."""
    if all(new.embeddings is None for new in nodes):
        return None
    rows: list[int | None] = []
    for new in nodes:
        if new.embeddings is None:
            rows += [None] * len(new.tokens)
            continue
        # the C side reads them unseen
        if new.embeddings.shape != (len(new.tokens), width):
            raise InputError(
                f"embeddings {list(new.embeddings.shape)} for {len(new.tokens)} tokens of a model of width "
                f"{width}; they must be [{len(new.tokens)}, {width}]"
            )
        rows += [row.data_ptr() for row in new.embeddings]
    return (c_void_p * len(rows))(*rows)


def token_ids(ids: Sequence[int], vocabulary: int) -> ctypes.Array[c_int32]:
    """Token ids, each a row of the embeddings: the C side reads it unseen."""
    if ids and not 0 <= min(ids) <= max(ids) < vocabulary:
        raise InputError(
            f"token ids from {shown(min(ids))} to {shown(max(ids))} are not all in 0..{vocabulary - 1}, "
            "which this model has"
        )
    return ints(ids)


def ints(numbers: Sequence[int]) -> ctypes.Array[c_int32]:
    try:
        # ctypes would cut off high bits
        return (c_int32 * len(numbers)).from_buffer(array("i", numbers))
    except OverflowError as error:
        raise StateError(
            "a text is longer than the 2^31 tokens that the kernels can count; shorten it"
        ) from error
