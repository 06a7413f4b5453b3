"""The random numbers of drafts that are sampled: a generator for each sequence, apart from the verifier's."""

from __future__ import annotations

from typing import Any

import torch

from linspec.decoding.sequence import RunningSequence


class DraftNumbers:
    """By slot: a generator, and what that was when the sequence had so many tokens."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[torch.Generator, int, torch.Tensor]] = {}

    def of(self, sequence: RunningSequence) -> torch.Generator | None:
        """What samples the drafts of a sequence; a round that is proposed again samples the same."""
        if sequence.sampler.greedy:
            return None
        found = self._kept.get(sequence.slot)
        if found is None:
            # drafts must not share random numbers with the verifier that judges them
            seed, generator = sequence.params.seed, torch.Generator()
            generator.manual_seed(seed ^ 0x5EED) if seed is not None else generator.seed()
            found = generator, -1, generator.get_state()
        generator, length, state = found
        if length != len(sequence.tokens):
            state = generator.get_state()
            self._kept[sequence.slot] = generator, len(sequence.tokens), state
        return generator.set_state(state)

    def taken(self, slot: int) -> Any:
        """What a sequence takes along when it leaves its slot."""
        return self._kept.get(slot)

    def put(self, slot: int, taken: Any) -> None:
        """A sequence is back, with what was `taken`."""
        if taken is not None:
            self._kept[slot] = taken

    def forget(self, slot: int) -> None:
        """Another sequence begins here."""
        self._kept.pop(slot, None)
