"""A sequence in shards is the sequence: outputs and gradients, for every mixer, in one process."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch
from helpers import (
    CASES,
    GROUP,
    MIXER_NAMES,
    assert_close,
    mixer_config,
    random_tokens,
    randomise,
    tiny_config,
    tiny_model,
)
from hypothesis import given
from hypothesis import strategies as st

from linspec.mixers import MIXERS, Mixer
from linspec.mixers.by_head import ByHead
from linspec.mixers.carry import Carry, cut
from linspec.mixers.config import RelativeConfig
from linspec.mixers.ops.exact import Groups
from linspec.mixers.ops.summed import Summed
from linspec.mixers.shards import Exchange, Message, Shard, on_shard
from linspec.mixers.softmax import Softmax
from linspec.mixers.window import Window
from linspec.models.decoder import Decoder
from linspec.state.grouped import GroupedSpec

# ends at group borders, inside groups, and shards shorter than a group, a window or the taps
LENGTHS = (
    (2 * GROUP, 3 * GROUP, GROUP + 1),
    (GROUP + 3, 2 * GROUP + 3, 3 * GROUP),
    (1, 2, 5 * GROUP + 1, 1, 3, 2, 7),
    (3 * GROUP + 1, 1, 1, 1, 4 * GROUP + 3),
)


class Table:
    """Where the shards of one process meet, each in a thread of its own."""

    def __init__(self, shards: int) -> None:
        self.messages: list[Message] = [()] * shards
        self.told: list[list[int]] = [[] for _ in range(shards)]
        self.barrier = threading.Barrier(shards, timeout=60)

    def seat(self, rank: int) -> Exchange:
        def exchange(
            anchor: torch.Tensor, message: Message
        ) -> tuple[torch.Tensor, Sequence[Message]]:
            self.barrier.wait()
            self.messages[rank] = message
            self.told[rank].append(sum(each.numel() for each in message))
            self.barrier.wait()
            # as a gather needs them
            assert len({tuple(x.shape for x in each) for each in self.messages}) == 1
            return anchor, list(self.messages)

        return exchange

    @contextlib.contextmanager
    def barrier_broken_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.barrier.abort()
            raise


def in_shards(
    models: Sequence[Decoder],
    x: torch.Tensor,
    lengths: tuple[int, ...],
    told: list[list[int]] | None = None,
) -> torch.Tensor:
    """Final states [B, T, D] of embeddings that the blocks of equal models take, one a shard.

    told: gets how many numbers each shard told in each exchange.
    """
    table = Table(len(lengths))
    borders = list(pairwise(accumulate(lengths, initial=0)))

    def compute(rank: int) -> torch.Tensor:
        model, (start, end) = models[rank], borders[rank]
        shard = Shard(lengths, rank, table.seat(rank))
        with table.barrier_broken_on_error(), on_shard(model, shard):
            return through(model, x[:, start:end], start)

    with ThreadPoolExecutor(len(lengths)) as pool:
        found = torch.cat(list(pool.map(compute, range(len(lengths)))), dim=1)
    if told is not None:
        told.extend(table.told)
    return found


def through(model: Decoder, x: torch.Tensor, start: int = 0) -> torch.Tensor:
    ropes = model.ropes(torch.arange(start, start + x.shape[1]), x.dtype)
    for block, rope in zip(model.layers, ropes, strict=True):
        x = block(x, rope)
    return model.leave(x)


def check_same(models: Sequence[Decoder], whole: Decoder, lengths: tuple[int, ...]) -> None:
    """Outputs and all gradients of a sequence in shards, one a model, are those of the whole one."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, sum(lengths), 16, dtype=torch.float64, generator=generator)
    pull = torch.randn(x.shape, dtype=x.dtype, generator=generator)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    given, wanted = in_shards(models, ours, lengths), through(whole, theirs)
    assert_close(given, wanted)
    (given * pull).sum().backward()
    (wanted * pull).sum().backward()
    assert_close(ours.grad, theirs.grad)
    for weight, *parts in zip(whole.parameters(), *(m.parameters() for m in models), strict=True):
        # processes add up the gradients that there are: a weight has one in all, or in none
        assert {part.grad is None for part in parts} == {weight.grad is None}
        if weight.grad is not None:
            found = sum(part.grad for part in parts)
            torch.testing.assert_close(found, weight.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.crossed(15)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("name", "taps"), CASES, ids=str)
def test_shards_give_the_outputs_and_gradients_of_the_whole(
    name: str, taps: int, lengths: tuple[int, ...]
) -> None:
    models = [tiny_model(name, taps=taps) for _ in lengths]
    check_same(models, tiny_model(name, taps=taps), lengths)


@pytest.mark.parametrize("name", ["softmax", "window", "aug", "local:softmax"])
def test_shards_know_the_distance_to_what_lies_before_them(name: str) -> None:
    mixers = (mixer_config(name), mixer_config(name))
    given = {"positions": "relative", "relative": RelativeConfig(buckets=8, max_distance=16)}
    config = replace(tiny_config(*mixers), **given)
    models = [randomise(Decoder(config), 0).double() for _ in range(4)]
    check_same(models[1:], models[0], (GROUP + 1, 3, 2 * GROUP))


@pytest.mark.parametrize("lengths", [(GROUP, GROUP + 3, 2), (3 * GROUP,)], ids=str)
def test_a_hybrid_says_in_shards_what_it_says_of_the_whole(lengths: tuple[int, ...]) -> None:
    models = [tiny_model("softmax", "gla", "by-head", "aug:softmax") for _ in lengths]
    check_same(models, tiny_model("softmax", "gla", "by-head", "aug:softmax"), lengths)


# ---- what is told

# further columns of a summary: what is left of each channel, or of the whole state
LEFT = {"gla": 1, "gdn": 4}


def told(name: str, lengths: tuple[int, ...]) -> list[int]:
    """Numbers that one shard tells the others, for each exchange of a layer."""
    mixer = replace(mixer_config(name), span=1)
    models = [tiny_model(mixer, mixer) for _ in lengths]
    found: list[list[int]] = []
    x = torch.zeros(1, sum(lengths), 16, dtype=torch.float64)
    in_shards(models, x, lengths, found)
    assert len({tuple(each) for each in found}) == 1, "shards tell each other equally much"
    half = len(found[0]) // 2
    assert found[0][:half] == found[0][half:], "layers are equal"
    return found[0][:half]


def expected(mixer: Mixer, name: str, tokens: int) -> int:
    """The closed form of what a shard tells that ends with a group, of one sequence."""
    spec, rows, older = mixer.state_spec(), 0, 0
    carry = mixer.carry()
    assert carry is not None
    if carry.span is None:
        rows = tokens
    elif isinstance(spec, GroupedSpec):
        older = spec.sum_width * ((spec.sum_columns or spec.value_width) + LEFT.get(name, 0))
        # within a span of one, only the convolution reads what lies before
        rows = spec.conv_history
    elif isinstance(mixer, Window):
        rows = mixer.mixer.window - 1
    return spec.kv_heads * (rows * (spec.key_width + spec.value_width) + older)


@pytest.mark.crossed(3)
@pytest.mark.parametrize("name", MIXER_NAMES)
def test_what_shards_tell_each_other_has_the_size_of_the_state(name: str) -> None:
    config = tiny_config(replace(mixer_config(name), span=1))
    mixer = MIXERS[config.mixers[0].name](config, config.mixers[0])
    parts = [part for part, _ in mixer.shares] if isinstance(mixer, ByHead) else [mixer]
    for tokens in (3 * GROUP, 9 * GROUP):
        sizes = [expected(part, name.partition(":")[0], tokens) for part in parts]
        assert told(name, (tokens,) * 3) == [size for size in sizes if size]


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    group=st.integers(1, 6),
    span=st.none() | st.integers(1, 4),
    history=st.integers(0, 9),
)
def test_pieces_of_shards_cover_them_and_are_few(
    lengths: list[int], group: int, span: int | None, history: int
) -> None:
    for older in (None, Summed(Groups(group))):
        carry, at = Carry(group, span, older), 0
        for each, length in zip(cut(carry, lengths, history), lengths, strict=True):
            assert (each.start, each.end) == (at, at + length)
            at = each.end
            assert each.start <= each.head <= each.closed <= each.end
            assert each.start <= each.tail and each.tail <= max(each.closed, each.end - history)
            if each.closed > each.head:
                assert each.closed % group == 0 and (older is None or each.head % group == 0)
            if span is not None:
                assert each.rows <= (span + 1) * group + history


# ---- who cannot


class Nearer(Softmax):
    """Weighs what softmax weighs in another way."""

    def mix(self, q: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return super().mix(q / 2, *others)


class Said(Nearer):
    """... and says that it reads what softmax reads."""

    def carry(self) -> Carry:
        return super().carry()


def test_a_mixer_does_not_inherit_what_it_no_longer_is() -> None:
    mixer = mixer_config("softmax")
    config = tiny_config(mixer)
    assert Nearer(config, mixer).part_carries() == (None,)
    assert Said(config, mixer).part_carries() == (Carry(span=None),)


def test_a_model_is_whole_again_behind_its_shard() -> None:
    model = tiny_model("aug", "by-head")
    ids = torch.tensor([random_tokens(9)])
    before = model(ids)
    with pytest.raises(RuntimeError, match="broken"), on_shard(model, Shard((4, 5), 1, broken)):
        model(ids[:, 4:])
    assert torch.equal(model(ids), before)


def broken(anchor: torch.Tensor, message: Message) -> tuple[torch.Tensor, Sequence[Message]]:
    raise RuntimeError("a broken line")
