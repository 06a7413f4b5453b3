"""Which requests run, and what the next step does for each of them.

Iteration-level scheduling with chunked prefill (Yu et al. 2022, Orca; Agrawal et al. 2024,
Sarathi-Serve, arXiv 2403.02310): every running sequence decodes in every step, and prompts fill what is left
of a token budget (`budget.py`), so that a long prompt never stalls the others. Who has to make room for
others is decided in `preemption.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from linspec.decoding.sequence import UNPLACED, RunningSequence
from linspec.engine.budget import TokenBudget
from linspec.engine.preemption import Parked, StateMemory, victims
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


def _turn(sequence: RunningSequence) -> tuple[int, int]:
    """Higher priorities first, then first come, first served: who was pre-empted came before who waits."""
    return -sequence.priority, sequence.number


class Scheduler:
    """By priority, then first come, first served, in `slots` places and the memory of states.

    The next one that does not fit lets nobody pass, so that nobody waits for ever; who waits until another
    has read a prompt lets all pass. A slot that no sequence in `running` has is free: there is no list of
    free slots that an interrupt could leave behind.
    """

    def __init__(
        self, slots: int, budget: TokenBudget | int = 512, memory: StateMemory | None = None
    ) -> None:
        """budget: of prompt tokens, or just their number. memory: None for no limit."""
        check_size("max_batch", slots)
        self.slots, self.memory = slots, memory
        self.budget = budget if isinstance(budget, TokenBudget) else TokenBudget(budget)
        self.waiting: list[RunningSequence] = []
        self.running: list[RunningSequence] = []

    @property
    def free(self) -> list[int]:
        """The slots that nobody has, the lowest first."""
        taken = {sequence.slot for sequence in self.running}
        return [slot for slot in range(self.slots) if slot not in taken]

    def submit(self, sequences: Sequence[RunningSequence]) -> None:
        """Queue the sequences of a request until slots are free: all at once, or none."""
        self.waiting = sorted([*self.waiting, *sequences], key=_turn)

    @property
    def next(self) -> RunningSequence | None:
        """Who waits and is next; None if nobody can begin."""
        return next((each for each in self.waiting if not each.held_back), None)

    @property
    def busy(self) -> bool:
        """True while any request runs or waits."""
        return bool(self.running or self.waiting)

    def victims(self) -> list[RunningSequence]:
        """The running sequences that have to give up their places now."""
        return victims(self.running, self.next, self.slots - len(self.running), self.memory)

    def preempt(self, sequence: RunningSequence, parked: Parked) -> None:
        """Let a running sequence wait, with what it needs to go on."""
        sequence.parked = parked
        sequence.preempted += 1
        # it waits before its place is free: an interrupt between the two loses no sequence
        self.submit([sequence])
        self.running.remove(sequence)
        sequence.slot = UNPLACED

    def admit(self) -> list[RunningSequence]:
        """Give free slots to those that wait; returns the sequences that run from now on."""
        admitted = []
        # the lowest slots: neighbouring slots form one dense group
        for slot in self.free if self.waiting else ():
            sequence = self.next
            if sequence is None:
                break
            if self.memory is not None and not self.memory.admits(self.running, sequence):
                break
            sequence.slot = slot
            self.running.append(sequence)
            # it waits until it runs: an interrupt between the two loses no sequence
            self.waiting.remove(sequence)
            admitted.append(sequence)
        return admitted

    def next_batch(self) -> Batch:
        """Share out the step among those that run."""
        decoding = sorted((r for r in self.running if not r.prefilling), key=lambda r: r.slot)
        prompts = sorted((r for r in self.running if r.prefilling), key=_turn)
        return Batch(decoding, self.budget.shares(prompts, len(decoding)))

    def retire(self, sequence: RunningSequence) -> None:
        """The request has ended; its slot is free."""
        self.running.remove(sequence)

    def withdraw(self, unwanted: Callable[[RunningSequence], bool]) -> list[RunningSequence]:
        """Drop what waits and is unwanted; returns the unwanted sequences that run."""
        self.waiting = [each for each in self.waiting if not unwanted(each)]
        return [each for each in self.running if unwanted(each)]
