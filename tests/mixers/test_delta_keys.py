"""Keys as changes above a threshold: bounds, what is kept, and what it saves."""

from __future__ import annotations

import pytest
import torch
from helpers import GROUP, assert_close, full_logits, random_tokens, tiny_config, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from linspec.errors import ConfigError
from linspec.mixers import MIXERS
from linspec.mixers.config import MixerConfig
from linspec.mixers.ops.key_changes import encoded, products_saved, rebuilt

TEXTS = [random_tokens(length) for length in (3, 2 * GROUP, 7 * GROUP + 1)]
# lengths, groups, spans and thresholds of keys that wander
KEYS = {
    "length": st.integers(1, 70),
    "group": st.sampled_from((1, 4, 7)),
    "threshold": st.sampled_from((0.0, 0.1, 0.5, 3.0)),
    "seed": st.integers(0, 100),
}


def wandering(length: int, seed: int, heads: int = 2, width: int = 6) -> torch.Tensor:
    """Keys of neighbours that are alike, as those of texts are."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(heads, length, width, generator=generator) * 0.3
    return steps.cumsum(1)


def delta(threshold: float, span: int = 1) -> MixerConfig:
    return MixerConfig(name="delta", group=GROUP, span=span, options={"threshold": threshold})


def difference(mixer: MixerConfig) -> float:
    """How far logits lie from those of softmax with the same weights."""
    model, plain = tiny_model(mixer, mixer), tiny_model("softmax", taps=0)
    plain.load_state_dict(model.state_dict())
    return float((full_logits(model, TEXTS) - full_logits(plain, TEXTS)).abs().max())


@pytest.mark.parametrize("mixer", [delta(0.0), delta(9.0, span=8)], ids=["whole", "near"])
def test_without_a_threshold_or_with_all_groups_near_it_is_softmax(mixer: MixerConfig) -> None:
    assert difference(mixer) < 1e-10


def test_with_a_threshold_far_keys_are_others() -> None:
    assert difference(delta(0.7)) > 1e-3


@given(**KEYS)
def test_no_component_is_further_off_than_the_threshold(
    length: int, group: int, threshold: float, seed: int
) -> None:
    keys = wandering(length, seed)
    near = rebuilt(keys, threshold, group)
    assert float((keys - near).abs().max()) <= threshold
    first = torch.arange(0, length, group)
    assert torch.equal(near[:, first], keys[:, first])


def test_errors_do_not_add_up_over_thousands_of_tokens() -> None:
    keys = wandering(4096, seed=0)
    near = rebuilt(keys, 0.4, group=4096)
    assert float((keys - near).abs()[:, -64:].max()) <= 0.4
    # differences to the true key before it, each within the threshold: their sum is not
    steps = keys.diff(dim=1)
    drifting = torch.where(steps.abs() > 0.4, steps, 0.0).cumsum(1) + keys[:, :1]
    assert float((keys[:, 1:] - drifting).abs().max()) > 4.0


@given(**KEYS)
def test_a_score_is_wrong_by_no_more_than_the_bound(
    length: int, group: int, threshold: float, seed: int
) -> None:
    keys = wandering(length, seed).double()
    q = wandering(length, seed + 1).double()
    wrong = (q @ (keys - rebuilt(keys, threshold, group)).mT).abs()
    assert bool((wrong <= threshold * q.abs().sum(-1, keepdim=True) + 1e-12).all())


@given(**KEYS)
def test_what_is_kept_gives_the_same_keys_and_has_the_bytes_that_are_counted(
    length: int, group: int, threshold: float, seed: int
) -> None:
    keys = wandering(length, seed)
    changes = encoded(keys, threshold, group)
    assert torch.equal(changes.rebuilt(), rebuilt(keys, threshold, group))
    kept = int(changes.kept.sum())
    assert changes.nbytes == -(-keys.numel() // 8) + 4 * kept
    assert bool(changes.kept[:, ::group].all())
    if threshold == 0.0:
        assert kept == keys.numel() - int((keys.diff(dim=1) == 0).sum())


@given(**KEYS, span=st.integers(1, 3))
def test_products_that_are_saved_are_those_of_far_components_that_are_not_kept(
    length: int, group: int, threshold: float, seed: int, span: int
) -> None:
    kept = encoded(wandering(length, seed), threshold, group).kept
    heads, _, width = kept.shape
    whole = needed = 0
    for query in range(length):
        for key in range(query + 1):
            near = query // group - key // group < span
            whole += heads * width
            needed += heads * width if near else int(kept[:, key].sum())
    assert abs(products_saved(kept, group, span) - (1 - needed / whole)) < 1e-9


def test_a_threshold_below_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="threshold must be finite and 0 or more, got -1"):
        MIXERS["delta"](tiny_config(delta(-1.0)), delta(-1.0))


def test_far_keys_are_those_of_their_groups_wherever_a_text_is_cut() -> None:
    keys = wandering(9 * GROUP, seed=3)
    parts = [rebuilt(each, 0.5, GROUP) for each in keys.split(3 * GROUP, dim=1)]
    assert_close(torch.cat(parts, dim=1), rebuilt(keys, 0.5, GROUP), atol=0)
