"""What `h2o` and `snapkv` keep. That all their forms agree is shown with those of all mixers."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    GROUP,
    assert_close,
    full_logits,
    prefilled,
    random_tokens,
    tiny_config,
    tiny_model,
)
from hypothesis import given
from hypothesis import strategies as st

from linspec.errors import ConfigError
from linspec.mixers import MIXERS
from linspec.mixers.config import MixerConfig
from linspec.mixers.evicting import Evicting
from linspec.mixers.ops.kept_rows import unpack_rows

NAMES = ("h2o", "snapkv")
WIDTH, BUDGET = 4, 5


def made(name: str, budget: int = BUDGET, group: int = GROUP, **options: int) -> Evicting:
    """A mixer of one KV head of width 4 with one query head."""
    mixer = MixerConfig(name=name, group=group, options={"budget": budget, **options})
    part = MIXERS[name](tiny_config(mixer, kv_heads=4), mixer)
    assert isinstance(part, Evicting)
    return part


def closed(mixer: Evicting, *groups: tuple[list[float], list[float]]) -> list[float]:
    """Which tokens are left, by their first values: groups of first components of keys and of queries."""
    sums = torch.zeros(1, mixer.budget, 2 * WIDTH + 1, dtype=torch.float64)
    number = 0
    for keys, queries in groups:
        entries = torch.zeros(1, len(keys), 2 * WIDTH, dtype=torch.float64)
        entries[0, :, 0], entries[0, :, WIDTH] = torch.tensor(keys), torch.tensor(queries)
        values = torch.zeros(1, len(keys), WIDTH, dtype=torch.float64)
        values[0, :, 0] = torch.arange(number, number + len(keys))
        number += len(keys)
        sums = mixer.fold(sums, entries, values)
    _, values, there = unpack_rows(sums)
    return values[0, there[0, :, 0], 0].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_with_room_for_all_tokens_it_is_softmax(name: str) -> None:
    mixer = MixerConfig(name=name, group=GROUP, options={"budget": 100})
    model, plain = tiny_model(mixer), tiny_model("softmax", taps=0)
    plain.load_state_dict(model.state_dict())
    texts = [random_tokens(length) for length in (3, 2 * GROUP, 7 * GROUP + 1)]
    assert_close(full_logits(model, texts), full_logits(plain, texts))


@given(name=st.sampled_from(NAMES), length=st.integers(0, 6 * GROUP))
def test_kept_rows_lie_in_order_behind_those_that_are_not_there(name: str, length: int) -> None:
    model = tiny_model(name, taps=0)
    state = prefilled(model, random_tokens(length))
    for part in state.parts:
        there = unpack_rows(part.sums)[2][..., 0]
        out = max(0, length // GROUP + 1 - part.spec.span) * GROUP
        expected = torch.arange(BUDGET) >= BUDGET - min(out, BUDGET)
        assert torch.equal(there, expected.expand_as(there))


def test_h2o_keeps_what_was_weighed_once_though_nobody_asks_for_it_any_more() -> None:
    """And `snapkv` does not: its scores are those of the newest group."""
    first = ([0.0, 9.0, 0.0, 0.0], [0.0, 0.0, 9.0, 9.0])
    later = ([0.0, 0.0, 0.0, -9.0], [0.0, 0.0, -9.0, -9.0])
    groups = (first, later)
    assert 1.0 in closed(made("h2o", budget=2), *groups)
    assert 1.0 not in closed(made("snapkv", budget=2, pool=1), *groups)


@pytest.mark.parametrize("name", NAMES)
def test_of_rows_that_are_worth_the_same_the_earlier_ones_stay(name: str) -> None:
    # a query that looks for nothing weighs what it sees equally: earlier rows are seen more often
    still = ([0.0] * GROUP, [0.0] * GROUP)
    assert closed(made(name, budget=3), still, still, still) == [0.0, 1.0, 2.0]


def test_snapkv_hears_the_last_queries_of_a_group_alone() -> None:
    keys = [5.0, 0.0, -5.0, 0.0, 0.0, 0.0]
    mixer = made("snapkv", budget=1, group=6, last=2, pool=1)
    for early in (-9.0, 0.0, 9.0):
        assert closed(mixer, (keys, [early] * 4 + [3.0, 3.0])) == [0.0]
        assert closed(mixer, (keys, [early] * 4 + [-3.0, -3.0])) == [2.0]


def test_snapkv_keeps_the_neighbours_of_what_was_looked_for() -> None:
    keys = [0.0, 0.0, 0.0, 9.0, 0.0, 0.0, 0.0, 0.0]
    queries = [0.0] * 6 + [9.0, 9.0]
    mixer = made("snapkv", budget=3, group=8, last=2, pool=3)
    assert closed(mixer, (keys, queries)) == [2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("h2o", {"options": {"budget": 0}}, "budget must be 1 or more, got 0"),
        ("h2o", {"options": {"pool": 3}}, "mixer 'h2o' has no 'pool' to set, got 3"),
        ("h2o", {"kernel": "softmax"}, "'h2o' has softmax weights; kernel 'softmax' means nothing"),
        ("snapkv", {"options": {"pool": 4}}, "pool must be odd, .* got 4"),
        ("snapkv", {"options": {"last": 0}}, "last must be 1 or more, got 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    name: str, settings: dict[str, object], message: str
) -> None:
    mixer = MixerConfig(name=name, group=GROUP, **settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        MIXERS[name](tiny_config(mixer), mixer)
