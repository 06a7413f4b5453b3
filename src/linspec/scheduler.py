"""Which requests run, and how many prompt tokens ride in the next step.

Iteration-level scheduling with chunked prefill (Yu et al. 2022, Orca; Agrawal et al. 2024,
Sarathi-Serve, arXiv 2403.02310): every running row decodes in every step, and prompts fill what is left
of a token budget, so that a long prompt never stalls the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from linspec.config import check_size
from linspec.row import Row


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's work: rows that decode, and rows with the number of prompt tokens they get."""

    decoding: list[Row]
    prefilling: list[tuple[Row, int]]


class Scheduler:
    """First come, first served, in `slots` places."""

    def __init__(self, slots: int, prefill_tokens: int = 512) -> None:
        check_size("max_batch", slots)
        check_size("prefill_tokens", prefill_tokens)
        self.prefill_tokens = prefill_tokens
        self._free = list(range(slots))
        self._waiting: deque[Callable[[int], Row]] = deque()
        self.running: list[Row] = []

    def submit(self, place: Callable[[int], Row]) -> None:
        """Queue a request; `place(slot)` makes its row once a slot is free."""
        self._waiting.append(place)

    @property
    def busy(self) -> bool:
        """True while any request runs or waits."""
        return bool(self.running or self._waiting)

    def next_batch(self) -> Batch:
        """Admit what fits, then share out the step."""
        while self._waiting and self._free:
            # the lowest slot: neighbouring slots form one dense segment
            slot = min(self._free)
            self._free.remove(slot)
            self.running.append(self._waiting.popleft()(slot))
        left, prefilling = self.prefill_tokens, []
        for row in self.running:
            count = min(row.prompt_length - row.prefilled, left)
            if row.prefilling and count:
                prefilling.append((row, count))
                left -= count
        decoding = sorted((r for r in self.running if not r.prefilling), key=lambda r: r.slot)
        return Batch(decoding, prefilling)

    def retire(self, row: Row) -> None:
        """The request has ended; its slot is free."""
        self.running.remove(row)
        self._free.append(row.slot)

    def clear(self) -> list[Row]:
        """Drop everything that waits and runs; returns the rows that ran."""
        dropped = self.running[:]
        self._waiting.clear()
        for row in dropped:
            self.retire(row)
        return dropped
