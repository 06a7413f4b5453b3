"""Rows that stay of closed groups: C against torch, and steps in which groups close against single tokens."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch
from kernels.test_native_step import model

from linspec.decoding.step import StepInput
from linspec.kernels.cpu import evict as kernels
from linspec.kernels.cpu.library import instruction_sets
from linspec.mixers import MIXERS
from linspec.mixers.config import MixerConfig
from linspec.mixers.evicting import Evicting
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.state.sequence_states import SequenceStates

SPECS = {
    # fewer rows than a block, more than two, and more than ever close here
    "few": MixerConfig(name="h2o", group=16, span=2, options={"budget": 40}),
    "blocks": MixerConfig(name="h2o", group=8, options={"budget": 150}),
    "all": MixerConfig(name="h2o", group=8, span=3, options={"budget": 2000}),
    "snapkv": MixerConfig(name="snapkv", group=16, span=2, options={"budget": 40, "last": 5}),
    "long": MixerConfig(name="snapkv", group=64, span=2, options={"budget": 128, "pool": 1}),
}
# nodes 1, 2, 4, 7 and their like lie on paths of their own
TREE = [-1, 0, 0, 1, 2, 3, 4, 5, 5, 6, 7, 9, 8, 10, 11, 12, 13, 14, 15, 16]
IDS = torch.randint(97, (400,), generator=torch.Generator().manual_seed(1)).tolist()


def made_of(form: str, bits: int | None = 8) -> Decoder:
    if form == "by-head":
        own = MixerConfig(name="by-head", group=16, span=2, sinks=4, exact_heads=(0, 2))
        own = replace(own, options={"exact": "h2o:budget=40,group=16"})
        return model("by-head", bits, mixers=(own,) * 3, heads=12, kv_heads=4)
    return model("softmax", bits, mixers=(SPECS[form], MixerConfig(), SPECS[form]))


def read(made: Decoder, state: SequenceStates, slot: int, ids: list[int]) -> torch.Tensor:
    logits = made.step([StepInput(slot, ids)], state).logits
    state.commit(slot, range(len(ids)))
    return logits


def paths(parents: list[int]) -> list[list[int]]:
    """Of each node: its ancestors, and itself."""
    found: list[list[int]] = []
    for node, parent in enumerate(parents):
        found.append([*(found[parent] if parent >= 0 else []), node])
    return found


# ---- what stays


def mixer_of(name: str, *, width: int, repeats: int, cap: float, **options: int) -> Evicting:
    config = DecoderConfig(
        vocab_size=9,
        width=32,
        layers=1,
        heads=2 * repeats,
        kv_heads=2,
        head_width=width,
        mlp_width=32,
        score_cap=cap,
    )
    part = MIXERS[name](config, MixerConfig(name=name, group=16, options=options))
    assert isinstance(part, Evicting)
    return part


def closed(mixer: Evicting, groups: int, *, torch_too: bool) -> list[torch.Tensor]:
    """Rows after each of some random groups, in C and, from the same rows on, in torch."""
    draw = torch.Generator().manual_seed(groups)
    kept = torch.zeros(2, mixer.budget, mixer.sum_columns())
    found = []
    for _ in range(groups):
        keys = torch.randn(2, 16, (1 + mixer.repeats) * mixer.head_width, generator=draw)
        values = torch.randn(2, 16, mixer.head_width, generator=draw)
        plain = mixer.fold_by_torch(kept, keys, values) if torch_too else None
        kept = mixer.fold(kept, keys, values)
        found.append(kept)
        if plain is not None:
            torch.testing.assert_close(kept, plain, rtol=1e-5, atol=1e-5)
    return found


@pytest.mark.parametrize("width", [24, 64])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("h2o", {"budget": 5}),
        ("h2o", {"budget": 50}),
        ("snapkv", {"budget": 50, "last": 5, "pool": 7}),
        ("snapkv", {"budget": 50, "last": 100, "pool": 1}),
    ],
)
@pytest.mark.parametrize(("repeats", "cap"), [(1, 0.0), (3, 2.0)])
def test_c_keeps_the_rows_that_torch_keeps(
    isa: str, name: str, options: dict[str, int], width: int, repeats: int, cap: float
) -> None:
    mixer = mixer_of(name, width=width, repeats=repeats, cap=cap, **options)
    assert kernels.why_not(torch.zeros(1)) is None
    closed(mixer, 6, torch_too=True)


@pytest.mark.parametrize("name", ["h2o", "snapkv"])
def test_every_set_and_number_of_threads_keeps_the_same_bits(
    library: ctypes.CDLL, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixer = mixer_of(name, width=24, repeats=3, cap=2.0, budget=50)
    before, found = library.ls_isa(), []
    for each in instruction_sets(library):
        assert library.ls_use_isa(each.encode())
        for threads in (1, 3):
            monkeypatch.setattr(kernels, "native_threads", lambda n=threads: n)
            found.append(closed(mixer, 6, torch_too=False))
    assert library.ls_use_isa(before)
    assert all(
        torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True)
    )


def test_of_rows_that_are_worth_the_same_c_keeps_the_earlier_ones(isa: str) -> None:
    mixer = mixer_of("h2o", width=24, repeats=1, cap=0.0, budget=10)
    kept = torch.zeros(2, 10, mixer.sum_columns())
    # who looks for nothing weighs all that it sees alike, and later rows are seen less often
    values = torch.arange(16.0)[:, None].expand(2, 16, 24)
    kept = mixer.fold(kept, torch.zeros(2, 16, 48), values)
    assert kept[:, :, 24].tolist() == [list(range(10))] * 2


def test_gradients_and_other_dtypes_are_left_to_torch(library: ctypes.CDLL) -> None:
    mixer = mixer_of("h2o", width=24, repeats=1, cap=0.0, budget=10)
    rows, keys, values = torch.zeros(2, 10, 49), torch.randn(2, 16, 48), torch.randn(2, 16, 24)
    assert "float32" in str(kernels.why_not(rows.double(), keys, values))
    keys.requires_grad_()
    assert kernels.why_not(rows, keys, values) == "gradients are asked for"
    assert mixer.fold(rows, keys, values).requires_grad
    with torch.no_grad():
        assert kernels.why_not(rows, keys, values) is None


# ---- steps


@pytest.mark.crossed(4)
@pytest.mark.parametrize("form", [*SPECS, "by-head"])
def test_one_call_reads_what_the_mixer_does(isa: str, form: str) -> None:
    """A prompt in slices, trees in which groups close beside a shorter slot, what a fork goes on with."""
    made, found = made_of(form, None), []
    assert made.native is not None
    native = made.native
    for each in (native, None):
        made.native = each
        state, outputs = made.new_state(3), []
        for first, last in ((0, 70), (70, 87), (87, 290)):
            outputs.append(read(made, state, 0, IDS[first:last]))
        read(made, state, 1, IDS[:40])
        state.fork(0, 2)
        for turn in range(3):
            new = [
                StepInput(slot, [slot + node + turn for node in range(20)], TREE) for slot in (0, 1)
            ]
            outputs.append(made.step(new, state).logits)
            state.commit(0, [0, 2, 4, 6, 9, 11])
            state.commit(1, [0, 1, 3])
        outputs += [read(made, state, slot, IDS[:at]) for slot in (0, 2) for at in (1, 70)]
        found.append(outputs)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.crossed(2)
@pytest.mark.parametrize("form", [*SPECS, "by-head"])
@pytest.mark.parametrize("held", [95, 127, 130, 143])
def test_a_node_gets_the_same_bits_however_it_comes(isa: str, form: str, held: int) -> None:
    """Tokens of a chain: as one prompt, in slices, one by one, as paths of a tree beside another slot's."""
    made = made_of(form)
    state = made.new_state(3)
    whole = read(made, state, 0, IDS[:held])
    first = held // 3
    parts = [read(made, state, 1, IDS[a:b]) for a, b in ((0, first), (first, held - 5))]
    parts += [read(made, state, 1, [IDS[at]]) for at in range(held - 5, held)]
    assert torch.equal(torch.cat(parts), whole)
    read(made, state, 2, IDS[100:150])
    tokens = [(7 * node + held) % 97 for node in range(len(TREE))]
    both = [StepInput(1, tokens, TREE), StepInput(2, IDS[:20], TREE)]
    together = made.step(both, state).logits
    state.drop(1)
    for path in paths(TREE):
        if len(path) < 6:
            continue
        alone = made.step([StepInput(0, [tokens[node] for node in path])], state).logits
        state.drop(0)
        assert torch.equal(alone, together[path])
    before = state.snapshot(0)
    for node in paths(TREE)[-1]:
        assert torch.equal(read(made, state, 0, [tokens[node]])[0], together[node])
    state.restore(0, before)
    assert torch.equal(made.step([StepInput(0, tokens, TREE)], state).logits, together[:20])


@pytest.mark.parametrize("form", [*SPECS, "by-head"])
def test_a_commit_is_a_fresh_prefill_to_the_bit(library: ctypes.CDLL, form: str) -> None:
    """What is kept after drafts that were accepted and refused is what the accepted text alone leaves."""
    made = made_of(form)
    state, text = made.new_state(2), IDS[:60]
    read(made, state, 0, text)
    for turn in range(14):
        tokens = [(5 * node + turn) % 97 for node in range(len(TREE))]
        path = paths(TREE)[(3 * turn) % len(TREE)]
        made.step([StepInput(0, tokens, TREE)], state)
        state.commit(0, path)
        text = [*text, *(tokens[node] for node in path)]
    read(made, state, 1, text)
    for part in state.parts:
        one, other = part.snapshot(0), part.snapshot(1)
        for name in ("keys", "values", "sums"):
            pair = getattr(one, name), getattr(other, name)
            assert pair == (None, None) or torch.equal(*pair)


@pytest.mark.parametrize("form", ["few", "long"])
def test_bits_are_those_of_every_number_of_threads(
    library: ctypes.CDLL, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, found = made_of(form), []
    for threads in (1, 2, 5):
        monkeypatch.setattr("linspec.kernels.cpu.step.native_threads", lambda n=threads: n)
        state = made.new_state(2)
        outputs = [read(made, state, 0, IDS[:300])]
        new = [StepInput(slot, list(range(20)), TREE) for slot in (0, 1)]
        outputs.append(made.step(new, state).logits)
        found.append(outputs)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
