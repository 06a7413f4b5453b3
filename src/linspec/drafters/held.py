"""The target's states that a drafter has not read yet: what rounds handed out, kept as it is until a draft.

held = HeldStates(layers=(1, 14), most=32)
held.keep(sequence)               # in a round without drafts: copies nothing
pieces = held.take(sequence)      # the states of the newest positions, one piece behind the other
held.forget(sequence.slot)        # they were read
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from linspec.decoding.sequence import RunningSequence
from linspec.kernels.cpu.fusion import Piece


@dataclass(frozen=True, slots=True)
class _Held:
    """A piece, and the position behind it."""

    piece: Piece
    end: int


class HeldStates:
    """States of `layers` at the newest positions of each slot: `most` or more, where so many are known."""

    def __init__(self, layers: Sequence[int], most: int) -> None:
        self.layers, self.most = tuple(layers), most
        self._held: dict[int, list[_Held]] = {}

    def keep(self, sequence: RunningSequence) -> None:
        """Keep what the target has handed out for a sequence, before its tokens grow."""
        hidden, end = sequence.hidden, len(sequence.tokens) - 1
        held = self._held.setdefault(sequence.slot, [])
        last = held[-1].end if held else -1
        if last == end or self.layers[0] not in hidden:
            return
        piece = [hidden[layer] for layer in self.layers]
        count = piece[0].shape[0]
        if last != end - count:
            # what lies before a gap cannot be read with what lies behind it
            held.clear()
        if count > self.most:
            # a view would keep a whole prompt
            piece = [states[-self.most :].clone() for states in piece]
        held.append(_Held(piece, end))
        if len(held) >= 2 * self.most:
            del held[: self.most]

    def take(self, sequence: RunningSequence) -> list[Piece]:
        """The states of at most `most` positions before the root; none where the newest are not there."""
        self.keep(sequence)
        held = self._held[sequence.slot]
        if not held or held[-1].end != len(sequence.tokens) - 1:
            return []
        return newest([each.piece for each in held], self.most)

    def forget(self, slot: int) -> None:
        """What is held of a slot was read, or another sequence begins there."""
        self._held.pop(slot, None)


def positions_in(pieces: Sequence[Piece]) -> int:
    """How many positions there are states of."""
    return sum(piece[0].shape[0] for piece in pieces)


def newest(pieces: Sequence[Piece], count: int) -> list[Piece]:
    """The last `count` positions of some pieces, or all of them."""
    found: list[Piece] = []
    for piece in reversed(pieces):
        if count <= 0:
            break
        there = piece[0].shape[0]
        found.append(piece if there <= count else [states[-count:] for states in piece])
        count -= there
    return found[::-1]
