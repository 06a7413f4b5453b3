"""A block drafter in one call of the C library: what its layers say, on every instruction set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from linspec.drafters import DrafterContext, make_drafter
from linspec.drafters.block import Block, ready_net
from linspec.drafters.block_cache import Asked, BlockCache, draft
from linspec.drafters.block_net import BlockConfig
from linspec.drafters.packed_block import PackedBlockNet
from linspec.drafters.saved import save_drafter
from linspec.drafters.saved_packed import BLOCK
from linspec.kernels.cpu.library import load
from linspec.models.linear import Quantizer, fused_linear
from tests.block_drafters import SHAPE, VOCAB, make_net, make_target

pytestmark = pytest.mark.skipif(load().library is None, reason=load().reason)
SHAPES = {
    "small": SHAPE,
    "one-layer": replace(SHAPE, depth=1, places=5, window=40),
    "all-tokens": replace(SHAPE, vocabulary=0, kv_heads=4, rank=33, window=1),
    "one-place": replace(SHAPE, places=1, read=(0, 1, 2), heads=3, kv_heads=1, head_width=24),
}
# rounds of (slot, position, new tokens)
ROUNDS: list[list[tuple[int, int, int]]] = [
    [(1, 30, 30), (0, 1, 1)],
    [(0, 4, 3), (1, 31, 1), (2, 70, 70)],
    [(2, 75, 5), (0, 5, 1)],
    *[[(2, 75 + n, 1), (1, 31 + n, 1)] for n in range(1, 20)],
]


def packed(shape: BlockConfig, bits: int | None) -> PackedBlockNet:
    target = make_target()
    net = make_net(target, shape)
    target.to_inference()
    return PackedBlockNet.of(net, Quantizer(bits, {}) if bits else fused_linear)


def text(shape: BlockConfig) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(100, shape.width, generator=generator) for _ in shape.read]


def asked(states: Sequence[torch.Tensor], each: tuple[int, int, int]) -> Asked:
    slot, position, new = each
    root = 7 * position % VOCAB
    return Asked(slot, slot, root, position, [[s[position - new : position] for s in states]])


def cache_of(net: PackedBlockNet) -> BlockCache:
    return BlockCache(net.config, torch.device("cpu"), torch.float32)


@pytest.mark.crossed(4)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("bits", [None, 8])
def test_one_call_drafts_what_the_layers_say(
    isa: str, shape: BlockConfig, bits: int | None
) -> None:
    net, states = packed(shape, bits), text(shape)
    called, layered = cache_of(net), cache_of(net)
    agreed = total = 0
    for each in ROUNDS:
        found = net.draft(called, [asked(states, one) for one in each])
        expected = draft(net, layered, [asked(states, one) for one in each])
        assert (called.counts, called.ends) == (layered.counts, layered.ends)
        slots = [slot for slot, _, _ in each]
        for ours, theirs in zip(called.seen(slots)[0], layered.seen(slots)[0], strict=True):
            # a rounded code of an input may differ by one
            near = 1e-4 if bits is None else 0.03
            torch.testing.assert_close(ours, theirs, rtol=near, atol=near)
        for tokens, sure, right, honest in zip(*found, *expected, strict=True):
            same = [a == b for a, b in zip(tokens, right, strict=True)]
            # behind another token all may differ
            until = same.index(False) + 1 if False in same else len(same)
            near = 1e-4 if bits is None else 0.02
            assert sure[:until] == pytest.approx(honest[:until], abs=near)
            agreed += until - (False in same)
            total += until
    # the output layer is always a copy in 8 bits, whose inputs are rounded
    assert agreed >= 0.97 * total


@pytest.mark.parametrize("bits", [None, 8])
def test_packing_changes_little(bits: int | None) -> None:
    target = make_target()
    net = make_net(target)
    target.to_inference()
    made = PackedBlockNet.of(net, Quantizer(8, {}) if bits else fused_linear)
    states = text(SHAPE)
    plain = draft(
        net, BlockCache(SHAPE, torch.device("cpu"), torch.float32), [asked(states, (0, 30, 30))]
    )
    found = draft(made, cache_of(made), [asked(states, (0, 30, 30))])
    assert found[1][0][0] == pytest.approx(plain[1][0][0], abs=1e-4 if bits is None else 0.05)


def test_drafts_of_a_sequence_do_not_depend_on_others() -> None:
    net, states = packed(SHAPE, 8), text(SHAPE)
    together = cache_of(net)
    alone = {slot: cache_of(net) for slot in range(3)}
    for each in ROUNDS:
        found = net.draft(together, [asked(states, one) for one in each])
        for i, one in enumerate(each):
            single = net.draft(alone[one[0]], [asked(states, one)])
            assert single[0] == [found[0][i]]
            assert single[1][0] == pytest.approx(found[1][i], abs=1e-5)


def test_without_the_library_torch_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    from linspec.drafters import packed_block
    from linspec.kernels.cpu.library import Found

    net, states = packed(SHAPE, 8), text(SHAPE)
    expected = net.draft(cache_of(net), [asked(states, (0, 30, 30))])
    other = packed(SHAPE, 8)
    monkeypatch.setattr(packed_block, "load", lambda: Found(None, "torch", "a test"))
    found = other.draft(cache_of(other), [asked(states, (0, 30, 30))])
    assert found[0] == expected[0] and found[1][0] == pytest.approx(expected[1][0], abs=0.02)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_packed_drafter_loads_exactly_and_mapped(tmp_path: Path, bits: int) -> None:
    target = make_target()
    made = PackedBlockNet.of(make_net(target), Quantizer(bits, {}))
    folder = BLOCK.save(made, target, tmp_path / "d", bits, {"loss": 1.0})
    found = ready_net(folder, make_target())
    assert isinstance(found, PackedBlockNet) and found.measured == made.measured
    states = text(SHAPE)
    ask = [asked(states, (0, 30, 30))]
    assert found.draft(cache_of(found), ask) == made.draft(cache_of(made), ask)
    weights = [tensor for tensor in found.state_dict().values() if tensor.dtype == torch.uint8]
    assert len({tensor.untyped_storage().data_ptr() for tensor in weights}) == 1


def test_a_plain_drafter_is_packed_for_a_target_that_runs_natively(tmp_path: Path) -> None:
    target = make_target()
    save_drafter(make_net(target), target, tmp_path / "d", dtype=None)
    found = make_drafter(f"block:{tmp_path / 'd'}", DrafterContext(target))
    assert isinstance(found, Block) and isinstance(found.net, PackedBlockNet)
    target.to_inference()
    states = text(SHAPE)
    first = found.net.draft(cache_of(found.net), [asked(states, (0, 30, 30))])
    assert len(first[0][0]) == 4


def test_a_target_that_is_prepared_later_is_used_as_it_is_then() -> None:
    target = make_target()
    net = PackedBlockNet.of(make_net(target), Quantizer(8, {}))
    before = net.bound()
    target.to_inference(Quantizer(8, {}))
    assert net.bound().output is not before.output and net.bound() is net.bound()
