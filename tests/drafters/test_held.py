"""What rounds without drafts leave for the next draft: every state, in order, and no more than is read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from linspec.drafters.held import HeldStates, newest, positions_in

LAYERS, WIDTH = (1, 4), 3
TEXT = {layer: torch.randn(300, WIDTH) for layer in LAYERS}


def sequence_at(end: int, count: int, slot: int = 0) -> Any:
    """A sequence whose target has just handed out the states of the `count` positions before `end`."""
    hidden = {layer: states[end - count : end] for layer, states in TEXT.items()}
    return SimpleNamespace(slot=slot, tokens=[0] * (end + 1), hidden=hidden)


def joined(pieces: Any, layer: int) -> torch.Tensor:
    return torch.cat([piece[LAYERS.index(layer)] for piece in pieces])


@given(
    prompt=st.integers(1, 60),
    rounds=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 3)), max_size=40),
    most=st.integers(1, 20),
)
def test_the_newest_states_are_there_however_they_came(
    prompt: int, rounds: list[tuple[int, int]], most: int
) -> None:
    held = HeldStates(LAYERS, most)
    end = read = 0
    for count, what in [(prompt, 0), *rounds, (1, 3)]:
        end += count
        sequence = sequence_at(end, count)
        for _ in range(what):
            # a round may be asked about again
            held.keep(sequence)
        # what is read leaves nothing, and nothing is missed after it
        pieces = held.take(sequence)
        there = positions_in(pieces)
        assert there == min(most, end - read)
        for layer in LAYERS:
            assert torch.equal(joined(pieces, layer), TEXT[layer][end - there : end])
        if what == 2:
            held.forget(0)
            read = end


def test_rounds_that_were_missed_end_what_can_be_read() -> None:
    held = HeldStates(LAYERS, 9)
    held.keep(sequence_at(4, 4))
    held.keep(sequence_at(7, 2))
    assert positions_in(held.take(sequence_at(8, 1))) == 3
    # states of another position than the newest are of no use
    stale = sequence_at(9, 1)
    stale.hidden = {}
    assert held.take(stale) == []


def test_slots_are_apart_and_long_prompts_are_not_kept() -> None:
    held = HeldStates(LAYERS, 4)
    held.keep(sequence_at(100, 100, slot=1))
    held.keep(sequence_at(3, 3))
    (piece,) = held.take(sequence_at(100, 100, slot=1))
    assert piece[0].untyped_storage().nbytes() == 4 * WIDTH * 4
    assert positions_in(held.take(sequence_at(3, 3))) == 3


def test_many_rounds_are_not_kept_for_ever() -> None:
    held = HeldStates(LAYERS, 4)
    for end in range(1, 250):
        held.keep(sequence_at(end, 1))
        assert len(held._held[0]) < 2 * 4


@given(st.lists(st.integers(1, 4), max_size=6), st.integers(0, 30))
def test_the_last_positions_of_pieces(sizes: list[int], count: int) -> None:
    rows = torch.arange(sum(sizes) * WIDTH).view(-1, WIDTH)
    pieces = [[part, -part] for part in rows.split(sizes)] if sizes else []
    found = newest(pieces, count)
    assert positions_in(found) == min(count, len(rows))
    if found:
        assert torch.equal(torch.cat([piece[0] for piece in found]), rows[-count:])
        assert torch.equal(torch.cat([piece[1] for piece in found]), -rows[-count:])
