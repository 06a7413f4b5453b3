"""What holds for every mixer's forms: causality, and that the proofs notice wrong forms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import (
    CASES,
    GROUP,
    VOCAB,
    WINDOW,
    assert_close,
    mixer_config,
    prefilled,
    random_tokens,
    tiny_config,
    tiny_model,
    tree_logits,
)

import linspec.mixers.forms
from linspec.decoding.step import StepInput
from linspec.decoding.tree import TokenTree, chain
from linspec.decoding.tree_mask import TreeMask
from linspec.errors import ConfigError
from linspec.mixers.config import MixerConfig
from linspec.mixers.ops.exact import Groups
from linspec.models.decoder import Decoder
from linspec.state.sequence_states import SequenceStates

LARGE = 1e-3
SUMMED = ("global", "aug", "relu", "hedgehog", "linformer", "aug:softmax", "gla:softmax")


def changes(model: Decoder, length: int = 2 * GROUP + 3) -> list[float]:
    """Entry t: how much a change of token t + 1 moves the hidden states up to t."""
    ids = torch.tensor([random_tokens(length)])
    moved = []
    with torch.no_grad():
        before = model.hidden(ids)
        for t in range(length - 1):
            other = ids.clone()
            other[0, t + 1] = (ids[0, t + 1] + 1) % VOCAB
            after = model.hidden(other)
            moved.append(float((after - before)[0, : t + 1].abs().max()))
            assert float((after - before)[0, t + 1].abs().max()) > LARGE
    return moved


def bare(name: str, taps: int, dtype: torch.dtype = torch.float64) -> Decoder:
    """Two equal layers: groups of both end at the same places."""
    mixer = mixer_config(name, taps)
    return tiny_model(mixer, mixer, dtype=dtype)


@pytest.mark.crossed(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "taps"), CASES)
def test_the_future_does_not_change_a_single_bit(name: str, taps: int, dtype: torch.dtype) -> None:
    assert max(changes(bare(name, taps, dtype))) == 0.0


@pytest.mark.parametrize(("name", "taps"), [case for case in CASES if case[1]])
def test_a_centred_convolution_would_be_noticed(
    name: str, taps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    causal = linspec.mixers.forms.convolve

    def centred(
        v: torch.Tensor, kernel: torch.Tensor, repeats: int, conv_history: torch.Tensor | None
    ) -> torch.Tensor:
        ahead = torch.nn.functional.pad(v[:, :, taps // 2 :], (0, 0, 0, taps // 2))
        return causal(ahead, kernel, repeats, conv_history)

    monkeypatch.setattr(linspec.mixers.forms, "convolve", centred)
    assert max(changes(bare(name, taps))) > LARGE


def verified(model: Decoder, state: SequenceStates, tree: TokenTree) -> torch.Tensor:
    """Logits of the nodes of `tree`; nothing stays staged."""
    logits = model.step([StepInput.tree(0, tree)], state).logits
    state.drop(0)
    return logits


def without_groups_closed_in_the_tree(
    groups: Callable[..., tuple[torch.Tensor | None, torch.Tensor | None]],
) -> Callable[..., tuple[torch.Tensor | None, None]]:
    """The short-cut of the published code: nodes past a border see only sums already committed."""

    def short_cut(self: Groups, tree_mask: TreeMask) -> tuple[torch.Tensor | None, None]:
        return groups(self, tree_mask)[0], None

    return short_cut


@pytest.mark.parametrize("name", SUMMED)
@pytest.mark.parametrize("offset", range(GROUP))
def test_dropping_the_closing_group_at_a_border_would_be_noticed(
    name: str, offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompt = bare(name, 3), random_tokens(GROUP + offset)
    tree, state = chain(random_tokens(GROUP + 2, seed=1)), prefilled(model, prompt)
    expected = tree_logits(model, prompt, tree)
    assert_close(verified(model, state, tree), expected)
    wrong = without_groups_closed_in_the_tree(Groups.masks)
    monkeypatch.setattr(Groups, "masks", wrong)
    found = verified(model, state, tree)
    border = GROUP - offset
    assert_close(found[:border], expected[:border])
    assert (found - expected)[border:].abs().amax(1).min() > LARGE


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "local", "group": 0}, "group must be 1 or more, got 0"),
        ({"name": "local", "taps": -1}, "taps must be 0 or more, got -1"),
        ({"name": "window"}, "needs a window of 1 or more tokens, got 0"),
        ({"name": "performer", "features": -1}, "features must be 0 or more, got -1"),
        ({"name": "local", "kernel": "gauss"}, "kernel must be one of own, softmax, relu2"),
    ],
)
def test_sizes_out_of_range_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MixerConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "linformer", "features": GROUP + 1}, "at most as many rows of a group"),
        ({"name": "linformer", "kernel": "softmax"}, "under one denominator; kernel 'softmax'"),
        ({"name": "local", "features": 8}, "mixer 'local' has no 'features' to set, got 8"),
        ({"name": "aug", "taps": 2, "seed": 8}, "mixer 'aug' has no 'seed' to set, got 8"),
        ({"name": "performer", "keep": 8}, "mixer 'performer' has no 'keep' to set, got 8"),
        ({"name": "global", "kernel": "softmax"}, "mixer 'global' sees no group exactly"),
    ],
)
def test_settings_that_mean_nothing_to_a_mixer_are_refused(
    settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Decoder(tiny_config(MixerConfig(group=GROUP, **settings)))  # type: ignore[arg-type]


def test_aug_needs_taps() -> None:
    with pytest.raises(ConfigError, match="'aug' needs convolution taps, got 0"):
        Decoder(tiny_config(MixerConfig(name="aug", taps=0)))


def test_an_unknown_mixer_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown mixer 'mamba'; known: aug, .*softmax"):
        Decoder(tiny_config(MixerConfig(name="mamba")))


def test_a_window_set_on_a_softmax_layer_does_not_shorten_its_memory() -> None:
    """It once did: the full form saw every token, the cache kept `window` of them."""
    model = tiny_model(MixerConfig(name="softmax", window=WINDOW))
    tokens = random_tokens(6 * WINDOW)
    state = model.new_state()
    for token in tokens[:-1]:
        model.step([StepInput(0, [token])], state)
        state.commit(0, [0])
    logits = model.step([StepInput(0, tokens[-1:])], state).logits
    with torch.no_grad():
        assert_close(logits[0], model(torch.tensor([tokens]))[0, -1])


@pytest.mark.parametrize("name", ["pages", "delta", "tidal"])
def test_tokens_that_overwrite_read_as_before(name: str) -> None:
    """They once asked for the staged rows of a slot that has none."""
    model, ids = bare(name, 0), random_tokens(30)
    state = prefilled(model, ids)
    again = [20, 21, 22, 23]
    found = model.step([StepInput(0, [ids[at] for at in again], overwrite=again)], state).logits
    with torch.no_grad():
        assert_close(found, model(torch.tensor([ids]))[0, again])
