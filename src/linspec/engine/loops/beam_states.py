"""The states of several hypotheses a sequence: a slot for each, forked where one of them splits.

A hypothesis has tokens that its slot has committed, and a few that are decided and wait: these go into the
next step in front of what is new. So a split copies what was committed, and no token is read twice in a step
of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from linspec.decoding.step import StepInput
from linspec.decoding.target import NodeOutput, Target


@dataclass(frozen=True, slots=True)
class NewNodes:
    """Tokens that are staged in a slot, and the staged node that each follows; -1 for none."""

    slot: int
    tokens: Sequence[int]
    parents: Sequence[int]


class BeamStates:
    """`width` slots for each sequence of an engine; those of sequence slot s are `group(s)`.

    target: a model with a state of as many slots as all groups have together. fed: how many tokens each slot
    has committed, counted from where the texts of `settle` begin.
    """

    def __init__(self, target: Target, width: int) -> None:
        self.target, self.width = target, width
        slots = target.state.slots
        self.fed = [0] * slots
        # the staged nodes of each slot, by parent and token
        self._staged: list[dict[tuple[int, int], int]] = [{} for _ in range(slots)]

    def group(self, sequence_slot: int) -> range:
        """The slots of one sequence."""
        return range(sequence_slot * self.width, (sequence_slot + 1) * self.width)

    def begin(self, sequence_slot: int, prompt: Any) -> int:
        """The first slot of a sequence, which has read its prompt: a snapshot of that."""
        slot = self.group(sequence_slot)[0]
        self.target.state.restore(slot, prompt)
        self.fed[slot], self._staged[slot] = 0, {}
        return slot

    def catch_up(self, missing: Sequence[tuple[int, Sequence[int]]]) -> None:
        """Read and commit tokens of any number; of the slots, nothing may be staged."""
        if not missing:
            return
        self.target.step([StepInput(slot, tokens, all_logits=False) for slot, tokens in missing])
        for slot, tokens in missing:
            self.target.state.commit(slot, range(len(tokens)))
            self.fed[slot] += len(tokens)

    def step(self, new: Sequence[NewNodes]) -> list[NodeOutput]:
        """Stage nodes of different slots; outputs in their order. If it raises, nothing is staged there."""
        try:
            outputs = self.target.step([StepInput(n.slot, n.tokens, n.parents) for n in new])
        except Exception:
            for each in new:
                self._staged[each.slot] = {}
            raise
        for each in new:
            index = self._staged[each.slot]
            for edge in zip(each.parents, each.tokens, strict=True):
                index[edge] = len(index)
        return outputs

    def staged(self, slot: int) -> int:
        """How many nodes `slot` has staged."""
        return len(self._staged[slot])

    def follow(self, slot: int, tokens: Sequence[int]) -> list[int]:
        """The staged nodes of `slot` that carry `tokens` behind what is committed, as far as they do."""
        path: list[int] = []
        for token in tokens:
            node = self._staged[slot].get((path[-1] if path else -1, token))
            if node is None:
                break
            path.append(node)
        return path

    def settle(
        self, sequence_slot: int, children: Sequence[tuple[int, Sequence[int]]]
    ) -> list[int]:
        """The slot of each child, which has committed what it shares with its parent's other children.

        children: the slot of the parent and the whole text, of which the last token is never committed. What
        else is staged in the group is dropped.
        """
        families: dict[int, list[int]] = {}
        for child, (parent, _) in enumerate(children):
            families.setdefault(parent, []).append(child)
        free = [slot for slot in self.group(sequence_slot) if slot not in families]
        for slot in free:
            self.drop(slot)
        found = [parent for parent, _ in children]
        for parent, family in families.items():
            self._commit_shared(parent, [children[child][1] for child in family])
            for child in family[1:]:
                found[child] = free.pop(0)
                self.target.state.fork(parent, found[child])
                self.fed[found[child]] = self.fed[parent]
        return found

    def _commit_shared(self, slot: int, texts: Sequence[Sequence[int]]) -> None:
        """Commit the staged nodes that begin all of `texts`, and drop the others."""
        shared = self.fed[slot]
        while shared < min(map(len, texts)) - 1 and len({text[shared] for text in texts}) == 1:
            shared += 1
        path = self.follow(slot, texts[0][self.fed[slot] : shared])
        if path:
            self.target.state.commit(slot, path)
        self.drop(slot)
        self.fed[slot] += len(path)

    def drop(self, slot: int) -> None:
        """Forget what `slot` has staged."""
        self.target.state.drop(slot)
        self._staged[slot] = {}

    def release(self, sequence_slot: int) -> None:
        """The sequence has ended."""
        for slot in self.group(sequence_slot):
            self.drop(slot)


class Forest:
    """New nodes of any slots, collected for one step; several paths of a slot share what they begin with."""

    def __init__(self, states: BeamStates) -> None:
        self.states = states
        self._new: dict[int, tuple[list[int], list[int]]] = {}

    def add(self, slot: int, tokens: Sequence[int], parent: int = -1) -> int:
        """Add a chain behind the staged node `parent` of `slot`; returns the number of its last node."""
        mine, parents = self._new.setdefault(slot, ([], []))
        for token in tokens:
            mine.append(token)
            parents.append(parent)
            parent = self.states.staged(slot) + len(mine) - 1
        return parent

    def step(self) -> Mapping[tuple[int, int], Tensor]:
        """Stage all of them; the logits [V] behind each, by slot and node."""
        first = {slot: self.states.staged(slot) for slot in self._new}
        new = [NewNodes(slot, *nodes) for slot, nodes in self._new.items()]
        outputs = self.states.step(new)
        return {
            (each.slot, first[each.slot] + node): row
            for each, output in zip(new, outputs, strict=True)
            for node, row in enumerate(output.logits)
        }
