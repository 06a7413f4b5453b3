"""Who gives up a place in the state: for its memory, and for a request of higher priority.

A pre-empted sequence takes a snapshot of its state along and waits. When it has a slot again, it goes on
where it was: nothing is read, drawn or computed a second time. Snapshots of those that wait are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from linspec.decoding.sequence import UNPLACED, RunningSequence
from linspec.decoding.step import MAX_STAGED
from linspec.errors import ConfigError
from linspec.state.pages import Page, bytes_of
from linspec.state.sequence_states import SequenceStates
from linspec.utils.sizes import check_bytes

# tokens that one step may add to a sequence
_STEP = MAX_STAGED
# tokens more that are left to each sequence when one is let in: else it would be pre-empted at once
_GROWTH = 128


@dataclass(frozen=True, slots=True)
class Parked:
    """What a pre-empted sequence takes along: its state, and what the loop keeps of it."""

    state: Any
    loop: Any


@dataclass(frozen=True, slots=True)
class StateMemory:
    """The bytes that the states of running sequences may take together.

    Attributes:
        state: of the model.
        limit: bytes, the `state_bytes` of the engine.
        whole: count a sequence at its greatest length, because it cannot be pre-empted when it grows.
        reads_source: a prompt is read as a source, which is kept beside the output.
        copies: of its state that a sequence may have beside its slot.
    """

    state: SequenceStates
    limit: int
    whole: bool = False
    reads_source: bool = False
    copies: int = 0

    def __post_init__(self) -> None:
        check_bytes("state_bytes", self.limit)
        least = self.needed(1, 1)
        if least > self.limit:
            raise ConfigError(
                f"state_bytes must be at least {least}, the state of a sequence of one token and its answer, "
                f"got {self.limit}; raise it, or take a model of smaller group, span or window"
            )

    def needed(self, prompt: int, output: int) -> int:
        """Bytes of a prompt with so many tokens of output, and of its copies."""
        read = (1 + output, prompt) if self.reads_source else (prompt + output, 0)
        return (1 + self.copies) * self.state.bytes_at(*read)

    def room(self, prompt: int, output: int) -> int:
        """How many of `output` tokens behind a prompt fit where nobody else runs; 0 if none does."""
        low, high = 0, output
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._fits(prompt, middle) else (low, middle - 1)
        return low

    def _fits(self, prompt: int, output: int) -> bool:
        return self.needed(prompt, output) <= self.limit

    def exceeded(self, running: Sequence[RunningSequence]) -> bool:
        """Whether the next step may take more than the limit."""
        return self._sum(running, _STEP) > self.limit

    def admits(self, running: Sequence[RunningSequence], new: RunningSequence) -> bool:
        """Whether `new` fits beside those that run, with room for all of them to grow."""
        return not running or self._sum([*running, new], _STEP + _GROWTH) <= self.limit

    def _sum(self, sequences: Sequence[RunningSequence], margin: int) -> int:
        held = [page for each in sequences for page in self._pages(each)]
        # what several share takes memory once
        twice = sum(page.bytes for page in held) - bytes_of(held)
        return sum(self._of(each, margin) for each in sequences) - twice

    def _pages(self, sequence: RunningSequence) -> list[Page]:
        """The pages that a sequence has, or that it begins with."""
        if sequence.slot != UNPLACED:
            return self.state.held_pages(sequence.slot)
        if sequence.shared is not None:
            return list(sequence.shared.held_pages)
        parts = sequence.parked.state if sequence.parked is not None else ()
        return [page for part in parts for page in getattr(part, "pages", ())]

    def _of(self, sequence: RunningSequence, margin: int) -> int:
        """Bytes of a sequence that is `margin` tokens longer than now, or has ended by then."""
        longest = sequence.params.max_tokens
        output = longest if self.whole else min(sequence.emitted + margin, longest)
        return self.needed(sequence.prompt_tokens, output)


def victims(
    running: Sequence[RunningSequence],
    first: RunningSequence | None,
    free: int,
    memory: StateMemory | None,
) -> list[RunningSequence]:
    """The running sequences that give up their places now: of the lowest priority, the newest first.

    first: who waits and is next. free: slots that nobody has.
    """
    staying = sorted(running, key=lambda each: (each.priority, -each.number))
    leaving: list[RunningSequence] = []
    while memory is not None and len(staying) > 1 and memory.exceeded(staying):
        leaving.append(staying.pop(0))
    if first is None:
        return leaving
    lower = [each for each in staying if each.priority < first.priority]
    for count in range(len(lower) + 1):
        rest = staying[count:]
        if free + len(leaving) + count > 0 and (memory is None or memory.admits(rest, first)):
            return leaving + lower[:count]
    return leaving
