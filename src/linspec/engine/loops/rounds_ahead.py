"""Rounds that a device has run ahead of the host: each is taken if its tree is the one that is proposed now.

A device that judges trees can make the next ones of what it decided (`JudgeBy.regrow`), so it need not wait
for the host, which plans, drafts and hands out tokens. What it runs ahead is speculation of another kind: the
host goes through every round as ever, and where it comes to the same trees the round is there already. Where
it does not (another plan of the policy, the end of a sequence near) what was run ahead is forgotten. So
nothing depends on it but time.

The accepted nodes of these rounds stay staged, one behind the other, and are committed together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from linspec.decoding.judged import Judged
from linspec.decoding.sequence import RunningSequence
from linspec.decoding.tree import TokenTree

# rounds in a row: who comes new waits for those that are left
_MOST = 8


@dataclass(slots=True)
class _Ahead:
    """The next round of a sequence: its tree, and what became of it. behind: nodes that are staged and handed
    out, but not committed."""

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    judged: Callable[[], Judged]
    behind: int

    def is_of(self, tree: TokenTree) -> bool:
        return (self.tokens, self.parents) == (tree.tokens, tree.parents)


class RoundsAhead:
    """Of the sequences of one loop, on the `state` of its target. most: rounds that are run in a row.

    They are twice as many as before when all were taken, and one when some were forgotten.
    """

    def __init__(self, state: Any, most: int = _MOST) -> None:
        self._state, self._most = state, most
        self._held: dict[RunningSequence, _Ahead] = {}
        self._rounds, self._forgotten = 1, False

    def turn(self, sequences: Sequence[RunningSequence]) -> list[RunningSequence]:
        """Those whose next round is there already, and all where there is none.

        A step of who comes new would wait on the device for the same rounds.
        """
        return [each for each in sequences if each in self._held] or list(sequences)

    def taken(self, trees: Sequence[tuple[RunningSequence, TokenTree]]) -> list[Judged] | None:
        """What became of these trees, one of each sequence that decodes; None unless all were run ahead.

        Then nothing is any more, and the trees have to be stepped.
        """
        held = [self._held.get(sequence) for sequence, _ in trees]
        if not self._held:
            return None
        if all(ahead and ahead.is_of(tree) for ahead, (_, tree) in zip(held, trees, strict=True)):
            return [ahead.judged() for ahead in held if ahead]
        for sequence in list(self._held):
            self.settle(sequence)
        self._forgotten = True
        return None

    def rounds(self, trees: Sequence[tuple[RunningSequence, TokenTree]], limit: int | None) -> int:
        """How many rounds of such trees are worth running now. limit: positions of the model."""
        if not trees or any(len(tree.regrow) != len(tree) for _, tree in trees):
            return 1
        self._rounds = 1 if self._forgotten else min(2 * self._rounds, self._most)
        self._forgotten = False
        # each brings a token at least
        room = [self._rounds, max(sequence.remaining for sequence, _ in trees)]
        if limit is not None:
            room += (
                (limit - len(sequence.tokens)) // (tree.shape.deepest + 1)
                for sequence, tree in trees
            )
        return max(1, min(room))

    def keep(
        self,
        sequence: RunningSequence,
        tree: TokenTree,
        judged: Judged,
        tokens: int,
        *,
        ended: bool,
    ) -> None:
        """A round of a sequence has brought so many tokens: commit its nodes, or hold what comes next."""
        ahead = self._held.pop(sequence, None)
        behind = tokens + (ahead.behind if ahead else 0)
        if judged.next is not None and not ended:
            following = tree.regrown(judged.token, judged.follow)
            self._held[sequence] = _Ahead(following, tree.parents, judged.next, behind)
            return
        self._state.commit(sequence.slot, range(behind))

    def settle(self, sequence: RunningSequence) -> None:
        """Commit what was handed out of a sequence, and forget what was run ahead."""
        ahead = self._held.pop(sequence, None)
        if ahead is not None:
            self._state.commit(sequence.slot, range(ahead.behind))

    def forget(self, sequence: RunningSequence) -> None:
        """It has ended, and its slot is another one's."""
        self._held.pop(sequence, None)
