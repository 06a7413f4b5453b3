"""Which requests run, and how many prompt tokens ride in the next step.

Iteration-level scheduling with chunked prefill (Yu et al. 2022, Orca; Agrawal et al. 2024,
Sarathi-Serve, arXiv 2403.02310): every running row decodes in every step, and prompts fill what is left
of a token budget, so that a long prompt never stalls the others.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from linspec.decoding.sequence import Row
from linspec.utils.sizes import check_size


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's work: rows that decode, and rows with the number of prompt tokens they get."""

    decoding: list[Row]
    prefilling: list[tuple[Row, int]]


# Pieces of a prompt end at multiples of it. Grouped mixers add up the rows of a piece in another order
# when it begins elsewhere, and quantised layers make a visible difference of that: a prompt would
# read otherwise beside other requests.
PIECE = 64


class Scheduler:
    """First come, first served, in `slots` places.

    A slot is either free or that of a row in `running`, whatever becomes of the row.
    """

    def __init__(self, slots: int, prefill_tokens: int = 512) -> None:
        check_size("max_batch", slots)
        check_size("prefill_tokens", prefill_tokens)
        self.prefill_tokens = prefill_tokens
        self.free = list(range(slots))
        self._waiting: deque[Row] = deque()
        self.running: list[Row] = []

    def submit(self, row: Row) -> None:
        """Queue a request until a slot is free."""
        self._waiting.append(row)

    @property
    def busy(self) -> bool:
        """True while any request runs or waits."""
        return bool(self.running or self._waiting)

    def admit(self) -> list[Row]:
        """Give free slots to those that wait; returns the rows that run from now on."""
        admitted = []
        while self._waiting and self.free:
            row = self._waiting.popleft()
            # the lowest slot: neighbouring slots form one dense segment
            row.slot = min(self.free)
            self.free.remove(row.slot)
            self.running.append(row)
            admitted.append(row)
        return admitted

    def next_batch(self) -> Batch:
        """Share out the step among those that run."""
        left, prefilling = self.prefill_tokens, []
        unit = min(PIECE, self.prefill_tokens)
        for row in self.running:
            count = row.prompt_length - row.prefilled
            if count > left:
                count = left - left % unit
            if row.prefilling and count:
                prefilling.append((row, count))
                left -= count
        decoding = sorted((r for r in self.running if not r.prefilling), key=lambda r: r.slot)
        return Batch(decoding, prefilling)

    def retire(self, row: Row) -> None:
        """The request has ended; its slot is free."""
        self.running.remove(row)
        self.free.append(row.slot)

    def clear(self) -> list[Row]:
        """Drop everything that waits and runs; returns the rows that ran."""
        dropped = self.running[:]
        self._waiting.clear()
        for row in dropped:
            self.retire(row)
        return dropped
