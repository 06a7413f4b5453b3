"""Attention as one line of work: even shares, and bits that no cut changes."""

from __future__ import annotations

import ctypes
import itertools
from ctypes import POINTER, c_int32, c_int64
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels.test_native_step import DISTANT, TREE, model

from linspec.decoding.step import StepInput
from linspec.kernels.cpu.library import instruction_sets, load
from linspec.models.decoder import Decoder
from linspec.state.sequence_states import SequenceStates

CHUNK = 16
LENGTHS = st.lists(st.integers(1, 150), min_size=1, max_size=20)
# around a block of 64 keys, and one behind its first chunk
CONTEXTS = (1, 63, 64, 65, 5 * 64 + 3, 1100)


class Piece(ctypes.Structure):
    """`ls_piece` of lean.h."""

    _fields_ = [("item", c_int32), ("first", c_int32), ("count", c_int32), ("at", c_int64)]


class Share(NamedTuple):
    """What one thread has of the line: an item and some of its blocks, each."""

    pieces: list[tuple[int, range]]

    @property
    def blocks(self) -> int:
        return sum(len(blocks) for _, blocks in self.pieces)


def planned(blocks: list[int], threads: int, whole: bool = False) -> list[Share]:
    """The shares that the C side cuts."""
    library = load().library
    if library is None:
        pytest.skip("no compiled kernels")
    library.ls_cut_line.argtypes = [
        *(POINTER(c_int32), c_int32, c_int32, c_int32),
        *(POINTER(Piece), POINTER(c_int32)),
    ]
    most = sum(-(-each // CHUNK) for each in blocks) + threads - 1
    # one more, which has to stay as it is
    pieces, begins = (Piece * (most + 1))(), (c_int32 * (threads + 2))()
    pieces[most].count = begins[threads + 1] = -7
    table = (c_int32 * len(blocks))(*blocks)
    found = library.ls_cut_line(table, len(blocks), threads, whole, pieces, begins)
    assert found == begins[threads] <= most
    assert pieces[most].count == begins[threads + 1] == -7
    spans = [(each.item, range(each.first, each.first + each.count)) for each in pieces[:found]]
    return [Share(spans[begins[t] : begins[t + 1]]) for t in range(threads)]


def modelled(blocks: list[int], threads: int) -> list[Share]:
    """The same in Python: every block of the line by itself, then those side by side within a chunk."""
    line = [(item, block) for item, count in enumerate(blocks) for block in range(count)]
    shares = []
    for thread in range(threads):
        own = line[len(line) * thread // threads : len(line) * (thread + 1) // threads]
        chunks = itertools.groupby(own, lambda at: (at[0], at[1] // CHUNK))
        runs = [(item, [block for _, block in run]) for (item, _), run in chunks]
        shares.append(Share([(item, range(run[0], run[-1] + 1)) for item, run in runs]))
    return shares


@given(LENGTHS, st.integers(1, 16))
def test_shares_differ_by_a_block_and_hold_each_once(blocks: list[int], threads: int) -> None:
    shares = planned(blocks, threads)
    assert shares == modelled(blocks, threads)
    sizes = [share.blocks for share in shares]
    assert max(sizes) - min(sizes) <= 1
    spans = [span for share in shares for span in share.pieces]
    expected = [(item, block) for item, count in enumerate(blocks) for block in range(count)]
    assert [(item, block) for item, blocks in spans for block in blocks] == expected
    # what is kept apart: a part of one chunk for each cut
    apart = [span for span in spans if span[1].start % CHUNK]
    assert len(apart) <= threads - 1


@given(LENGTHS, st.integers(1, 16))
def test_large_partial_sums_are_cut_between_chunks(blocks: list[int], threads: int) -> None:
    shares = planned(blocks, threads, whole=True)
    spans = [span for share in shares for span in share.pieces]
    assert all(span.start % CHUNK == 0 for _, span in spans)
    assert sum(len(span) for _, span in spans) == sum(blocks)
    most = max(share.blocks for share in shares)
    assert most < sum(blocks) / threads + CHUNK


@given(st.lists(st.integers(8, 700), min_size=1, max_size=30), st.integers(1, 8))
def test_the_load_is_within_three_percent_of_even(blocks: list[int], threads: int) -> None:
    """Of any mix that is long enough: 34 blocks a thread."""
    blocks = [*blocks, 34 * threads]
    most = max(share.blocks for share in planned(blocks, threads))
    assert most <= 1.03 * sum(blocks) / threads


def test_one_long_sequence_among_short_ones_is_shared_by_all() -> None:
    """One 32 times longer than seven others, two heads, 16 threads: against one thread for each head."""
    blocks = [32 * 8] * 2 + [8] * 14
    assert max(blocks) >= 4 * max(share.blocks for share in planned(blocks, 16))


def filled(made: Decoder, kind: str, contexts: tuple[int, ...]) -> SequenceStates:
    state = made.new_state(len(contexts), kind)
    for slot, length in enumerate(contexts):
        made.step(
            [StepInput(slot, [index * 31 % 97 for index in range(length)], all_logits=False)], state
        )
        state.commit(slot, range(length))
    return state


def steps(contexts: tuple[int, ...]) -> list[StepInput]:
    """A token, or a tree, of each sequence."""
    return [
        StepInput(slot, list(range(10)), TREE) if slot % 2 else StepInput(slot, [7])
        for slot in range(len(contexts))
    ]


def of_all(made: Decoder, state: SequenceStates, inputs: list[StepInput]) -> list[torch.Tensor]:
    output = made.step(inputs, state)
    for each in inputs:
        state.drop(each.slot)
    return [output.logits[part] for part in output.slices]


@pytest.mark.crossed(3)
@pytest.mark.parametrize("kind", ["float", "int8", "int4", "bfloat16", "float16"])
@pytest.mark.parametrize("mixer", ["softmax", "window", "by-head"])
def test_no_thread_and_no_neighbour_changes_a_bit(
    library: ctypes.CDLL, mixer: str, kind: str
) -> None:
    """Of ragged sequences with tokens and trees: 1 to 4 threads, all together, some, and each alone."""
    same_bits_on_every_set(library, model(mixer, 8, score_cap=5.0), kind)


def test_no_thread_changes_a_bit_beside_sums(library: ctypes.CDLL) -> None:
    same_bits_on_every_set(library, model("aug-softmax", 8), "float")


def same_bits_on_every_set(library: ctypes.CDLL, made: Decoder, kind: str) -> None:
    state, inputs = filled(made, kind, CONTEXTS), steps(CONTEXTS)
    torch.set_num_threads(1)
    expected = [of_all(made, state, [each])[0] for each in inputs]
    orders = (inputs, inputs[::-1], inputs[4:], inputs[::2])
    before = library.ls_isa()
    for number, name in enumerate(instruction_sets(library)):
        assert library.ls_use_isa(name.encode())
        # another order for each number of threads, and others on the next set
        for threads in range(1, 5):
            torch.set_num_threads(threads)
            order = orders[(number + threads) % 4]
            for each, found in zip(order, of_all(made, state, order), strict=True):
                assert torch.equal(found, expected[each.slot])
    assert library.ls_use_isa(before)


@pytest.mark.parametrize("kind", ["float", "int8", "int4"])
def test_shared_pages_are_read_by_whichever_thread(library: ctypes.CDLL, kind: str) -> None:
    made, found = model("softmax", 8), []
    for share in (True, False):
        state = filled(made, kind, (1100, 1100))
        if share:
            state.fork(0, 1)
        for threads in range(1, 4):
            torch.set_num_threads(threads)
            found.append(torch.cat(of_all(made, state, steps((1, 1)))))
    assert all(torch.equal(each, found[0]) for each in found)


@pytest.mark.parametrize("tokens", [1, 40, 64, 200])
def test_a_slice_of_a_prompt_has_the_bits_of_one_thread(library: ctypes.CDLL, tokens: int) -> None:
    """Behind a long text: a slice of one piece shares it out too."""
    made, found = model("softmax", 8), []
    state = filled(made, "float", (1100,))
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(
            of_all(made, state, [StepInput(0, [index % 97 for index in range(tokens)])])[0]
        )
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("changes", [{}, {"score_cap": 3.0}, DISTANT], ids=["plain", "cap", "bias"])
def test_a_ragged_step_is_near_the_step_by_layers(
    library: ctypes.CDLL, changes: dict[str, Any]
) -> None:
    """proof.c holds the kernels against double."""
    made = model("softmax", **changes)
    state, inputs = filled(made, "float", CONTEXTS), steps(CONTEXTS)
    found = torch.cat(of_all(made, state, inputs))
    made.native = None
    expected = torch.cat(of_all(made, state, inputs))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
