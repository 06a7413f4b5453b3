"""FiRST: routers that read a prompt and tell which layers its drafts do without."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import VOCAB, mixer_config, random_tokens, randomise, tiny_config
from test_engine import decode, outputs

from linspec.checkpoints.load_quantized import quantize_model
from linspec.decoding.sampling import SamplingParams
from linspec.drafters import DrafterContext, make_drafter
from linspec.drafters.first import First, FirstOptions
from linspec.drafters.routers import Routers, RoutersConfig
from linspec.drafters.saved import load_drafter, save_drafter
from linspec.errors import ConfigError, DrafterError
from linspec.models.decoder import Decoder
from linspec.train.drafters.base import TRAININGS
from linspec.train.drafters.first import FirstTraining, agreement, routed
from linspec.train.drafters.states import states_of

# of eight layers, those that hardly matter
IDLE = frozenset({2, 5})
LAYERS = 8
PROMPTS = [random_tokens(n, seed=n) for n in (1, 7, 30, 90)]


def model_with_idle_layers(dtype: torch.dtype = torch.float32) -> Decoder:
    mixers = [mixer_config("aug" if i % 3 == 1 else "softmax") for i in range(LAYERS)]
    model = randomise(Decoder(tiny_config(*mixers)), 1).to(dtype)
    with torch.no_grad():
        for layer in IDLE:
            model.layers[layer].mixer.o.weight.mul_(0.01)
            model.layers[layer].mlp.down.weight.mul_(0.01)
    return model


def routers_of(model: Decoder, *, read: int = 64) -> Routers:
    config = RoutersConfig(
        width=model.config.width, vocab_size=VOCAB, layers=model.config.layers, read=read
    )
    return Routers(config, model).to(model.dtype)


def random_routers(model: Decoder) -> Routers:
    """They find every other prompt to need other layers."""
    routers = routers_of(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        routers.weight.copy_(torch.randn(routers.weight.shape, generator=generator))
        routers.bias.zero_()
    return routers


def drafter_of(model: Decoder, routers: Routers, **options: int) -> First:
    return First(DrafterContext(model, slots=4), FirstOptions(**options), routers)


@pytest.mark.crossed(2)
@pytest.mark.parametrize("kind", ["one call", "float64", "int8"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_outputs_are_plain_token_for_token_with_other_layers_for_each_sequence(
    kind: str, temperature: float
) -> None:
    model = model_with_idle_layers(torch.float64 if kind == "float64" else torch.float32)
    quantize_model(model, 8, {}) if kind == "int8" else model.to_inference()
    params = [
        SamplingParams(max_tokens=n, temperature=temperature, seed=n) for n in (5, 20, 15, 25)
    ]
    plain = [outputs(decode(model, [p], each))[0] for p, each in zip(PROMPTS, params, strict=True)]
    routers = random_routers(model)
    chosen = {routers.skipped(routers.needed(model, prompt)) for prompt in PROMPTS}
    assert len(chosen) > 1
    rows = decode(model, PROMPTS, params, drafter_of(model, routers))
    assert outputs(rows) == plain and sum(row.stats.drafted for row in rows) > 0
    assert outputs(decode(model, PROMPTS, params, drafter_of(model, routers), slots=1)) == plain


def test_layers_are_chosen_by_the_prompt_alone() -> None:
    model = model_with_idle_layers().to_inference()
    routers = random_routers(model)
    seen: dict[int, set[frozenset[int]]] = {}

    class Watched(First):
        def skipped(self, sequence: object) -> frozenset[int]:
            found = super().skipped(sequence)  # type: ignore[arg-type]
            seen.setdefault(sequence.prompt_length, set()).add(found)  # type: ignore[attr-defined]
            return found

    for seed in (1, 2):
        params = SamplingParams(max_tokens=20, temperature=1.0, seed=seed)
        drafter = Watched(DrafterContext(model, slots=4), FirstOptions(), routers)
        # however the prompt is read
        decode(model, PROMPTS, params, drafter, prefill_tokens=512 if seed == 1 else 5)
        assert not drafter._forms._skipped
    assert len(seen) == len(PROMPTS) and all(len(sets) == 1 for sets in seen.values())


def test_all_of_every_layer_is_the_model_bit_for_bit() -> None:
    model = model_with_idle_layers(torch.float64)
    ids = torch.tensor([random_tokens(20, seed=2)])
    whole = routed(model, ids, lambda layer, x: x.new_ones(len(x)))
    assert torch.equal(whole, model.hidden(ids))
    # and a prompt that needs all layers has no drafts
    routers = routers_of(model)
    rows = decode(
        model.to_inference(), PROMPTS, SamplingParams(max_tokens=5), drafter_of(model, routers)
    )
    assert not any(row.stats.drafted for row in rows)


def trained(model: Decoder, steps: int = 60) -> tuple[FirstTraining, Routers]:
    training = TRAININGS.build("first:keep=0.75,read=32")
    assert isinstance(training, FirstTraining)
    model.requires_grad_(False)
    generator = np.random.default_rng(0)
    routers = training.make(model, generator.integers(0, VOCAB, 100), 0)
    optimizer = torch.optim.Adam(routers.parameters(), lr=0.1)
    for _ in range(steps):
        ids = torch.from_numpy(generator.integers(0, VOCAB, (4, 33)))
        loss = training.loss(routers, states_of(model, ids, training.reads(model.config)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return training, routers


def test_routers_learn_which_layers_do_nothing_and_the_model_stays_as_it_is(tmp_path: Path) -> None:
    model = model_with_idle_layers()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    training, routers = trained(model)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert routers.skipped(routers.needed(model, random_tokens(40, seed=9))) == IDLE
    stream = np.array(random_tokens(300, seed=4))
    training.measure(routers, stream, context=40, tokens=200)
    assert routers.agreement > 0.9
    others = routers_of(model)
    with torch.no_grad():
        # as many layers, at even distances
        others.bias[[3, 6]] = -9
    assert routers.agreement > agreement(others, stream, context=40, tokens=200)
    folder = save_drafter(routers, model, tmp_path / "first", dtype=None)
    again = load_drafter(folder, model, Routers)
    assert torch.equal(again.weight, routers.weight) and again.agreement == routers.agreement
    drafter = make_drafter(f"first:path={folder},least=0", DrafterContext(model))
    rows = decode(model.to_inference(), PROMPTS, SamplingParams(max_tokens=20), drafter)
    assert outputs(rows) == outputs(decode(model, PROMPTS, SamplingParams(max_tokens=20)))
    assert sum(r.stats.accepted for r in rows) > 2 * sum(r.stats.rounds for r in rows)


@pytest.mark.parametrize("count", [1, 3, 6])
def test_a_budget_takes_the_layers_that_are_needed_least(count: int) -> None:
    routers = routers_of(model_with_idle_layers())
    needed = [1.0, 0.9, 0.3, 0.8, 0.2, 0.6, 0.7, 1.0]
    assert routers.skipped(needed) == {2, 4}
    found = routers.skipped(needed, count)
    assert len(found) == count and not found & {0, 7}
    assert max(needed[layer] for layer in found) <= min(
        (needed[layer] for layer in range(1, 7) if layer not in found), default=1.0
    )


def test_routers_of_another_model_are_refused(tmp_path: Path) -> None:
    model = model_with_idle_layers()
    folder = save_drafter(routers_of(model), model, tmp_path / "first")
    other = randomise(Decoder(tiny_config(*[mixer_config("softmax")] * 3)), 0).float()
    for spec, message in {
        f"first:{folder}": "are for 8 layers, this model has 3",
        f"first:{tmp_path / 'none'}": "no drafter of kind 'first' in",
        "first": "no drafter of kind 'first'",
    }.items():
        with pytest.raises(DrafterError, match=message):
            make_drafter(spec, DrafterContext(other))
    with pytest.raises(DrafterError, match="cannot leave out 7 layers of 8"):
        drafter_of(model, routers_of(model), skip=7)
    with pytest.raises(ConfigError, match="3 layers or more"):
        RoutersConfig(width=4, vocab_size=4, layers=2)
