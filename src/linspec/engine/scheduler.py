"""Which requests run, and how many prompt tokens ride in the next step.

Iteration-level scheduling with chunked prefill (Yu et al. 2022, Orca; Agrawal et al. 2024,
Sarathi-Serve, arXiv 2403.02310): every running sequence decodes in every step, and prompts fill what is left
of a token budget, so that a long prompt never stalls the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from linspec.decoding.sequence import RunningSequence
from linspec.utils.sizes import check_size


@dataclass(frozen=True, slots=True)
class Batch:
    """The sequences of one step.

    Attributes:
        decoding: sequences whose prompt is read.
        prefilling: sequences with the number of prompt tokens that this step reads.
    """

    decoding: list[RunningSequence]
    prefilling: list[tuple[RunningSequence, int]]


# Pieces of a prompt end at multiples of it. Grouped mixers add up the tokens of a piece in another order
# when it begins elsewhere, and quantized layers make a visible difference of that: a prompt would
# read otherwise beside other requests.
PIECE = 64


class Scheduler:
    """First come, first served, in `slots` places.

    A slot that no sequence in `running` has is free: there is no list of free slots that an interrupt could
    leave behind.
    """

    def __init__(self, slots: int, prefill_tokens: int = 512) -> None:
        check_size("max_batch", slots)
        check_size("prefill_tokens", prefill_tokens)
        self.prefill_tokens = prefill_tokens
        self.slots = slots
        self._waiting: deque[RunningSequence] = deque()
        self.running: list[RunningSequence] = []

    @property
    def free(self) -> list[int]:
        """The slots that nobody has, the lowest first."""
        taken = {sequence.slot for sequence in self.running}
        return [slot for slot in range(self.slots) if slot not in taken]

    def submit(self, sequences: Sequence[RunningSequence]) -> None:
        """Queue the sequences of a request until slots are free: all at once, or none."""
        self._waiting.extend(sequences)

    @property
    def busy(self) -> bool:
        """True while any request runs or waits."""
        return bool(self.running or self._waiting)

    def admit(self) -> list[RunningSequence]:
        """Give free slots to those that wait; returns the sequences that run from now on."""
        admitted = []
        # the lowest slots: neighbouring slots form one dense group
        for slot in self.free if self._waiting else ():
            sequence = self._waiting[0]
            sequence.slot = slot
            self.running.append(sequence)
            # it waits until it runs: an interrupt between the two loses no sequence
            self._waiting.popleft()
            admitted.append(sequence)
            if not self._waiting:
                break
        return admitted

    def next_batch(self) -> Batch:
        """Share out the step among those that run."""
        left, prefilling = self.prefill_tokens, []
        unit = min(PIECE, self.prefill_tokens)
        for sequence in self.running:
            count = sequence.prompt_length - sequence.prefilled
            if count > left:
                count = left - left % unit
            if sequence.prefilling and count:
                prefilling.append((sequence, count))
                left -= count
        decoding = sorted((r for r in self.running if not r.prefilling), key=lambda r: r.slot)
        return Batch(decoding, prefilling)

    def retire(self, sequence: RunningSequence) -> None:
        """The request has ended; its slot is free."""
        self.running.remove(sequence)

    def withdraw(self, unwanted: Callable[[RunningSequence], bool]) -> list[RunningSequence]:
        """Drop what waits and is unwanted; returns the unwanted sequences that run."""
        self._waiting = deque(each for each in self._waiting if not unwanted(each))
        return [each for each in self.running if unwanted(each)]
