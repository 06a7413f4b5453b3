"""What a recorded step has decided about its trees, as the host reads it: one round, or several in a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import torch

from linspec.decoding.judged import Judged
from linspec.decoding.step import FINAL, MAX_STAGED, StepInput
from linspec.decoding.tree import Shape, chain_shape
from linspec.kernels.gpu.host_copy import HostCopy
from linspec.state.sequence_states import SequenceStates

# whether a device runs rounds ahead of the host
SWITCH = "LINSPEC_ROUNDS_AHEAD"
SWITCHES = ("auto", "off")


class Decided:
    """One round of R slots: decided [R, 3 + G] and what the nodes of its paths have, [R, N, D] each.

    decided: the last accepted node of each slot, the token behind it, whether the scores are finite, and what
    follows. Made right behind the program, because the next one writes to the same tensors.
    """

    def __init__(self, decided: torch.Tensor, on_path: Sequence[torch.Tensor]) -> None:
        self._copy = HostCopy(decided)
        self.on_path = [each.clone() for each in on_path]

    @cached_property
    def numbers(self) -> list[Any]:
        """The one copy of a round to the host, for all its slots, and its one wait for the device."""
        return self._copy.read()


@dataclass(frozen=True, slots=True)
class JudgedSlot:
    """The tree of one slot. row: of the slot in each of `rounds`. layers: whose states are handed out."""

    slot: int
    row: int
    shape: Shape
    state: SequenceStates
    rounds: Sequence[Decided]
    layers: Sequence[int]

    def judged(self, number: int = 0, before: int = 0) -> Judged:
        """What round `number` made of it, behind so many nodes that the rounds before left staged."""
        decided = self.rounds[number]
        deepest, token, finite, *follow = decided.numbers[self.row]
        path = self.shape.path_to(deepest)
        states = (each[self.row, : len(path)] for each in decided.on_path)
        hidden = dict(zip((FINAL, *self.layers), states, strict=True))
        onward = partial(self._next, number + 1, before + len(path))
        # whoever asks twice gets the same
        further = cache(onward) if number + 1 < len(self.rounds) else None
        return Judged(path, token, bool(finite), hidden, tuple(follow), further)

    def _next(self, number: int, before: int) -> Judged:
        found = self.judged(number, before)
        self.state.record(self.slot, chain_shape(before + len(found.path)))
        return found


def rounds_within(rounds: int, shapes: Sequence[Shape]) -> int:
    """How many of `rounds` in a row find room among the staged nodes of each slot."""
    return min(rounds, *((MAX_STAGED - len(each)) // (each.deepest + 1) + 1 for each in shapes))


def reserve_rounds(rounds: int, inputs: Sequence[StepInput], state: SequenceStates) -> None:
    """Make room for all nodes that are staged in so many rounds."""
    if rounds > 1:
        for each in inputs:
            state.reserve(each.slot, MAX_STAGED)


def judged_by_number(
    shapes: Mapping[int, Shape],
    inputs: Sequence[StepInput],
    state: SequenceStates,
    rounds: Sequence[Decided],
    layers: Sequence[int],
) -> dict[int, Judged]:
    """What became of the inputs with these numbers, which are those of their rows."""
    return {
        number: JudgedSlot(inputs[number].slot, number, shape, state, rounds, layers).judged()
        for number, shape in shapes.items()
    }
