"""The prompt of a request of several sequences is read once: by the first, for all of them.

The others wait for it outside, and begin with what its slot held ahead of the last token: pages of caches
that grow, which they share, and a copy of the rest. A sum over tokens cannot be cut back, so a model that has
sums stops at the last multiple of PIECE, where the others begin.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from linspec.decoding.sequence import RunningSequence
from linspec.engine.budget import PIECE
from linspec.engine.prefix_cache import PrefixCache
from linspec.state.pages import Page
from linspec.state.sequence_states import Pages, SequenceStates


class Beginning(NamedTuple):
    """What a slot holds of the first `length` tokens of a prompt."""

    length: int
    pages: list[Pages]
    rest: list[Any]


class SharedPrompt:
    """A prompt that `reader` reads; None where it was lost on the way, so that each reads for itself."""

    def __init__(self, reader: RunningSequence, states: SequenceStates) -> None:
        self.reader: RunningSequence | None = reader
        self.beginning: Beginning | None = None
        last = reader.prompt_length - 1
        self._length = last if states.only_grows else last - last % PIECE

    @property
    def long(self) -> bool:
        """Whether it is worth waiting for."""
        return self._length >= PIECE

    @property
    def read(self) -> bool:
        """Whether those who wait can begin."""
        return self.beginning is not None or self.reader is None

    @property
    def held_pages(self) -> list[Page]:
        """What those who begin share with the reader, as far as it is known."""
        pages = self.beginning.pages if self.beginning is not None else []
        return [page for each in pages for page in each]

    def begin(self, sequence: RunningSequence, states: SequenceStates) -> bool:
        """Give an empty slot what is read; False if that is nothing, and the sequence has to read."""
        found = self.beginning
        if found is None:
            return False
        states.rebuild(sequence.slot, found.pages, found.length, found.rest)
        sequence.prefilled = sequence.cached_tokens = found.length
        sequence.shared = None
        return True

    def opened(self, states: SequenceStates) -> None:
        """The reader has its slot, with what a prefix cache knew: it has to stop where others begin."""
        reader = self.reader
        if reader is None or states.only_grows:
            return
        if reader.prefilled >= self._length:
            self._length = reader.prefilled
            self.passed(reader, states)
        else:
            reader.stops = tuple(sorted({*reader.stops, self._length}))

    def passed(self, sequence: RunningSequence, states: SequenceStates) -> None:
        """A piece of the prompt is committed in the slot of `sequence`: keep what others begin with."""
        there = not sequence.prefilling if states.only_grows else sequence.prefilled == self._length
        if sequence is not self.reader or not there:
            return
        if states.whole(sequence.slot, sequence.prefilled):
            pages = states.pages(sequence.slot, 0, self._length)
            self.beginning = Beginning(self._length, pages, states.rest(sequence.slot))
        self.left(sequence)

    def left(self, sequence: RunningSequence) -> None:
        """It reads no longer."""
        if sequence is self.reader:
            self.reader = sequence.shared = None


def share_prompt(sequences: list[RunningSequence], states: SequenceStates) -> None:
    """Let the first of the sequences of a request read their prompt for all, if it is long."""
    shared = SharedPrompt(sequences[0], states)
    if len(sequences) > 1 and shared.long:
        for each in sequences:
            each.shared = shared


def begin_prompt(
    sequence: RunningSequence, states: SequenceStates, cache: PrefixCache | None
) -> None:
    """Give the slot of `sequence` what is known of its prompt."""
    shared = sequence.shared
    if shared is not None and shared.begin(sequence, states):
        return
    if cache is not None:
        cache.begin(sequence)
    if shared is not None:
        shared.opened(states)


def keep_prompt(
    sequence: RunningSequence, states: SequenceStates, cache: PrefixCache | None
) -> None:
    """Let others have what the slot of `sequence` holds of its prompt, of which a piece was read."""
    if cache is not None:
        cache.passed(sequence)
    if sequence.shared is not None:
        sequence.shared.passed(sequence, states)
