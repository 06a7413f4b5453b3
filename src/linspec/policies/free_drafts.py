"""Drafts without a model: when a policy asks for them, for how many, and what became of them.

They cost next to nothing, so they are asked for in every round in which they pay, and now and then where they
do not: asking takes a hundredth of the time at most. Drafts that were not verified teach as much as others,
since what followed says whether they were right.
"""

from __future__ import annotations

from linspec.decoding.sequence import RunningSequence
from linspec.decoding.tree import TokenTree
from linspec.drafters.base import MAX_NODES
from linspec.policies.calibration import Calibration
from linspec.policies.means import Mean
from linspec.policies.planner import next_size

_FIRST_NODES = 4
# rounds' worth of the assumption that they pay
_HOPE = 6.0
# share of the time that asking may take while they do not
_ASKING = 0.01


class FreeDrafts:
    """What a policy knows of drafts that cost nothing to make.

    Attributes:
        calibration: of their confidences.
        asked: whether they are asked for in this round.
        slots: the slots that had some in this round, verified or not.
    """

    def __init__(self) -> None:
        self.calibration, self.asked = Calibration(), False
        self.slots: set[int] = set()
        self._rooms = Rooms(_FIRST_NODES, MAX_NODES)
        # what a round brings in which they are asked for, beyond a plain one, and rounds since the last
        self._gain, self._unasked = Mean(0.5, _HOPE), 0
        # what was drafted, when the sequence had so many tokens
        self._found: dict[int, tuple[int, TokenTree]] = {}

    def begin(self) -> None:
        """A round begins."""
        self.asked = False
        self.slots.clear()

    def ask(self, asking: float) -> None:
        """Decide whether to ask for them, which takes `asking` plain rounds."""
        self._unasked += 1
        self.asked = self._gain.value > 0 or self._unasked >= asking / _ASKING
        if self.asked:
            self._unasked = 0

    def room(self, slot: int) -> int:
        """Draft nodes to ask for; 0 where they are not asked for."""
        return self._rooms.of(slot) if self.asked else 0

    def kept(self, sequence: RunningSequence, tree: TokenTree, kept: int) -> None:
        """`kept` draft nodes of a tree are verified."""
        self._rooms.kept(sequence.slot, kept, len(tree) - 1)
        self._found[sequence.slot] = len(sequence.tokens), tree

    def look_back(self, sequence: RunningSequence) -> None:
        """Learn from the tree of the round before, which now has what followed."""
        length, tree = self._found.pop(sequence.slot, (0, None))
        if tree is None or tree.confidences is None:
            return
        node = 0
        for depth, token in enumerate(sequence.tokens[length:], 1):
            right = None
            for child in tree.children[node]:
                hit = tree.tokens[child] == token
                self.calibration.observe(depth, tree.confidences[child], hit)
                right = child if hit else right
            if right is None:
                return
            node = right

    def learn(self, surplus: float) -> None:
        """A round in which they were asked for brought so many tokens more than its seconds do elsewhere."""
        self._gain.add(surplus)

    def release(self, slot: int) -> None:
        """The request in `slot` has ended."""
        self._found.pop(slot, None)
        self._rooms.release(slot)


class Rooms:
    """Draft nodes that each request is asked for; a new one begins where others are.

    A tree that filled its room and was verified whole doubles the room, about; one that was cut leaves
    little more than what was kept. So drafts that nobody would verify are not made, and a text that repeats
    itself soon gets trees as large as they pay.
    """

    def __init__(self, least: int, most: int) -> None:
        self._least, self._most, self._usual = least, most, least
        self._rooms: dict[int, int] = {}

    def of(self, slot: int) -> int:
        """Draft nodes to ask for."""
        return self._rooms.setdefault(slot, self._usual)

    def kept(self, slot: int, kept: int, drafted: int) -> None:
        """Learn that `kept` of `drafted` draft nodes were worth verifying."""
        filled = kept == drafted >= self.of(slot)
        if filled or kept < drafted:
            room = min(self._most, max(self._least, next_size(kept)))
            self._rooms[slot] = self._usual = room

    def release(self, slot: int) -> None:
        """The request in `slot` has ended."""
        self._rooms.pop(slot, None)
