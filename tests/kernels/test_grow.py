"""Trees that grow in one call against the same trees level by level, with every instruction set."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from linspec.decoding.step import StepInput
from linspec.decoding.tree import TokenTree
from linspec.drafters import eagle as module
from linspec.drafters.eagle import Eagle, EagleOptions
from linspec.drafters.eagle_net import BOTH, EagleConfig, EagleNet
from linspec.kernels.cpu.grow import Seed
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.models.linear import Quantizer, fused_linear

VOCAB, DRAFTED, WIDTH = 90, 70, 48
TARGET = DecoderConfig(
    vocab_size=VOCAB, width=WIDTH, layers=2, heads=4, kv_heads=2, head_width=12, mlp_width=40
)
SHAPE = EagleConfig(
    width=WIDTH,
    vocab_size=VOCAB,
    reads=(0, 1),
    vocabulary=DRAFTED,
    heads=6,
    kv_heads=2,
    head_width=10,
    mlp_width=72,
)
SHAPES = [
    pytest.param(replace(SHAPE, normed=normed, own_head=own), id=f"{normed:d}{own:d}")
    for normed in (True, False)
    for own in (True, False)
]


def make(shape: EagleConfig, bits: int | None, top: int = 4) -> Eagle:
    generator = torch.Generator().manual_seed(0)
    target = Decoder(TARGET).requires_grad_(False)
    ids = torch.randperm(VOCAB, generator=generator)[:DRAFTED].sort().values.int()
    net = EagleNet(shape, target, [[0.5]], ids)
    for weight in [*target.parameters(), *net.parameters()]:
        scale = weight.shape[-1] ** -0.5 if weight.dim() == 2 else 1.0
        with torch.no_grad():
            weight.normal_(0, 2 * scale, generator=generator)
    target.to_inference()
    drafter = Eagle(net, slots=5, options=EagleOptions(top=top, depth=6))
    with pytest.MonkeyPatch.context() as patch:
        factory = Quantizer(bits, {}) if bits else fused_linear
        patch.setattr(module, "drafting_form", lambda net: net.ready(factory))
        drafter._prepare()
    return drafter


def seed(drafter: Eagle, slot: int, length: int, nodes: int, depth: int) -> Seed:
    """A sequence with `length` committed entries."""
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(0, VOCAB, (length,), generator=generator).tolist()
    states = torch.randn(length, WIDTH, generator=generator)
    drafter.state.reset(slot)
    given = StepInput(slot, tokens, all_logits=False, embeddings=states)
    output = drafter.net.decoder.step([given], drafter.state, want=BOTH)
    drafter.state.commit(slot, range(length))
    ((tokens, shares),) = drafter._tops(output)
    state = drafter.net.fed_back(output.hidden[-1], output.layers[0][-1])
    return Seed(slot, length, nodes, depth, state, tokens, shares)


def both(drafter: Eagle, seeds: list[Seed]) -> tuple[list[TokenTree], list[TokenTree]]:
    roots = list(range(len(seeds)))
    together = drafter._trees(seeds, roots)
    call, drafter._call = drafter._call, None
    assert call is not None
    apart = drafter._trees(seeds, roots)
    drafter._call = call
    return together, apart


def assert_alike(found: TokenTree, expected: TokenTree, near: float = 1e-5) -> None:
    assert (found.tokens, found.parents) == (expected.tokens, expected.parents)
    assert found.confidences == pytest.approx(expected.confidences, abs=near)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_one_call_grows_the_trees_of_the_levels(
    isa: str, shape: EagleConfig, bits: int | None
) -> None:
    drafter = make(shape, bits)
    sizes = [(0, 7, 20, 6), (1, 1, 1, 1), (2, 90, 63, 5), (4, 30, 6, 3)]
    seeds = [seed(drafter, *size) for size in sizes]
    for found, expected, size in zip(*both(drafter, seeds), sizes, strict=True):
        assert len(found) == 1 + min(size[2], 20 + (size[3] - 2) * 16 if size[3] > 1 else 4)
        assert_alike(found, expected)


@pytest.mark.parametrize("top", [1, 2, 12])
def test_trees_of_any_width(library: object, top: int) -> None:
    drafter = make(SHAPE, 8, top)
    found, expected = both(drafter, [seed(drafter, 3, 9, 40, 6)])
    assert_alike(found[0], expected[0])
    if top == 1:
        assert found[0].shape.is_chain and len(found[0]) == 7


def test_sequences_grow_alike_alone_and_together(library: object) -> None:
    drafter = make(SHAPE, 8)
    seeds = [seed(drafter, slot, 5 + 11 * slot, 12 + slot, 4) for slot in range(4)]
    together = drafter._trees(seeds, [0] * 4)
    for each, whole in zip(seeds, together, strict=True):
        assert drafter._trees([each], [0]) == [whole]
    # what was staged means nothing to the next call
    assert drafter._trees(seeds, [0] * 4) == together


def test_the_embeddings_of_a_target_may_be_narrow(library: object) -> None:
    drafter = make(SHAPE, 8)
    embed = drafter.net.target.embed
    embed.weight = nn.Parameter(embed.weight.bfloat16(), requires_grad=False)
    drafter.net.decoder.finalize_weights()
    found, expected = both(drafter, [seed(drafter, 0, 9, 20, 4)])
    assert_alike(found[0], expected[0])
