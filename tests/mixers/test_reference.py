"""Full forms against the reference, which is the specification."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from helpers import (
    CASES,
    DEVICES,
    GROUP,
    MIXER_NAMES,
    TAPS,
    assert_close,
    mixer_config,
    randomise,
    tiny_config,
)

from linspec.errors import ConfigError
from linspec.mixers import MIXERS, Mixer
from linspec.mixers.config import MixerConfig
from linspec.mixers.reference import REFERENCES, reference
from linspec.mixers.rope import Rotary, inverse_frequencies
from linspec.mixers.rope_config import RopeConfig
from linspec.models.config import EncoderConfig

WITHOUT_SPAN = ("softmax", "window", "global")
LENGTHS = (1, 2, GROUP - 1, GROUP, GROUP + 1, 2 * GROUP + 3)


def make(name: str, taps: int, device: str = "cpu", span: int = 1, **switches: object) -> Mixer:
    mixer = replace(mixer_config(name, taps), span=span)
    config = tiny_config(mixer, **switches)  # type: ignore[arg-type]
    made = randomise(MIXERS[mixer.name](config, mixer), seed=1).to(device, torch.float64)
    assert isinstance(made, Mixer)
    return made


def inputs(length: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Random x [T, D] and rotary angles [T, K/2] of positions 0..T-1, float32 as in `Rotary`."""
    x = torch.randn(
        length, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(length)
    )
    angles = torch.arange(length)[:, None] * inverse_frequencies(RopeConfig(), 4)
    return x.to(device), angles.to(device)


def full(mixer: Mixer, x: torch.Tensor, angles: torch.Tensor | None) -> torch.Tensor:
    positions = torch.arange(len(x), device=x.device)
    rope = None if angles is None else Rotary(RopeConfig(), 4)(positions, x.dtype)
    return mixer(x[None], rope)[0]


def test_every_registered_mixer_has_a_reference() -> None:
    assert set(MIXERS.names()) == set(REFERENCES)


def test_a_mixer_without_a_reference_is_named() -> None:
    mixer = make("local", 0)
    object.__setattr__(mixer.mixer, "name", "unheard-of")
    with pytest.raises(ConfigError, match="unheard-of"):
        reference(mixer, *inputs(2))


@pytest.mark.crossed(3)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "taps"), CASES)
@pytest.mark.parametrize(
    "switches", [{}, {"kv_heads": 4, "qk_norm": True}, {"kv_heads": 1}], ids=str
)
@torch.no_grad()
def test_full_form_equals_reference(
    name: str, taps: int, switches: dict[str, object], device: str
) -> None:
    mixer = make(name, taps, device, **switches)
    for length in LENGTHS:
        x, angles = inputs(length, device)
        assert_close(full(mixer, x, angles), reference(mixer, x, angles))


@pytest.mark.parametrize("span", [3])
@pytest.mark.parametrize("name", [n for n in MIXER_NAMES if n not in WITHOUT_SPAN])
@torch.no_grad()
def test_a_span_of_several_groups(name: str, span: int) -> None:
    mixer = make(name, TAPS, span=span)
    for length in (*LENGTHS, 5 * GROUP + 1):
        x, angles = inputs(length)
        assert_close(full(mixer, x, angles), reference(mixer, x, angles))


@pytest.mark.parametrize(("name", "taps"), CASES)
@torch.no_grad()
def test_without_rope(name: str, taps: int) -> None:
    # a mixer that rotates what it reads knows it from the configuration
    mixer, (x, _) = make(name, taps, positions="learned"), inputs(2 * GROUP + 3)
    assert_close(full(mixer, x, None), reference(mixer, x))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "taps"), [(n, 70) for n in MIXER_NAMES])
@torch.no_grad()
def test_long_sequences_and_kernels_longer_than_a_block(name: str, taps: int) -> None:
    mixer, (x, angles) = make(name, taps), inputs(200)
    assert_close(full(mixer, x, angles), reference(mixer, x, angles))


@pytest.mark.parametrize("name", MIXER_NAMES)
def test_gradients_equal_those_of_the_reference(name: str) -> None:
    mixer, (x, angles) = make(name, TAPS), inputs(2 * GROUP + 3)
    gradients = []
    for form in (full, reference):
        mixer.zero_grad()
        form(mixer, x, angles).square().sum().backward()
        gradients.append(
            {n: p.grad.clone() for n, p in mixer.named_parameters() if p.grad is not None}
        )
    assert gradients[0].keys() == dict(mixer.named_parameters()).keys()
    assert_close(*gradients, atol=1e-8)


# ---- forms for encoders that are equations of their own


def in_an_encoder(mixer: MixerConfig) -> Mixer:
    config = EncoderConfig.from_dict(
        {k: v for k, v in tiny_config(mixer).to_dict().items() if k in ENCODER_FIELDS}
    )
    made = randomise(MIXERS[mixer.name](config, mixer), seed=1).double()
    assert isinstance(made, Mixer)
    return made


ENCODER_FIELDS = {field.name for field in fields(EncoderConfig)}


@pytest.mark.parametrize("taps", [0, TAPS])
@pytest.mark.parametrize("features", [1, 3, GROUP])
@pytest.mark.parametrize("length", LENGTHS)
def test_linformer_in_an_encoder_equals_its_reference(
    length: int, features: int, taps: int
) -> None:
    mixer = in_an_encoder(MixerConfig(name="linformer", group=GROUP, features=features, taps=taps))
    x, _ = inputs(length)
    with torch.no_grad():
        assert_close(mixer(x[None], None)[0], reference(mixer, x))


def test_linformer_with_a_row_for_every_token_is_softmax_attention() -> None:
    """With E and F at the identity nothing is compressed: the published form at full rank."""
    mixer = in_an_encoder(MixerConfig(name="linformer", group=GROUP, features=GROUP))
    exact = in_an_encoder(MixerConfig())
    with torch.no_grad():
        mixer.key_map.copy_(torch.eye(GROUP))
        mixer.value_map.copy_(torch.eye(GROUP))
        exact.load_state_dict(mixer.state_dict(), strict=False)
        x, _ = inputs(2 * GROUP + 3)
        assert_close(mixer(x[None], None), exact(x[None], None))


def test_what_an_encoder_cannot_forget_is_refused() -> None:
    with pytest.raises(ConfigError, match="sees every group in an encoder; keep 3 means nothing"):
        in_an_encoder(MixerConfig(name="linformer", group=GROUP, keep=3))
