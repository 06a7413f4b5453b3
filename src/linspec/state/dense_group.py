"""One inference step: the new tokens of several sequences, packed for the linear layers.

All new nodes of all rows form one [M, D] matrix; mixers see them by *segment*, a run of neighbouring
slots with the same form, as dense [R, N, ...] tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from linspec.decoding.step import STAGE_ROWS, Feed
from linspec.decoding.tree import Shape, chain_shape, shape_of
from linspec.decoding.tree_mask import Layout
from linspec.errors import ConfigError, StateError
from linspec.state.decoder_state import DecoderState
from linspec.state.row_state import RowState


@dataclass
class Segment:
    """Neighbouring slots whose new nodes the mixers see as one dense group.

    lengths: new nodes of each slot. shapes: of all that it has staged then, the new nodes last.
    """

    start: int
    lengths: list[int]
    shapes: list[Shape]
    long: bool

    @property
    def slots(self) -> slice:
        return slice(self.start, self.start + len(self.lengths))

    @property
    def slot_range(self) -> range:
        return range(self.start, self.start + len(self.lengths))

    @cached_property
    def nodes(self) -> int:
        """Most new nodes of one row."""
        return max(self.lengths)

    @cached_property
    def index(self) -> torch.Tensor | None:
        """Places of the packed nodes among the dense ones; None when they are the same."""
        if all(n == self.nodes for n in self.lengths):
            return None
        rows = [torch.arange(n) + i * self.nodes for i, n in enumerate(self.lengths)]
        return torch.cat(rows)

    first: int = 0  # of this segment's nodes in the packed matrix

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """[M, H, K] -> this segment's [R, N, H, K], zero where a row has fewer nodes."""
        mine = packed[self.first : self.first + sum(self.lengths)]
        if self.index is not None:
            dense = mine.new_zeros(len(self.lengths) * self.nodes, *mine.shape[1:])
            mine = dense.index_copy(0, self.index.to(mine.device), mine)
        return mine.unflatten(0, (len(self.lengths), self.nodes))

    def pack(self, dense: torch.Tensor) -> torch.Tensor:
        """The inverse of `unpack`."""
        flat = dense.flatten(0, 1)
        return flat if self.index is None else flat[self.index.to(flat.device)]

    def layout(self, state: RowState) -> Layout:
        """Who sees whom, for a segment of trees; computed once for all layers of `state`."""
        if id(state) not in self._layouts:
            self._layouts[id(state)] = state.layout(self.start, self.shapes, self.lengths)
        return self._layouts[id(state)]

    def __post_init__(self) -> None:
        self._layouts: dict[int, Layout] = {}


def segments_of(feeds: Sequence[Feed], state: DecoderState) -> list[Segment]:
    """Group feeds (in order of their slots) into segments; raises ConfigError on a malformed feed."""
    slots = [feed.slot for feed in feeds]
    if len(set(slots)) < len(slots) or not all(0 <= slot < state.slots for slot in slots):
        raise ConfigError(f"slots {slots} are not different slots of a state of {state.slots}")
    segments: list[Segment] = []
    first = 0
    for feed in feeds:
        count, shape = len(feed.tokens), _shape(feed, state)
        long = count > STAGE_ROWS
        last = segments[-1] if segments else None
        if last is None or last.long != long or last.slots.stop != feed.slot:
            last = Segment(feed.slot, [], [], long, first)
            segments.append(last)
        last.lengths.append(count)
        last.shapes.append(shape)
        first += count
    return segments


def _shape(feed: Feed, state: DecoderState) -> Shape:
    """The shape of what the slot has staged after this step; raises ConfigError on a malformed feed."""
    count, staged = len(feed.tokens), state.staged(feed.slot)
    if count == 0:
        raise ConfigError(f"slot {feed.slot} was fed no tokens; leave it out of the step")
    if state.staged_aside(feed.slot):
        raise StateError(
            f"slot {feed.slot} has staged a chain of {len(staged)} tokens; commit it before staging more"
        )
    if feed.parents is None:
        if staged:
            raise ConfigError(f"slot {feed.slot} has staged nodes: name the parents of new ones")
        return chain_shape(count)
    if len(feed.parents) != count:
        raise ConfigError(
            f"slot {feed.slot} was fed {count} tokens and {len(feed.parents)} parents"
        )
    try:
        shape = shape_of((*staged.parents, *feed.parents))
    except ConfigError as error:
        raise ConfigError(f"slot {feed.slot}: {error}") from error
    if len(shape) > STAGE_ROWS and (staged or not shape.is_chain):
        raise ConfigError(
            f"a tree of {len(shape)} nodes is too large: {STAGE_ROWS} nodes can be staged at once, "
            "or a longer chain from the last committed token"
        )
    return shape
