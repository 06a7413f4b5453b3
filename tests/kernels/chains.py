"""One chain of tokens in many ways: what the forms of a mixer, and the ways to a node, must agree on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from kernels.test_native_step import TREE, assert_most_near

from linspec.decoding.step import StepInput
from linspec.models.decoder import Decoder
from linspec.state.sequence_states import SequenceStates

# of TREE, to its deepest node; and where on the chain it stands, 0 elsewhere
PATH = [0, 1, 3, 4, 6, 7, 8]
_PLACES = [590, 591, 0, 592, 593, 0, 594, 595, 596, 0]


def read(made: Decoder, state: SequenceStates, slot: int, ids: Sequence[int]) -> torch.Tensor:
    """Logits behind each token of a prompt, which is committed."""
    logits = made.step([StepInput(slot, ids)], state).logits
    state.commit(slot, range(len(ids)))
    return logits


def check_forms_agree(
    made: Decoder, state: SequenceStates, ids: Sequence[int], near: float | None
) -> None:
    """Steps of a chain and of trees layer by layer and in one call, each over the same entries of slot 0.

    near: how far most logits may be apart, where what is staged may be rounded the other way; None: hardly.
    """
    native = made.native
    assert native is not None
    for first in range(0, 420, 60):
        chain = ids[first : first + 60]
        for step in (StepInput(0, chain), StepInput(0, ids[first : first + 10], TREE)):
            before, found = state.snapshot(0), []
            for each in (None, native):
                made.native = each
                found.append(made.step([step], state).logits)
                state.drop(0)
                state.restore(0, before)
            if near is None:
                torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
            else:
                assert_most_near(*found, near)
        read(made, state, 0, chain)


def check_ways_agree(made: Decoder, state: SequenceStates, ids: Sequence[int]) -> None:
    """600 tokens have the same bits as one prompt, in slices, one by one beside others, as a path of a tree.

    state: empty, of three slots.
    """
    whole = read(made, state, 0, ids[:600])
    parts = [read(made, state, 1, ids[a:b]) for a, b in ((0, 130), (130, 400), (400, 590))]
    read(made, state, 2, ids[100:500])
    tree = StepInput(1, [ids[at] for at in _PLACES], TREE)
    logits = made.step([tree, StepInput(2, ids[:10], TREE)], state).logits
    assert torch.equal(torch.cat([*parts, logits[PATH]]), whole[:597])
    state.commit(1, PATH)
    state.drop(2)
    rest = [read(made, state, 1, [ids[at]]) for at in range(597, 600)]
    assert torch.equal(torch.cat(rest), whole[597:])
