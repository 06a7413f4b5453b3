"""One inference step: the new tokens of several sequences, packed for the linear layers.

All new nodes of all rows form one [M, D] matrix; mixers see them by *dense_group*, a run of neighbouring
slots with the same form, as dense [R, N, ...] tensors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from linspec.decoding.step import MAX_STAGED, StepInput, Watch
from linspec.decoding.tree import Shape, chain_shape, shape_of
from linspec.decoding.tree_mask import TreeMask
from linspec.errors import ConfigError, StateError
from linspec.state.contract import EntryState
from linspec.state.sequence_states import SequenceStates
from linspec.utils.messages import shown


@dataclass
class DenseGroup:
    """Neighbouring slots whose new nodes the mixers see as one dense group.

    lengths: new nodes of each slot. shapes: of all that it has staged then, the new nodes last. overwrite:
    positions whose entries the tokens of one slot replace instead of being staged; causal, branch, blocks
    and watch: see StepInput.
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

    first: int = 0  # of this dense_group's nodes in the packed matrix
    overwrite: Sequence[int] | None = None
    causal: bool = True
    branch: int = 0
    blocks: int | None = None
    watch: Watch | None = None

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """[M, H, K] -> this dense_group's [R, N, H, K], zero where a row has fewer nodes."""
        mine = packed[self.first : self.first + sum(self.lengths)]
        if self.index is not None:
            dense = mine.new_zeros(len(self.lengths) * self.nodes, *mine.shape[1:])
            mine = dense.index_copy(0, self.index.to(mine.device), mine)
        return mine.unflatten(0, (len(self.lengths), self.nodes))

    def pack(self, dense: torch.Tensor) -> torch.Tensor:
        """The inverse of `unpack`."""
        flat = dense.flatten(0, 1)
        return flat if self.index is None else flat[self.index.to(flat.device)]

    def tree_mask(self, state: EntryState) -> TreeMask:
        """The tree mask of these slots; computed once for all layers of `state`."""
        found = self._tree_masks.get(id(state))
        if found is None:
            if self.overwrite is None:
                found = state.tree_mask(self.start, self.shapes, self.lengths)
            else:
                found = state.overwrite_mask(
                    self.start, self.overwrite, causal=self.causal, blocks=self.blocks
                )
            self._tree_masks[id(state)] = found
        return found

    def __post_init__(self) -> None:
        self._tree_masks: dict[int, TreeMask] = {}
        # what layers hand to later ones, by the row that it is of, None where it is of all together
        self.handed: dict[int | None, dict[Hashable, Any]] = defaultdict(dict)


def staged_shapes(inputs: Sequence[StepInput], state: SequenceStates) -> list[Shape]:
    """Shapes of what each slot has staged after a step; raises ConfigError on a malformed input."""
    if not inputs:
        raise ConfigError("a step takes one input or more, got none")
    slots = [step_input.slot for step_input in inputs]
    _check_branches(inputs)
    different = len({(each.slot, each.branch) for each in inputs}) == len(inputs)
    if not different or not all(0 <= slot < state.slots for slot in slots):
        raise ConfigError(f"slots {slots} are not different slots of a state of {state.slots}")
    return [_shape(step_input, state) for step_input in inputs]


def open_branches(inputs: Sequence[StepInput], state: SequenceStates) -> dict[int, list[int]]:
    """Have places for the branches of a step: of each slot that has some, its own and theirs."""
    rows: dict[int, list[Sequence[int]]] = {}
    for each in inputs:
        if each.overwrite is not None:
            rows.setdefault(each.slot, []).append(each.overwrite)
    places = {slot: state.open_branches(slot, mine) for slot, mine in rows.items()}
    return {slot: mine for slot, mine in places.items() if len(mine) > 1}


def dense_groups_of(inputs: Sequence[StepInput], shapes: Sequence[Shape]) -> list[DenseGroup]:
    """Group inputs, in order of their slots, and their `staged_shapes`."""
    dense_groups: list[DenseGroup] = []
    first = 0
    for step_input, shape in zip(inputs, shapes, strict=True):
        count, over = len(step_input.tokens), step_input.overwrite
        long = count > MAX_STAGED and over is None
        last = dense_groups[-1] if dense_groups else None
        # what overwrites is alone: its mask is of its own
        alone = over is not None or (last is not None and last.overwrite is not None)
        if last is None or alone or last.long != long or last.slots.stop != step_input.slot:
            form = over, step_input.causal, step_input.branch, step_input.blocks, step_input.watch
            last = DenseGroup(step_input.slot, [], [], long, first, *form)
            dense_groups.append(last)
        last.lengths.append(count)
        last.shapes.append(shape)
        first += count
    return dense_groups


def _check_branches(inputs: Sequence[StepInput]) -> None:
    """Raise ConfigError for a branch that does not follow the one before it, or that stages nodes."""
    for i, each in enumerate(inputs):
        before = inputs[i - 1] if i else each
        follows = (before.slot, before.branch) == (each.slot, each.branch - 1)
        if each.branch and not (follows and None not in (before.overwrite, each.overwrite)):
            raise ConfigError(
                f"branch {each.branch} of slot {each.slot} follows no branch {each.branch - 1}; give the "
                "branches of a slot one behind the other, from 0 on, each with `overwrite`"
            )
        if each.branch and each.causal != before.causal:
            raise ConfigError(
                f"branches {before.branch} and {each.branch} of slot {each.slot} do not both see later "
                "positions; give all branches of a slot the same `causal`"
            )


def _shape(step_input: StepInput, state: SequenceStates) -> Shape:
    """The shape of what the slot has staged after this step; raises ConfigError on a malformed input."""
    count, staged = len(step_input.tokens), state.staged(step_input.slot)
    if count == 0:
        raise ConfigError(f"slot {step_input.slot} was fed no tokens; leave it out of the step")
    if state.staged_aside(step_input.slot):
        raise StateError(
            f"slot {step_input.slot} has staged a chain of {len(staged)} tokens; commit it before "
            "staging more"
        )
    if branches := state.branches(step_input.slot):
        raise StateError(
            f"slot {step_input.slot} has {branches} branches; keep one of them before its next step"
        )
    if step_input.overwrite is not None:
        return _overwritten(step_input, step_input.overwrite, state)
    if step_input.ephemeral is not None and len(step_input.ephemeral) != count:
        raise ConfigError(
            f"slot {step_input.slot} was fed {count} tokens and {len(step_input.ephemeral)} marks of "
            "ephemeral nodes; give one for each token"
        )
    if step_input.parents is None:
        if staged:
            raise ConfigError(
                f"slot {step_input.slot} has staged nodes: name the parents of new ones"
            )
        return chain_shape(count)
    if len(step_input.parents) != count:
        raise ConfigError(
            f"slot {step_input.slot} was fed {count} tokens and {len(step_input.parents)} parents"
        )
    try:
        shape = shape_of((*staged.parents, *step_input.parents))
    except ConfigError as error:
        raise ConfigError(f"slot {step_input.slot}: {error}") from error
    if len(shape) > MAX_STAGED and (staged or not shape.is_chain):
        raise ConfigError(
            f"a tree of {len(shape)} nodes is too large: {MAX_STAGED} nodes can be staged at once, "
            "or a longer chain from the last committed token"
        )
    return shape


def _overwritten(step_input: StepInput, positions: Sequence[int], state: SequenceStates) -> Shape:
    """The shape of a step that stages nothing; raises StateError where it cannot overwrite."""
    slot, count = step_input.slot, len(step_input.tokens)
    if any(type(position) is not int for position in positions):
        raise ConfigError(
            f"slot {slot} was fed tokens to overwrite positions {shown(repr(list(positions)))}; they must be "
            "whole numbers"
        )
    if len(set(positions)) != count or len(positions) != count:
        raise ConfigError(
            f"slot {slot} was fed {count} tokens to overwrite positions {list(positions)}; give each token "
            "a position of its own"
        )
    if state.staged(slot) or step_input.parents is not None or step_input.ephemeral is not None:
        raise StateError(
            f"slot {slot} cannot overwrite committed positions and stage nodes at once; commit or drop what "
            "is staged, and give no parents"
        )
    state.check_overwrite(slot, positions)
    return state.staged(slot)
