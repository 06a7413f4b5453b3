"""Ops against the loops that stand beside them."""

from __future__ import annotations

import pytest
import torch
from helpers import GROUP, assert_close

from linspec.mixers.ops.convolution import convolve, convolve_reference
from linspec.mixers.ops.decayed import Decayed, decayed_reference, plain_writes
from linspec.mixers.ops.delta import delta_reference, delta_writes
from linspec.mixers.ops.exact import Groups
from linspec.mixers.ops.features import same, unit

TIME, WIDTH = 3 * GROUP + 2, 4


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def keys_only(x: torch.Tensor) -> torch.Tensor:
    return unit(x[..., :WIDTH])


def joined(blocks: torch.Tensor) -> torch.Tensor:
    """[1, 1, n, c, V] of one head -> [T, V]."""
    return blocks[0, 0].flatten(0, 1)[:TIME]


@pytest.mark.parametrize("span", [1, 2])
@pytest.mark.parametrize("through_state", [True, False])
@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_a_fading_state_is_its_recurrence(chunk: int, through_state: bool, span: int) -> None:
    q, k, v = (unit(random(TIME, WIDTH, seed=seed)) for seed in range(3))
    log_a = -random(TIME, WIDTH, seed=3).abs()
    groups = Groups(GROUP, span)
    part = Decayed(groups, same, keys_only, WIDTH, WIDTH, chunk, through_state, plain_writes)
    entries = torch.cat((k, log_a), dim=-1)
    found = part.blocks(q[None, None, None], entries[None, None], v[None, None], None)
    expected = decayed_reference(q, k, v, log_a.exp(), seen_of(groups, through_state))
    assert_close(joined(found), expected)


@pytest.mark.parametrize("span", [1, 2])
@pytest.mark.parametrize("through_state", [True, False])
@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_the_delta_rule_is_its_recurrence(chunk: int, through_state: bool, span: int) -> None:
    q, k, v = (unit(random(TIME, WIDTH, seed=seed)) for seed in range(3))
    log_a, rate = -random(TIME, 1, seed=3).abs(), random(TIME, 1, seed=4).sigmoid()
    groups = Groups(GROUP, span)
    part = Decayed(groups, same, keys_only, WIDTH, 1, chunk, through_state, delta_writes)
    entries = torch.cat((k, log_a, rate), dim=-1)
    found = part.blocks(q[None, None, None], entries[None, None], v[None, None], None)
    seen = seen_of(groups, through_state)
    expected = delta_reference(q, k, v, log_a[:, 0].exp(), rate[:, 0], seen)
    assert_close(joined(found), expected)


def seen_of(groups: Groups, through_state: bool):  # type: ignore[no-untyped-def]
    """What t reads through the state: all tokens up to it, or those before its span."""
    if through_state:
        return lambda t: range(t + 1)
    return lambda t: range(max(0, t // groups.size - groups.span + 1) * groups.size)


def test_folding_in_pieces_is_folding_at_once() -> None:
    k, v, log_a = random(2, TIME, WIDTH), random(2, TIME, WIDTH, seed=1), -random(2, TIME, 1).abs()
    entries = torch.cat((k, log_a, log_a.exp()), dim=-1)
    start = random(2, WIDTH, WIDTH, seed=2)
    for writes in (plain_writes, delta_writes):
        part = Decayed(Groups(GROUP), same, keys_only, WIDTH, 1, 3, True, writes)
        pieces = start
        for cut in (slice(0, 5), slice(5, 6), slice(6, TIME)):
            pieces = part.fold(pieces, entries[:, cut], v[:, cut])
        assert_close(pieces, part.fold(start, entries, v))


@pytest.mark.parametrize("taps", [1, 3, 9])
def test_the_banded_convolution_is_its_sum(taps: int) -> None:
    v, kernel = random(1, 1, TIME, WIDTH), random(2, taps, seed=1)
    found = convolve(v, kernel, 2, None, block=4)[0]
    expected = [convolve_reference(v[0, 0], each) for each in kernel]
    assert_close(found, torch.stack(expected))
