"""What is special to one mixer: its kernel, its bounds, its start."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from helpers import GROUP, assert_close, feed, random_tokens, tiny_config, tiny_model

from linspec.mixers import MIXERS
from linspec.mixers.config import MixerConfig
from linspec.mixers.decaying import DecayingMixer
from linspec.mixers.linear import LinearMixer
from linspec.mixers.ops.blocks import join
from linspec.mixers.ops.features import unit
from linspec.mixers.random_features import orthogonal_rows
from linspec.mixers.yoso import Series, collisions
from linspec.models.config import DecoderConfig, EncoderConfig
from linspec.models.decoder import Decoder

WIDTH = 4


def make(name: str, **settings: object) -> LinearMixer:
    mixer = MixerConfig(name=name, group=GROUP, **settings)  # type: ignore[arg-type]
    made = MIXERS[name](tiny_config(mixer), mixer)
    assert isinstance(made, LinearMixer)
    return made.double()


def pairs(count: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 2, 2, count, WIDTH, dtype=torch.float64, generator=generator)
    return q, k[:, :, 0]


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("performer", lambda q, k: (q @ k.mT / math.sqrt(WIDTH)).exp()),
        ("rfa", lambda q, k: (-(torch.cdist(unit(q), unit(k)) ** 2) / 2).exp()),
    ],
)
def test_many_random_features_come_close_to_their_kernel(name: str, kernel: object) -> None:
    # the variance of positive features grows with exp(‖q + k‖²)
    q, k = (x / 2 for x in pairs())
    found = make(name, features=40_000)
    products = found.summed_queries(q) @ found.summed_keys(k).mT[:, :, None]
    expected = kernel(q, k[:, :, None])  # type: ignore[operator]
    shares = [x / x.sum(-1, keepdim=True) for x in (products, expected)]
    assert float((shares[0] - shares[1]).abs().max()) < 0.02


def test_projections_are_orthogonal_and_come_back_with_the_seed() -> None:
    rows = orthogonal_rows(10, WIDTH, seed=1)
    products = rows[:4] @ rows[:4].T
    assert_close(products, products.diag().diag(), atol=1e-5)
    assert torch.equal(rows, orthogonal_rows(10, WIDTH, seed=1))
    assert not torch.equal(rows, orthogonal_rows(10, WIDTH, seed=2))


def test_a_projection_travels_in_the_checkpoint_whatever_the_seed() -> None:
    model, other = (
        Decoder(tiny_config(MixerConfig(name="performer", seed=seed))) for seed in (0, 1)
    )
    other.load_state_dict(model.state_dict())
    ids = torch.tensor([random_tokens(9)])
    assert torch.equal(other(ids), model(ids))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("name", ["performer", "rfa", "hedgehog", "yoso"])
def test_small_and_large_keys_stay_finite(name: str, scale: float) -> None:
    model = tiny_model(name, dtype=torch.float32)
    with torch.no_grad():
        for block in model.layers:
            for part in (block.mixer.q, block.mixer.k):
                part.weight.mul_(scale)
    assert model(torch.tensor([random_tokens(3 * GROUP)])).isfinite().all()


def test_yoso_features_are_the_series_of_its_weights() -> None:
    q, k = (unit(x) for x in pairs())
    mixer = make("yoso")
    cosines = q @ k.mT[:, :, None]
    found = mixer.feature_map(q) @ mixer.feature_map(k).mT[:, :, None]
    exact = collisions(cosines)
    near_zero = cosines.abs() < 0.1
    assert near_zero.any()
    assert (found > 0).all()
    assert float((found - exact)[near_zero].abs().max()) < 1e-4


@pytest.mark.parametrize("span", [1, 2])
@pytest.mark.parametrize("stack", [DecoderConfig, EncoderConfig])
def test_yoso_reads_far_groups_alike_from_cosines_and_from_sums(
    stack: type[DecoderConfig] | type[EncoderConfig], span: int
) -> None:
    named = MixerConfig(name="yoso", group=GROUP, span=span)
    shape = {"vocab_size": 1, "width": 8, "layers": 1, "heads": 2, "kv_heads": 1, "mlp_width": 1}
    mixer = MIXERS["yoso"](stack(**shape, head_width=WIDTH, mixers=(named,)), named)
    q, k = (x[:, :1, ..., : 4 * GROUP - 1, :] for x in pairs())
    # only tokens of the first group have values, so what is read below comes from far groups
    v = k.clone()
    v[:, :, GROUP:] = 0

    def read(part: Series) -> torch.Tensor:
        causal = mixer.config.causal
        blocks = part.blocks(q, k, k, None) if causal else part.blocks_both(q, k, k, alone=False)
        # without what fills the last group
        return join(blocks, 2, q.shape[3])

    assert isinstance(mixer, LinearMixer) and isinstance(mixer.summed, Series)
    from_cosines = read(mixer.summed)
    assert_close(from_cosines, read(replace(mixer.summed, width=0)))
    assert from_cosines.abs().max() > 0


def test_linformer_starts_with_averages() -> None:
    named = MixerConfig(name="linformer", group=GROUP, features=2)
    mixer = MIXERS["linformer"](tiny_config(named), named).double()
    assert_close(
        mixer.get_parameter("key_map"),
        torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]], dtype=torch.float64),
    )


@pytest.mark.parametrize("kernel", ["own", "softmax"])
@pytest.mark.parametrize("name", ["gla", "gdn"])
@pytest.mark.parametrize("bias", [-1e4, 1e4])
def test_extreme_decay_stays_finite_in_all_forms(name: str, kernel: str, bias: float) -> None:
    mixer = MixerConfig(name=name, group=GROUP, kernel=kernel)
    model = tiny_model(mixer, dtype=torch.float32)
    with torch.no_grad():
        for block in model.layers:
            assert isinstance(block.mixer, DecayingMixer)
            block.mixer.get_parameter("gate_bias").fill_(bias)
    tokens = random_tokens(5 * GROUP)
    full = model(torch.tensor([tokens]))[0]
    full.sum().backward()
    assert full.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    state = model.new_state()
    stepped = torch.cat([feed(model, state, tokens[i : i + 3]) for i in range(0, len(tokens), 3)])
    assert_close(stepped, full[: len(stepped)].detach(), atol=1e-3)
    assert all(part.sums.isfinite().all() for part in state.parts)


@pytest.mark.parametrize("name", ["relu", "performer", "rfa", "transnormer", "gla", "gdn"])
def test_the_grouped_arrangement_starts_as_softmax_over_the_groups_within_reach(name: str) -> None:
    arranged = MixerConfig(name=name, group=GROUP, span=2, kernel="softmax")
    local = MixerConfig(name="local", group=GROUP, span=2, kernel="softmax")
    torch.manual_seed(0)
    model = Decoder(tiny_config(local, local)).eval()
    other = Decoder(tiny_config(arranged, arranged)).eval()
    other.load_state_dict(model.state_dict(), strict=False)
    ids = torch.tensor([random_tokens(5 * GROUP)])
    assert_close(other(ids), model(ids), atol=1e-5)


@pytest.mark.parametrize(
    "name", ["aug", "relu", "hedgehog", "performer", "yoso", "gla", "gdn:softmax"]
)
def test_a_copy_of_a_model_reads_its_own_parameters(name: str) -> None:
    """Parts of a mixer hold its methods; a copy's parts must hold those of the copy."""
    model = tiny_model(name)
    ids, other = torch.tensor([random_tokens(3 * GROUP)]), copy.deepcopy(model)
    before = model(ids)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    assert torch.equal(other(ids), before)
    for parameter in other.blocks.parameters():
        parameter.requires_grad_(True)
    other(ids).sum().backward()
    found = {key for key, value in other.blocks.named_parameters() if value.grad is not None}
    assert found == {key for key, _ in other.blocks.named_parameters()}
